"""Score sums the log-probabilities that transformers gives."""

import math

import pytest
import torch

from moe_lightning import MoELightningModule
from moe_lightning.data.records import RowError
from moe_lightning.tasks import Score
from moe_lightning.tasks.score import CHUNK_TOKENS

# Sums of up to 63 fp32 log-probabilities, each within 1e-5.
TOLERANCE = {"abs": 1e-4, "rel": 1e-5}
LENGTHS = (40, 2, 64, 17, 1, 33)


def test_scores_equal_transformers(
    family, backend, family_checkpoint, plain_transformers, loaded_runner, run_task, random_ids
):
    path = family_checkpoint(family)
    plain, rows = plain_transformers(path), [random_ids(n) for n in LENGTHS]
    answers = run_task(Score(), loaded_runner(path, backend), rows)
    for n, (answer, ids) in enumerate(zip(answers, rows, strict=True)):
        want = plain.logprob(ids)
        assert answer["id"] == f"row-{n}"
        assert answer["num_tokens"] == len(ids)
        assert answer["logprob"] == pytest.approx(want, **TOLERANCE)
        if len(ids) > 1:
            perplexity = math.exp(-want / (len(ids) - 1))
            assert answer["perplexity"] == pytest.approx(perplexity, rel=1e-4)


def test_a_single_token_has_nothing_to_score(
    family_checkpoint, loaded_runner, run_task, random_ids
):
    runner = loaded_runner(family_checkpoint("qwen3_moe"))
    assert run_task(Score(), runner, [[9], [10]]) == [
        {"id": f"row-{n}", "logprob": 0.0, "num_tokens": 1, "perplexity": 1.0} for n in range(2)
    ]
    _, alone = run_task(Score(), runner, [random_ids(8), [9]])
    assert (alone["logprob"], alone["perplexity"]) == (0.0, 1.0)


def test_many_rows_take_several_chunks_of_logits(
    family_checkpoint, plain_transformers, loaded_runner, run_task, random_ids
):
    """A plain head, and one that scales its logits, which needs the model's own."""
    rows = [random_ids(50, seed=n) for n in range(12)]
    assert sum(len(row) - 1 for row in rows) > 2 * CHUNK_TOKENS
    for family, is_plain in (("qwen3_moe", True), ("granitemoe", False)):
        path = family_checkpoint(family)
        runner, plain = loaded_runner(path), plain_transformers(path)
        assert runner.has_plain_head() == is_plain
        got = [answer["logprob"] for answer in run_task(Score(), runner, rows)]
        assert got == pytest.approx([plain.logprob(row) for row in rows], **TOLERANCE)


def test_scores_do_not_depend_on_the_batch(family_checkpoint, loaded_runner, run_task, random_ids):
    runner = loaded_runner(family_checkpoint("mixtral"))
    rows = [random_ids(n) for n in LENGTHS]
    together = run_task(Score(), runner, rows)
    for answer, row in zip(together, rows, strict=True):
        (alone,) = run_task(Score(), runner, [row])
        assert answer["logprob"] == pytest.approx(alone["logprob"], **TOLERANCE)


def test_not_finite_rows_are_errors_and_others_are_unharmed(
    family_checkpoint, run_task, random_ids
):
    module = MoELightningModule(str(family_checkpoint("qwen3_moe")))
    module.configure_model()
    rows = [[6 if t == 5 else t for t in random_ids(n)] for n in (9, 30, 12)]
    bad = [*rows[1][:20], 5, *rows[1][20:]]
    before = run_task(Score(), module.runner, [rows[0], bad, rows[2]])
    with torch.no_grad():
        module.model.get_input_embeddings().weight[5] = float("nan")
    first, error, last = run_task(Score(), module.runner, [rows[0], bad, rows[2]])
    assert isinstance(error, RowError)
    assert "NaN or infinite log-probabilities" in error.error
    # The bad row goes to other experts than before, so theirs see matrices of other heights.
    for got, want in ((first, before[0]), (last, before[2])):
        assert got["logprob"] == pytest.approx(want["logprob"], **TOLERANCE)
