"""Embed is the mean of transformers' last hidden state over a row's tokens."""

import torch

from moe_lightning import MoELightningModule
from moe_lightning.data.records import RowError
from moe_lightning.tasks import Embed

# fp32 sums in another order; hidden states are of order 1.
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
LENGTHS = (40, 2, 64, 17, 1, 33)


def vectors(answers):
    return torch.tensor([answer["embedding"] for answer in answers])


def test_embeddings_equal_transformers(
    family, backend, family_checkpoint, plain_transformers, loaded_runner, run_task, random_ids
):
    path = family_checkpoint(family)
    plain, rows = plain_transformers(path), [random_ids(n) for n in LENGTHS]
    answers = run_task(Embed(), loaded_runner(path, backend), rows)
    assert [answer["id"] for answer in answers] == [f"row-{n}" for n in range(6)]
    assert all(answer.keys() == {"id", "embedding"} for answer in answers)
    want = torch.stack([plain.embedding(row) for row in rows])
    torch.testing.assert_close(vectors(answers), want, **TOLERANCE)


def test_embeddings_do_not_depend_on_the_batch(
    family_checkpoint, loaded_runner, run_task, random_ids
):
    runner = loaded_runner(family_checkpoint("mixtral"))
    rows = [random_ids(n) for n in LENGTHS]
    alone = torch.cat([vectors(run_task(Embed(), runner, [row])) for row in rows])
    torch.testing.assert_close(vectors(run_task(Embed(), runner, rows)), alone, **TOLERANCE)


def test_not_finite_rows_are_errors_and_others_are_unharmed(
    family_checkpoint, run_task, random_ids
):
    module = MoELightningModule(str(family_checkpoint("qwen3_moe")))
    module.configure_model()
    rows = [[6 if t == 5 else t for t in random_ids(n)] for n in (9, 30, 12)]
    before = vectors(run_task(Embed(), module.runner, rows))
    with torch.no_grad():
        module.model.get_input_embeddings().weight[5] = float("nan")
    first, error, *others = run_task(Embed(), module.runner, [rows[0], [7, 5], *rows[1:]])
    assert isinstance(error, RowError)
    assert "NaN or infinite hidden states" in error.error
    torch.testing.assert_close(vectors([first, *others]), before, **TOLERANCE)
