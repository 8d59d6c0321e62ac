"""One bad row costs one row, wherever it stands."""

import pytest
import torch

from moe_lightning import MoELightningModule
from moe_lightning.data.records import Row, RowBatch, RowError, RowOptions
from moe_lightning.errors import CheckpointError, UsageError
from moe_lightning.tasks import Embed, Generate, Score, Task
from moe_lightning.tasks.isolation import run_isolated

POISON = 13


class Echo(Task):
    """Answers with the row's tokens; a token 13 makes the whole batch raise."""

    def __init__(self, error=None):
        self.error = error or ZeroDivisionError("thirteen")
        self.sizes = []

    def run(self, runner, rows, *, budget_tokens, progress):
        self.sizes.append(len(rows))
        if any(POISON in row.token_ids for row in rows):
            raise self.error
        return [{"id": row.id, "tokens": row.token_ids} for row in rows]


def batch_of(token_ids, errors=()):
    rows = [
        Row(10 + n, 20 + n, f"r{n}", list(ids), RowOptions()) for n, ids in enumerate(token_ids)
    ]
    return RowBatch(0, rows, list(errors))


class NoModel:
    """A runner of tasks that need none."""

    is_alone = True


def run(task, batch, runner=NoModel):
    with torch.inference_mode():
        return run_isolated(task, runner, batch, budget_tokens=4096, progress=lambda *_: None)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, 8])
def test_only_the_poisoned_row_fails_wherever_it_stands(num_rows):
    for bad in range(num_rows):
        rows = [[POISON] if n == bad else [n + 100] for n in range(num_rows)]
        predictions = run(Echo(), batch_of(rows))
        assert predictions.row_numbers == list(range(10, 10 + num_rows))
        assert predictions.has_failed == [n == bad for n in range(num_rows)]
        assert predictions.num_errors == 1
        for n, prediction in enumerate(predictions):
            if n == bad:
                assert prediction == {
                    "id": f"r{n}",
                    "line": 20 + n,
                    "offset": None,
                    "stage": "compute",
                    "error": "the model raised ZeroDivisionError: thirteen",
                }
            else:
                assert prediction == {"id": f"r{n}", "tokens": [n + 100]}


def test_several_poisoned_rows():
    predictions = run(Echo(), batch_of([[POISON], [1], [2], [POISON], [POISON], [3]]))
    assert predictions.has_failed == [True, False, False, True, True, False]
    assert run(Echo(), batch_of([[POISON]] * 5)).num_errors == 5


def test_a_good_batch_is_computed_once_and_one_bad_row_costs_few_runs():
    task = Echo()
    run(task, batch_of([[1]] * 64))
    assert task.sizes == [64]
    task = Echo()
    run(task, batch_of([[POISON if n == 37 else 1] for n in range(64)]))
    assert len(task.sizes) == 1 + 2 * 6  # both halves at each of six levels


def test_rows_that_failed_before_come_last():
    earlier = RowError(row=3, line=4, id="x", stage="encode", error="no tokens")
    predictions = run(Echo(), batch_of([[1]], [earlier]))
    assert list(predictions) == [
        {"id": "r0", "tokens": [1]},
        {"id": "x", "line": 4, "offset": None, "stage": "encode", "error": "no tokens"},
    ]
    assert predictions.row_numbers == [10, 3]
    assert predictions.has_failed == [False, True]
    assert run(Echo(), RowBatch(0, [], [earlier])).num_errors == 1
    assert len(run(Echo(), RowBatch(0, [], []))) == 0


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("full"), MemoryError(), CheckpointError("bad"), UsageError("no")],
)
def test_what_is_no_rows_fault_ends_the_run(error):
    task = Echo(error)
    with pytest.raises(type(error)):
        run(task, batch_of([[1], [POISON], [2]]))
    assert task.sizes == [3]


def test_an_interruption_is_no_row_error():
    with pytest.raises(KeyboardInterrupt):
        run(Echo(KeyboardInterrupt()), batch_of([[1], [POISON]]))


@pytest.fixture
def own_module(family_checkpoint):
    """A module to spoil: weights are patched, and nobody else sees them."""
    module = MoELightningModule(str(family_checkpoint("qwen3_moe")))
    module.configure_model()
    return module


def tokens_of(prediction):
    return prediction["token_ids"]


@pytest.mark.parametrize("budget_tokens", [4096, 60])
@pytest.mark.parametrize("position", range(6))
def test_a_nan_row_leaves_the_texts_of_others_alone(
    position, budget_tokens, own_module, random_ids
):
    rows = [[6 if t == 5 else t for t in random_ids(4 + 3 * n)] for n in range(6)]
    rows[position][1] = 5  # token 5's embedding will be NaN
    batch = batch_of(rows)
    task = Generate(max_new_tokens=10, ignore_eos=True)
    embedding = own_module.model.get_input_embeddings().weight

    def generate():
        with torch.inference_mode():
            return run_isolated(
                task,
                own_module.runner,
                batch,
                budget_tokens=budget_tokens,
                progress=lambda *_: None,
            )

    before = generate()
    with torch.no_grad():
        embedding[5] = float("nan")
    after = generate()
    assert not any(before.has_failed)
    for n in range(6):
        # A healthy row that says token 5 itself becomes ill from there on.
        says_5 = n == position or 5 in tokens_of(before[n])[:-1]
        assert after.has_failed[n] == says_5
        if not says_5:
            assert after[n] == before[n]
    assert after.num_not_finite == after.num_errors >= 1
    assert "NaN" in after[position]["error"]


@pytest.mark.parametrize("task", [Score(), Embed()])
def test_a_nan_expert_costs_the_rows_that_visit_it(
    task, own_module, plain_transformers, family_checkpoint, random_ids
):
    plain = plain_transformers(family_checkpoint("qwen3_moe"))
    rows = [random_ids(3, seed=n) for n in range(12)]
    # Who visits expert 2 of the last layer, by transformers' own router logits. The last token of
    # a scored row predicts nothing, so its visit does no harm there.
    visits = []
    for ids in rows:
        with torch.inference_mode():
            logits_TE = plain.model(
                torch.tensor([ids]), output_router_logits=True, use_cache=False
            ).router_logits[-1]
        visits.append((logits_TE.topk(2).indices == 2).any(1).tolist())
    counted = slice(None, -1) if isinstance(task, Score) else slice(None)
    want = [any(visit[counted]) for visit in visits]
    assert 0 < sum(want) < len(rows)
    before = run(task, batch_of(rows), own_module.runner)
    with torch.no_grad():
        own_module.model.model.layers[-1].mlp.experts.down_proj[2] = float("nan")
    after = run(task, batch_of(rows), own_module.runner)
    assert after.has_failed == want
    # The routing is as before, and so is every number.
    assert [a for a, bad in zip(after, want, strict=True) if not bad] == [
        b for b, bad in zip(before, want, strict=True) if not bad
    ]


@pytest.mark.parametrize("task", [Generate(max_new_tokens=3), Score(), Embed()])
def test_a_model_that_only_says_nan_is_a_bad_checkpoint(task, own_module, random_ids):
    own_module.task = task
    with torch.no_grad():
        own_module.model.model.norm.weight.fill_(float("nan"))
    batch = batch_of([random_ids(n) for n in (3, 5)])
    with torch.inference_mode(), pytest.raises(CheckpointError, match=r"NaN for every row.*check_"):
        own_module.predict_step(batch, 0)


def test_a_later_batch_of_nan_is_only_rows(own_module, random_ids):
    own_module.task = Score()
    batch = batch_of([random_ids(n) for n in (3, 5)])
    with torch.inference_mode():
        assert own_module.predict_step(batch, 0).num_errors == 0
        own_module.model.model.norm.weight.fill_(float("nan"))
        assert own_module.predict_step(batch, 1).num_errors == 2
    assert own_module.tally.num_errors == 2
