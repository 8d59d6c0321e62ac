"""``predict`` with placed experts from the command line: the rows of one device, and refusals."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from report_files import JOB, REPORT

from moe_lightning.cli.configs import config_directory
from moe_lightning.placement import ExpertPlacement

PROMPTS = ["To be", "or not to be, that is the question", "é", "Whether 'tis nobler", "in", "the"]
SLOTS = ("--trainer.strategy", "moe_placement", "--trainer.strategy.slots")
PLACEMENT = ("--trainer.strategy", "moe_placement")
MAX_LINES = 15

WAYS = {
    "a name and devices": [*PLACEMENT, "--trainer.devices", 2],
    "a name with =": ["--trainer.strategy=moe_placement", "--trainer.devices=3"],
    "a name and slots": [*SLOTS, "[cpu,cpu,cpu]"],
    "a class and slots": [
        *("--trainer.strategy", "PlacementStrategy"),
        *("--trainer.strategy.slots", "[cpu, cpu, cpu]"),
    ],
    "a class without options": ["--trainer.strategy=PlacementStrategy", "--trainer.devices=2"],
    "a class with its module": [
        "--trainer.strategy=moe_lightning.PlacementStrategy",
        "--trainer.strategy.slots=[cpu,cpu]",
    ],
    "a name, a policy and the trainer's devices": [
        *(*PLACEMENT, "--trainer.devices", 4),
        *("--trainer.strategy.policy", "round_robin"),
    ],
    "slots as JSON": [*SLOTS, '["cpu", "cpu"]'],
    "slots appended": [
        *(*PLACEMENT, "--trainer.strategy.slots+=cpu", "--trainer.strategy.slots+=cpu"),
    ],
    "the shipped config": ["--config", "placement.yaml"],
    "the shipped config, changed": [
        *("--config", "placement.yaml", "--trainer.strategy.slots", "[cpu,cpu,cpu]"),
        *("--trainer.strategy.policy", "round_robin", "--trainer.strategy.threads", 1),
    ],
}


@pytest.fixture
def predict_rows(run, tiny, write_rows):
    """``predict`` on six rows with the tiny checkpoint; what is given comes first."""
    rows = [{"id": n, "prompt": prompt} for n, prompt in enumerate(PROMPTS)]
    write_rows("in.jsonl", rows)
    options = ("--data.input", "in.jsonl", "--model.task.max_new_tokens", 6)

    def predict_rows(*arguments, output_dir="out"):
        common = ("--model.checkpoint", tiny, "--output_dir", output_dir, *options)
        return run("predict", *arguments, *common)

    return predict_rows


@pytest.fixture
def single(predict_rows):
    """What one device predicts, in ``single``."""
    finished = predict_rows(output_dir="single")
    assert finished.code == 0, finished.err
    assert not Path("single/placement.json").exists()
    return Path("single/predictions.jsonl").read_bytes()


def placement_in(directory):
    return ExpertPlacement.load(Path(directory) / "placement.json")


@pytest.mark.parametrize("name", WAYS)
def test_every_way_to_ask_for_it_gives_the_rows_of_one_device(predict_rows, single, name) -> None:
    finished = predict_rows(*WAYS[name])
    assert finished.code == 0, finished.err
    assert Path("out/predictions.jsonl").read_bytes() == single
    left = {path.name for path in Path("out").iterdir()}
    assert left - REPORT - JOB == {"predictions.jsonl", "run.json", "config.yaml", "placement.json"}
    report = json.loads(Path("out/run.json").read_text())
    num_slots = placement_in("out").num_slots
    assert (report["strategy"], report["world_size"]) == ("PlacementStrategy", 1)
    assert len(report["devices"]) == num_slots > 1


def test_the_slots_and_the_policy_are_those_asked_for(predict_rows) -> None:
    predict_rows(*SLOTS, "[cpu,cpu,cpu]", "--trainer.strategy.policy", "round_robin")
    # Four experts in each of two layers.
    assert placement_in("out").slots == {layer: ((0,), (1,), (2,), (0,)) for layer in (0, 1)}


@pytest.mark.parametrize("task", ["Score", "Embed"])
def test_numbers_are_those_of_one_device(predict, write_rows, read_rows, task) -> None:
    write_rows("in.jsonl", [{"id": n, "prompt": prompt} for n, prompt in enumerate(PROMPTS)])
    common = ("--data.input", "in.jsonl", "--model.task", task)
    assert predict(*common, "--output_dir", "single").code == 0
    assert predict(*common, *SLOTS, "[cpu,cpu,cpu]").code == 0
    key = {"Score": "logprob", "Embed": "embedding"}[task]
    rows, want = (read_rows(f"{name}/predictions.jsonl") for name in ("out", "single"))
    assert len(rows) == len(PROMPTS)
    for row, other in zip(rows, want, strict=True):
        assert row["id"] == other["id"]
        # fp32 sums in another order.
        assert row[key] == pytest.approx(other[key], abs=1e-5)


def test_the_placement_of_a_run_can_be_given_back(predict_rows, single) -> None:
    predict_rows(*SLOTS, "[cpu,cpu,cpu]", "--trainer.strategy.policy", "round_robin")
    first = Path("out/placement.json").read_bytes()
    for policy in ([], ["--trainer.strategy.policy", "file"]):
        finished = predict_rows(
            *(*SLOTS, "[cpu,cpu,cpu]", *policy, "--trainer.strategy.file", "out/placement.json"),
            output_dir="again",
        )
        assert finished.code == 0, finished.err
        assert Path("again/placement.json").read_bytes() == first
        assert Path("again/predictions.jsonl").read_bytes() == single


def test_a_placement_written_by_hand_with_replicas_and_empty_slots(predict_rows, single) -> None:
    Path("mine.json").write_text(
        '{"format": "moe_lightning expert placement", "version": 1, "num_slots": 4,'
        ' "layers": {"0": [3, [1, 3], 1, 3], "1": [0, [0, 1, 3], 3, 1]}}'
    )
    finished = predict_rows(*SLOTS, "[cpu,cpu,cpu,cpu]", "--trainer.strategy.file", "mine.json")
    assert finished.code == 0, finished.err
    assert Path("out/predictions.jsonl").read_bytes() == single


def test_a_placement_balanced_by_loads_with_replicas(predict_rows, single) -> None:
    Path("loads.json").write_text('{"loads": {"0": [9, 1, 1, 1], "1": [1, 1, 1, 9]}}')
    finished = predict_rows(
        *(*SLOTS, "[cpu,cpu]", "--trainer.strategy.loads", "loads.json"),
        *("--trainer.strategy.replicas", 1),
    )
    assert finished.code == 0, finished.err
    assert Path("out/predictions.jsonl").read_bytes() == single
    # The busy expert of each layer is on both slots.
    slots = placement_in("out").slots
    assert slots[0][0] == slots[1][3] == (0, 1)
    assert placement_in("out").num_replicas == 2


def test_the_config_of_a_run_repeats_it(predict_rows, run, single) -> None:
    predict_rows(*SLOTS, "[cpu,cpu,cpu]", "--trainer.strategy.policy", "round_robin")
    first = Path("out/placement.json").read_bytes()
    finished = run("predict", "--config", "out/config.yaml", "--output_dir", "again")
    assert finished.code == 0, finished.err
    assert Path("again/predictions.jsonl").read_bytes() == single
    assert Path("again/placement.json").read_bytes() == first


def test_the_shipped_config_gives_the_rows_of_single_device_on_the_demo(run) -> None:
    for name in ("single_device", "placement"):
        finished = run(
            *("predict", "--config", f"{name}.yaml", "--data.limit_rows", 6),
            *("--model.task.max_new_tokens", 16),
        )
        assert finished.code == 0, finished.err
    placed, single = (
        Path("outputs", name, "predictions.jsonl").read_bytes()
        for name in ("placement", "single_device")
    )
    assert len(placed.splitlines()) == 6
    assert placed == single


@pytest.mark.skipif(torch.cuda.is_available(), reason="auto is then every GPU")
def test_the_shipped_config_has_two_slots_without_a_gpu(predict_rows) -> None:
    assert predict_rows("--config", "placement.yaml").code == 0
    assert placement_in("out").num_slots == 2


def test_the_shipped_config_says_every_option_of_the_strategy(run) -> None:
    finished = run("predict", "--config", "placement.yaml", "--print_config")
    every = yaml.safe_load(finished.out)["trainer"]["strategy"]["init_args"]
    shipped = (config_directory() / "placement.yaml").read_text()
    assert yaml.safe_load(shipped)["trainer"]["strategy"]["init_args"] == every


def test_bad_rows_do_not_stop_the_others(predict, write_rows, read_rows) -> None:
    write_rows("in.jsonl", [{"id": 1, "prompt": "To be"}, "not json", {"id": 3, "prompt": "or"}])
    finished = predict("--data.input", "in.jsonl", *SLOTS, "[cpu,cpu]")
    assert finished.code == 3, finished.err
    assert [row["id"] for row in read_rows("out/predictions.jsonl")] == [1, 3]
    assert len(read_rows("out/errors.jsonl")) == 1


def test_zero_rows(predict) -> None:
    Path("in.jsonl").write_text("")
    finished = predict("--data.input", "in.jsonl", *SLOTS, "[cpu,cpu]")
    assert finished.code == 0, finished.err
    assert Path("out/predictions.jsonl").read_bytes() == b""


# Refusals.


def check(finished, *words):
    """Exit code 2, one message with these words in few lines, and nothing predicted."""
    assert finished.code == 2, finished.err
    assert "Traceback" not in finished.err
    assert finished.err.startswith("error: "), finished.err
    assert finished.err.count("error: ") == 1
    assert len(finished.err.splitlines()) <= MAX_LINES, finished.err
    for word in words:
        assert word in finished.err, finished.err
    for noise in ("<class", "Namespace(", "NestedArg", "init_args"):
        assert noise not in finished.err, finished.err
    for name in ("predictions.jsonl", "placement.json", "parts"):
        assert not Path("out", name).exists()


WRONG = {
    "a GPU that is not there": ([*SLOTS, "[cpu, cuda:9]"], ["'cuda:9'", "slots", "cpu"]),
    "no device": ([*SLOTS, "[banana]"], ["'banana'", "slots", "cpu"]),
    "the accelerator's name": ([*SLOTS, "[gpu]"], ["'gpu'", "slots", "cpu"]),
    "no slots": ([*SLOTS, "[]"], ["trainer.strategy.slots", "at least one device"]),
    "a word for slots": ([*SLOTS, "banana"], ["slots", "banana", "list"]),
    "an unknown policy": (
        [*PLACEMENT, "--trainer.strategy.policy", "best"],
        ["policy", "best", "linear", "balanced"],
    ),
    "file without its file": (
        [*PLACEMENT, "--trainer.strategy.policy", "file"],
        ["policy=file", "trainer.strategy.file", "placement.json"],
    ),
    "balanced without its loads": (
        [*PLACEMENT, "--trainer.strategy.policy=balanced"],
        ["policy=balanced", "trainer.strategy.loads", "routing_balance.json"],
    ),
    "a file that is missing": ([*PLACEMENT, "--trainer.strategy.file", "nope.json"], ["nope.json"]),
    "loads that are missing": ([*PLACEMENT, "--trainer.strategy.loads=nope.json"], ["nope.json"]),
    "replicas without loads": (
        [*PLACEMENT, "--trainer.strategy.replicas", 2],
        ["trainer.strategy.replicas", "balanced"],
    ),
    "no threads": (
        [*PLACEMENT, "--trainer.strategy.threads", 0],
        ["trainer.strategy.threads=0", "at least 1"],
    ),
    "an option that does not exist": ([*PLACEMENT, "--trainer.strategy.polcy=linear"], ["polcy"]),
    "a strategy that does not exist": (["--trainer.strategy", "moe_placment"], ["moe_placment"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_option_is_named(predict_rows, name) -> None:
    arguments, words = WRONG[name]
    check(predict_rows(*arguments), *words)


HEAD = '{"format": "moe_lightning expert placement", "version": 1, "num_slots": 2, '
WRONG_FILES = {
    "not JSON": ("{", ["not JSON"]),
    "something else": ('{"loads": {}}', ["format"]),
    "other layers": (
        HEAD + '"layers": {"0": [0, 1, 0, 1]}}',
        ["layers 0,", "0-1", "another model"],
    ),
    "other experts": (
        HEAD + '"layers": {"0": [0, 1], "1": [0, 1]}}',
        ["layer 0 has 2 experts", "has 4", "another model"],
    ),
    "more slots": (
        HEAD.replace("2, ", "3, ") + '"layers": {"0": [0, 1, 2, 1], "1": [0, 0, 0, 0]}}',
        ["3 slots", "there are 2"],
    ),
    "a slot that does not exist": (
        HEAD + '"layers": {"0": [0, 1, 7, 1], "1": [0, 0, 0, 0]}}',
        ["layer 0, expert 2", "slot 7"],
    ),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_wrong_placement_is_named(predict_rows, name) -> None:
    text, words = WRONG_FILES[name]
    Path("mine.json").write_text(text)
    finished = predict_rows(*SLOTS, "[cpu,cpu]", "--trainer.strategy.file", "mine.json")
    check(finished, "mine.json", *words)


def test_a_device_that_is_too_small_is_said_before_anything_is_read(
    predict_rows, monkeypatch
) -> None:
    monkeypatch.setattr(
        "moe_lightning.strategies.placement_strategy.free_bytes", lambda device: 200_000_000
    )
    check(predict_rows(*SLOTS, "[cpu,cpu]"), "not fit", " GB", "--model.dtype bfloat16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none")
def test_a_gpu_that_is_not_there_is_said_so(predict_rows) -> None:
    check(predict_rows(*PLACEMENT, "--trainer.accelerator", "gpu"), "gpu")


def test_fit_is_refused_with_the_strategies_that_train(run, tiny) -> None:
    Path("train.txt").write_text("so long lives this and this gives life to thee\n" * 200)
    finished = run(
        *("fit", "--model.checkpoint", tiny, "--output_dir", "out", "--trainer.max_steps", 1),
        *("--data.train", "train.txt", "--data.sequence_length", 32, *SLOTS, "[cpu,cpu]"),
    )
    check(finished, "moe_placement", "inference", "--trainer.strategy auto")
    assert not list(Path().rglob("*.ckpt"))


def test_a_training_checkpoint_is_refused_with_what_to_do(predict_rows) -> None:
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.6"}, "some.ckpt")
    finished = predict_rows(*SLOTS, "[cpu,cpu]", "--ckpt_path", "some.ckpt")
    check(finished, "--ckpt_path", "moe_placement", "moe_lightning export", "--model.checkpoint")
