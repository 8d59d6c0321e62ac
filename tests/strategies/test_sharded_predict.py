"""Predict over ranks gives the rows of one process, whatever the rows and the layout."""

import json
import math
import re

import lightning as L
import pytest
import torch
from families import FAMILIES
from predict_runs import (
    check_row,
    check_rows,
    predict,
    predict_file,
    predict_files,
    predict_layouts,
    ragged_rows,
    read_lines,
    together,
    trainer_of,
)
from ranks import run_on_ranks
from sampling import sampled
from torch.utils.data import DataLoader

from moe_lightning import MoELightningModule, Score
from moe_lightning.callbacks import RowProgressBar
from moe_lightning.errors import UsageError
from moe_lightning.modeling.lock_step import LockStep

# Three MoE layers and 8 experts: a rank that left out one exchange would break the next ones.
TWO_RANKS = {
    "fsdp": {},
    "hsdp of one": {"dp_replicate_size": 2},
    "a copy each": {"dp_replicate_size": 2, "dense": "replicated"},
    "experts shared only": {"dense": "replicated"},
    "ep": {"ep_size": 2},
    "ep, dense shared": {"ep_size": 2, "dense": "sharded"},
    "tp": {"tp_size": 2},
    "pp": {"pp_size": 2},
}
THREE_RANKS = {
    "fsdp": {},
    "ep, uneven": {"ep_size": "auto"},
    "ep, round robin": {"ep_size": 3, "policy": "round_robin"},
    "pp": {"pp_size": "auto"},
}
FOUR_RANKS = {
    "fsdp": {},
    "ep": {"ep_size": 4},
    "fsdp 2, ep 2": {"fsdp_size": 4, "ep_size": 2},
    "fsdp 2, ep 2, dense shared": {"fsdp_size": 4, "ep_size": 2, "dense": "sharded"},
    "hsdp": {"fsdp_size": 2, "dp_replicate_size": 2},
    "hsdp, ep": {"fsdp_size": 2, "dp_replicate_size": 2, "ep_size": 2},
    "tp, fsdp": {"fsdp_size": 2, "tp_size": 2},
    "tp, ep": {"fsdp_size": 2, "tp_size": 2, "ep_size": 4},
    "tp, ep of 2": {"fsdp_size": 2, "tp_size": 2, "ep_size": 2},
    "tp, pp": {"tp_size": 2, "pp_size": 2},
}


def copies(layout, world):
    """Ranks that compute the same rows."""
    tp, pp = layout.get("tp_size", 1), layout.get("pp_size", 1)
    return tp * (world if pp == "auto" else pp)


@pytest.fixture(scope="session")
def one_process():
    """What one process says: ``one_process(path, count)``."""
    kept = {}

    def one_process(path, count):
        if path not in kept:
            (kept[path],) = predict(path, None, [9])
        return {name: kept[path][name] for name in (f"row-{n}" for n in range(count))}

    return one_process


def check_layouts(world, layouts, path, counts, one_process):
    results = run_on_ranks(world, predict_layouts, path, list(layouts.values()), counts)
    for number, (name, layout) in enumerate(layouts.items()):
        for place, count in enumerate(counts):
            rows = [result[number][place] for result in results]
            got = together(rows, copies=copies(layout, world))
            check_rows(got, one_process(path, count), what=f"{name}, {count} rows")


@pytest.mark.parametrize("name", sampled(TWO_RANKS, "fsdp", "ep", "tp", "pp"))
def test_two_ranks(name, family_checkpoint, one_process) -> None:
    layouts = {name: TWO_RANKS[name]}
    check_layouts(2, layouts, family_checkpoint("qwen3_moe"), range(6), one_process)


@pytest.mark.parametrize("name", sampled(THREE_RANKS, "fsdp", "ep, uneven", "pp"))
def test_three_ranks(name, family_checkpoint, one_process) -> None:
    layouts = {name: THREE_RANKS[name]}
    check_layouts(3, layouts, family_checkpoint("qwen3_moe"), range(8), one_process)


@pytest.mark.parametrize("name", sampled(FOUR_RANKS, "fsdp 2, ep 2, dense shared"))
def test_four_ranks(name, family_checkpoint, one_process) -> None:
    layouts = {name: FOUR_RANKS[name]}
    counts = range(10) if name in ("fsdp", "ep", "fsdp 2, ep 2, dense shared") else [1, 5, 9]
    check_layouts(4, layouts, family_checkpoint("qwen3_moe"), counts, one_process)


def test_replicas_and_idle_ranks_by_a_placement(family_checkpoint, one_process, tmp_path) -> None:
    file = tmp_path / "placement.json"
    content = {
        "format": "moe_lightning expert placement",
        "version": 1,
        "num_slots": 4,
        # Slot 3 has nothing of layer 0 and slot 1 nothing of layer 2; some experts are on several.
        "layers": {
            0: [0, 1, 2, [0, 1, 2], 0, [1, 2], 0, 0],
            1: [3, 3, [0, 1, 2, 3], 1, 2, 0, 1, 2],
            2: [0, 2, 3, [0, 2, 3], 2, 2, 2, [0, 3]],
        },
    }
    file.write_text(json.dumps(content))
    loads = tmp_path / "loads.json"
    loads.write_text(json.dumps({"loads": {n: [40, 0, 7, 7, 90, 1, 0, 13] for n in range(3)}}))
    layouts = {
        "file": {"ep_size": 4, "policy": "file", "file": str(file)},
        "balanced": {"ep_size": 4, "policy": "balanced", "loads": str(loads), "replicas": 3},
    }
    check_layouts(4, layouts, family_checkpoint("qwen3_moe"), [3, 9], one_process)


@pytest.mark.parametrize(
    "family", sampled(FAMILIES, "deepseek_v3", "gpt_oss", "granitemoe"), indirect=True
)
def test_families(family, family_checkpoint, one_process) -> None:
    path = family_checkpoint(family)
    names = ["fsdp", "ep", "pp", "tp"]
    if family == "gpt_oss":  # transformers has no tensor-parallel plan for its experts
        names.remove("tp")
        (said, _) = run_on_ranks(2, refusals, path, [TWO_RANKS["tp"]])
        for word in ("CheckpointError", "GptOss", "moe_ep"):
            assert word in said[0]
    check_layouts(2, {name: TWO_RANKS[name] for name in names}, path, [3], one_process)


def refusals(path, layouts):
    """What each layout is refused with."""
    said = []
    for layout in layouts:
        try:
            predict(path, layout, [3])
            said.append(None)
        except Exception as error:
            said.append(repr(error))
    return said


# Without what keeps ranks in step, the layouts above must not work: the tests would see it.


def predict_out_of_step(path, layout):
    """What happens to a rank where nobody waits for those that have more rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LockStep, "begin_forward", lambda self: None)
        patch.setattr(LockStep, "idle_until_all_are_done", lambda self, idle_forward: None)
        try:
            predict(path, {**layout, "timeout_s": 2}, [3], batch_size=1)
        except Exception as error:  # a rank waits in vain, or the other one's messages are wrong
            return type(error).__name__
    return None


@pytest.mark.parametrize("name", sampled(["fsdp", "ep", "experts shared only"], "ep"))
def test_a_missing_rank_would_be_seen(name, family_checkpoint) -> None:
    seen = run_on_ranks(2, predict_out_of_step, family_checkpoint("qwen3_moe"), TWO_RANKS[name])
    assert any(seen), "ranks with unequal rows were not in need of each other"


# Ways of computing.


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"experts_backend": "cpu_half"}, 2e-3),  # experts rounded to 11 bits, on each side alike
        ({"experts_backend": "cpu_int8"}, 5e-2),  # rounded to 8 bits; sums in another order
        ({"dtype": "bfloat16"}, 5e-2),  # 8 bits in every sum, in another order
    ],
    ids=["half", "int8", "bfloat16"],
)
def test_backends_and_precision(options, tolerance, family_checkpoint) -> None:
    path = family_checkpoint("qwen3_moe")
    options = {**options, "task": Score()}
    (expected,) = predict(path, None, [5], **options)
    names = ["ep", "pp", "a copy each"]
    if "dtype" in options:
        names += ["fsdp", "tp"]
    layouts = [TWO_RANKS[name] for name in names]
    results = run_on_ranks(2, predict_layouts, path, layouts, [5], options)
    for number, name in enumerate(names):
        rows = together([r[number][0] for r in results], copies=copies(layouts[number], 2))
        check_rows(rows, expected, what=name, tolerance=tolerance)


def test_wire_precision_and_overlap(family_checkpoint, one_process) -> None:
    path = family_checkpoint("qwen3_moe")
    expected = one_process(path, 5)
    overlap = {"ep_size": 2, "overlap_chunks": 3}
    wire = {"ep_size": 2, "wire_dtype": "bfloat16"}
    results = run_on_ranks(2, predict_layouts, path, [overlap, wire], [5])
    check_rows(together([r[0][0] for r in results]), expected, what="overlap")
    rounded = together([r[1][0] for r in results])
    score = [row["logprob"] for row in expected.values()]
    got = [rounded[name]["logprob"] for name in expected]
    assert got == pytest.approx(score, rel=2e-2)  # 8 bits of each row that travelled
    assert got != pytest.approx(score, rel=1e-7), "nothing was rounded"


# What a run writes.

FILE_ROWS = [
    *ragged_rows(11),
    {"id": "bad", "prompt": 5},
    "no JSON",
    {"id": "last", "prompt": "to be or not to be"},
]
NO_ROWS = []


@pytest.fixture(scope="module")
def file_of(tmp_path_factory):
    """A file of rows, and what one process writes for it."""
    kept = {}

    def file_of(name, rows, path):
        if name not in kept:
            directory = tmp_path_factory.mktemp(name)
            input = directory / "in.jsonl"
            lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
            input.write_text("".join(f"{line}\n" for line in lines))
            predict_file(path, None, directory / "one", input)
            kept[name] = input, directory / "one"
        return kept[name]

    return file_of


LAYOUTS_OF_FILES = {name: TWO_RANKS[name] for name in ("fsdp", "ep", "tp", "pp")}


def check_files(world, layouts, path, file_of, name, rows, tmp_path):
    input, one = file_of(name, rows, path)
    errors = run_on_ranks(world, predict_files, path, list(layouts.values()), tmp_path, input)
    num_errors = len(read_lines(one / "errors.jsonl"))
    assert errors == [[num_errors] * len(layouts)] * world
    expected = read_lines(one / "predictions.jsonl")
    for number, layout_name in enumerate(layouts):
        directory = tmp_path / str(number)
        assert not (directory / "parts").exists()
        got = read_lines(directory / "predictions.jsonl")
        assert [row["id"] for row in got] == [row["id"] for row in expected]
        for row, other in zip(got, expected, strict=True):
            check_row(row, other, what=layout_name)
        assert read_lines(directory / "errors.jsonl") == read_lines(one / "errors.jsonl")
        check_run(directory, one, world)
        check_loads(directory, one)


def check_run(directory, one, world):
    run, other = (json.loads((d / "run.json").read_text()) for d in (directory, one))
    counts = [name for name in other if name.startswith("num_")]
    assert counts
    assert {name: run[name] for name in counts} == {name: other[name] for name in counts}
    assert run["exit_reason"] == "finished"
    assert run["strategy"] == "ShardedStrategy"
    assert run["world_size"] == world
    assert math.prod(map(int, re.findall(r"(?:pp|replicate|fsdp|tp) (\d+)", run["mesh"]))) == world


def check_loads(directory, one):
    # Neither is written where there were no rows.
    files = [d / "routing_balance.json" for d in (directory, one)]
    loads, others = (json.loads(f.read_text())["loads"] if f.exists() else {} for f in files)
    assert loads == others


def test_files_of_two_ranks(family_checkpoint, file_of, tmp_path) -> None:
    path = family_checkpoint("qwen3_moe")
    check_files(2, LAYOUTS_OF_FILES, path, file_of, "rows", FILE_ROWS, tmp_path)


def test_files_of_four_ranks(family_checkpoint, file_of, tmp_path) -> None:
    names = ("hsdp, ep", "tp, ep", "tp, pp")
    layouts = {name: FOUR_RANKS[name] for name in names}
    path = family_checkpoint("qwen3_moe")
    check_files(4, layouts, path, file_of, "rows", FILE_ROWS, tmp_path)


def test_a_file_without_rows(family_checkpoint, file_of, tmp_path) -> None:
    path = family_checkpoint("qwen3_moe")
    check_files(2, LAYOUTS_OF_FILES, path, file_of, "none", NO_ROWS, tmp_path)


def test_dense_layers_come_first_on_a_stage(family_checkpoint, file_of, tmp_path) -> None:
    # DeepSeek's first layer is dense: of three stages, the first has no MoE layer at all.
    path = family_checkpoint("deepseek_v3")
    check_files(3, {"pp": {"pp_size": 3}}, path, file_of, "dense", ragged_rows(3), tmp_path)


# Before and after a fit of the same trainer.


class RowsSeen(L.Callback):
    def __init__(self):
        self.rows = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rows += [tuple(row) for row in batch["input_ids"].tolist()]


def predict_and_fit(path):
    """Rows of a fit after a predict, and what predict says before and after."""
    seen = RowsSeen()
    trainer = trainer_of({}, max_epochs=1, callbacks=[seen])
    module = MoELightningModule(str(path), task=Score())
    answers = []

    def score():
        loader = DataLoader(ragged_rows(3), batch_size=1, collate_fn=list)
        answers.append(
            {row["id"]: row for batch in trainer.predict(module, loader) for row in batch}
        )

    score()
    ids = torch.arange(4, 52).view(8, 6)
    trainer.fit(
        module, DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=2)
    )
    score()
    return seen.rows, answers


def test_fit_after_predict_deals_rows_out(family_checkpoint, one_process) -> None:
    path = family_checkpoint("qwen3_moe")
    (rows, answers), (others, more) = run_on_ranks(2, predict_and_fit, path)
    assert len(rows) == len(others) == 4
    assert not set(rows) & set(others)
    before, after = (together(each) for each in zip(answers, more, strict=True))
    expected = one_process(path, 3)
    for name, row in expected.items():
        assert before[name]["logprob"] == pytest.approx(row["logprob"], abs=1e-4)
        assert after[name]["logprob"] != pytest.approx(row["logprob"], abs=1e-2), "it was trained"


# What a user's own dataloader gives.


def predict_prompts(path, options, prompts):
    """Ids and scores of plain prompts, one a batch, with a progress bar."""
    trainer = trainer_of(options, enable_progress_bar=True, callbacks=[RowProgressBar()])
    module = MoELightningModule(str(path), task=Score())
    batches = trainer.predict(module, DataLoader(prompts, batch_size=1))
    return [(row["id"], row["logprob"]) for batch in batches for row in batch], len(batches)


def test_rows_without_ids_are_numbered_over_all_ranks(family_checkpoint) -> None:
    path = family_checkpoint("qwen3_moe")
    prompts = ["to be", "or not", "that is the question", "whether", "tis nobler"]
    expected, _ = predict_prompts(path, None, prompts)
    assert [number for number, _ in expected] == [0, 1, 2, 3, 4]
    (left, num_left), (right, num_right) = run_on_ranks(2, predict_prompts, path, {}, prompts)
    assert num_left == num_right == 3  # the second rank's last batch has no rows
    assert [number for number, _ in left] == [0, 2, 4]
    assert [number for number, _ in right] == [1, 3]
    scores = [score for _, score in sorted(left + right)]
    assert scores == pytest.approx([score for _, score in expected], abs=1e-4)


# Refusals that need the model or the ranks; every rank raises, before any weight is read.


def refused_fit(path, layout):
    """What a fit is refused with."""
    try:
        trainer = trainer_of(layout, max_steps=1)
        trainer.fit(MoELightningModule(str(path)), DataLoader([{"input_ids": torch.ones(4)}]))
    except UsageError as error:
        return str(error)
    return None


def test_layouts_that_do_not_fit_the_model_are_refused(family_checkpoint) -> None:
    path = family_checkpoint("qwen3_moe")  # 4 heads and 2 of keys, 3 layers, 8 experts
    wrong = {
        "num_attention_heads is 4": {"tp_size": 3},
        "ep_size is 2": {"ep_size": 2},
        "must be the number of ranks, 3": {"fsdp_size": 2},
        "ep_size is 1": {"policy": "round_robin"},
        "no-such-file": {"ep_size": 3, "policy": "file", "file": "no-such-file.json"},
    }
    said = run_on_ranks(3, refusals, path, list(wrong.values()))
    assert said[0] == said[1] == said[2]
    for message, words in zip(said[0], wrong, strict=True):
        assert message.startswith("UsageError")
        assert words in message
    (said, *others) = run_on_ranks(4, refusals, path, [{"pp_size": 4}, {"tp_size": 4}])
    assert "has 3 layers" in said[0]
    assert "num_key_value_heads is 2" in said[1]
    assert all(other == said for other in others)


@pytest.mark.parametrize(
    ("layout", "words"),
    [({"pp_size": 2}, "pipeline parallelism"), ({"dense": "replicated"}, "dense is replicated")],
)
def test_layouts_that_do_not_train_are_refused(layout, words, family_checkpoint) -> None:
    said = run_on_ranks(2, refused_fit, family_checkpoint("qwen3_moe"), layout)
    assert said[0] == said[1]
    assert words in said[0]
