"""``plan --from``: record, plan and run again, from the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from worker_processes import torchrun

from moe_lightning.demo.random_checkpoint import make_checkpoint
from moe_lightning.placement import ExpertPlacement, save_loads
from moe_lightning.placement.recording import Recording, save_recording

NUM_EXPERTS, NUM_SLOTS = 16, 4
PLACEMENT = ("--trainer.strategy", "moe_placement", "--trainer.strategy.slots", "[cpu,cpu,cpu,cpu]")
TEXT = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer "


@pytest.fixture(scope="module")
def skewed(tmp_path_factory):
    """A random checkpoint whose router prefers a few neighbouring experts."""
    path = make_checkpoint(
        tmp_path_factory.mktemp("checkpoints") / "skewed",
        family="qwen3_moe",
        hidden_size=32,
        num_layers=2,
        num_experts=NUM_EXPERTS,
        top_k=2,
        expert_size=16,
        num_heads=4,
        num_kv_heads=2,
        vocab_size=512,
        max_positions=256,
    )
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith("mlp.gate.weight"):
                tensor[:3] *= 6  # their logits are large, of either sign
        save_file(tensors, file, metadata={"format": "pt"})
    return path


@pytest.fixture
def predict_skewed(run, skewed, write_rows):
    """``predict`` on twelve rows with the skewed checkpoint."""
    prompts = [TEXT[n:] + TEXT[: 7 * n] for n in range(12)]
    write_rows("in.jsonl", [{"id": n, "prompt": prompt} for n, prompt in enumerate(prompts)])
    common = ("--model.checkpoint", skewed, "--data.input", "in.jsonl")
    common += ("--model.task", "Generate", "--model.task.max_new_tokens", 4)

    def predict_skewed(output_dir, *arguments):
        words = [*map(str, ("predict", *arguments, *common, "--output_dir", output_dir))]
        finished = run(*words)
        assert finished.code == 0, finished.err
        return (Path(output_dir) / "predictions.jsonl").read_bytes(), words

    return predict_skewed


def slot_imbalance(directory):
    """Rows of the busiest slot over the mean, of each layer, as the run counted them."""
    seen = json.loads((Path(directory) / "routing_balance.json").read_text())
    return [max(rows) * len(rows) / sum(rows) for rows in seen["slot_loads"].values()]


def test_record_plan_run_on_a_skewed_router(run, predict_skewed) -> None:
    watched = ("--trainer.callbacks+=RoutingBalance", "--trainer.callbacks.picture=false")
    expected, _ = predict_skewed(
        "recorded", *PLACEMENT, *watched, "--trainer.callbacks.record=true"
    )
    assert min(slot_imbalance("recorded")) > 1.5
    finished = run("plan", "--from", "recorded/routing.npz", "--slots", 4, "--replicas", 4)
    assert finished.code == 0, finished.err
    assert "--trainer.strategy moe_rpc --trainer.strategy.file recorded/planned_placement.json" in (
        finished.out
    )
    file = ("--trainer.strategy.file", "recorded/planned_placement.json")
    rows, _ = predict_skewed("planned", *PLACEMENT, *file, *watched)
    assert rows == expected
    assert max(slot_imbalance("planned")) < 1.15
    placement = ExpertPlacement.load("recorded/planned_placement.json")
    assert ExpertPlacement.load("planned/placement.json") == placement
    # The same file under moe_rpc, workers on this machine.
    rpc = ("--trainer.strategy", "moe_rpc", "--trainer.strategy.num_workers", NUM_SLOTS)
    rows, _ = predict_skewed("rpc", *rpc, *file)
    assert rows == expected


@pytest.mark.wide
def test_the_same_file_under_expert_parallelism(run, predict_skewed) -> None:
    watched = ("--trainer.callbacks+=RoutingBalance", "--trainer.callbacks.record=true")
    expected, words = predict_skewed("recorded", *watched)
    finished = run("plan", "--from", "recorded/routing.npz", "--slots", 2, "--replicas", 2)
    assert finished.code == 0, finished.err
    ranks = ("--trainer.strategy", "moe_ep", "--trainer.devices", "2")
    ranks += ("--trainer.strategy.policy", "file")
    ranks += ("--trainer.strategy.file", "recorded/planned_placement.json")
    words = [*ranks, *words[words.index("--model.checkpoint") : -1], "ep"]
    finished = torchrun(2, "-m", "moe_lightning", "predict", *words)
    assert finished.returncode == 0, finished.stderr
    assert Path("ep/predictions.jsonl").read_bytes() == expected
    used = ExpertPlacement.load("ep/placement.json")
    assert used == ExpertPlacement.load("recorded/planned_placement.json")


def test_numbers_of_a_plan(run) -> None:
    both_EE = np.diag([60, 10, 20, 10])
    both_EE[0, 2] = both_EE[2, 0] = 20
    save_recording(
        "routing.npz", Recording({1: np.array([[50, 5, 5, 5], [10, 5, 15, 5]])}, {1: both_EE})
    )
    finished = run("plan", "--from=routing.npz", "--slots=2", "--replicas=1", "--json")
    assert finished.code == 0, finished.err
    report = json.loads(finished.out)
    assert (report["num_replicas"], report["num_intervals"]) == (1, 2)
    layer = report["layers"]["1"]
    # linear: 70 of 100 rows on slot 0. Then 60 as two of 30, with 20 and with 10 + 10.
    assert layer["max_over_mean_before"] == pytest.approx(1.4)
    assert layer["max_over_mean"] == pytest.approx(1.0)
    # The first interval: 25 + 5 and 25 + 10, mean 32.5. The second: 5 + 15 and 5 + 10, mean 17.5.
    assert layer["max_over_mean_worst_interval"] == pytest.approx(20 / 17.5)
    placement = ExpertPlacement.load("planned_placement.json")
    assert placement.slots[1][0] == (0, 1)
    assert placement.slots[1][1] == placement.slots[1][3] != placement.slots[1][2]
    moved = sum(len(set(new) - {e // 2}) for e, new in enumerate(placement.slots[1]))
    assert report["num_moves"] == sum(report["num_moves_by_slot"]) == moved


def test_a_current_placement_and_a_limit_of_moves(run) -> None:
    save_loads("loads.json", {0: [9, 9, 1, 1]})
    ExpertPlacement(2, {0: ((0,), (0,), (1,), (1,))}).save("now.json")
    common = ("plan", "--from", "loads.json", "--slots", 2, "--current", "now.json")
    assert run(*common, "--max_moves", 0).code == 0
    assert ExpertPlacement.load("planned_placement.json") == ExpertPlacement.load("now.json")
    finished = run(*common, "--max_moves", 2, "--to", "next.json")
    assert "before is now.json" in finished.out
    (experts,) = ExpertPlacement.load("next.json").slots.values()
    assert experts[0] != experts[1]
    assert experts[2] != experts[3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--slots", 2, "--to", "there.json"], "there.json: exists already"),
        (["--slots", 0], "slots is 0, but it must be 1 or more"),
        (["--slots", 2, "--objective", "traffic"], "the recording does not say"),
        (["--slots", 2, "--objective", "speed"], "objective"),
        (["--slots", 3, "--current", "other.json"], "other.json: has the MoE layers 7"),
        ([], "slots"),
    ],
)
def test_wrong_options_are_refused(run, options, message) -> None:
    save_loads("loads.json", {0: [9, 9, 1, 1]})
    Path("there.json").write_text("mine")
    ExpertPlacement(2, {7: ((0,), (1,))}).save("other.json")
    finished = run("plan", "--from", "loads.json", *options)
    assert finished.code == 2
    assert message in finished.err
    assert Path("there.json").read_text() == "mine"
    assert not Path("planned_placement.json").exists()


def test_a_recording_that_is_none_is_named(run) -> None:
    finished = run("plan", "--from", "nothing.npz", "--slots", 2)
    assert finished.code == 2
    assert "nothing.npz: cannot be read" in finished.err


def test_help_says_what_from_takes(run) -> None:
    finished = run("plan", "--from", "routing.npz", "--help")
    assert finished.code == 0
    assert "--replicas" in finished.out
