"""``verify`` with workers, and over ranks: passes, and names the worker or rank of a fault."""

import json
import shutil

import pytest
from ranks import run_on_ranks
from safetensors.torch import load_file, save_file
from worker_processes import finish, torchrun

from moe_lightning.cli.main import main
from moe_lightning.demo.random_checkpoint import make_checkpoint

PROMPTS = ["To be", "or not to be, that is the question", "é", "Whether 'tis nobler", "in"]
VERB = ("-m", "moe_lightning", "verify")
RPC = ("--config", "rpc.yaml", "--trainer.strategy.num_workers", 2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(
        tmp_path_factory.mktemp("checkpoints") / "even",
        family="qwen3_moe",
        hidden_size=32,
        num_layers=2,
        num_experts=4,
        top_k=2,
        expert_size=32,
        num_heads=4,
        num_kv_heads=2,
        vocab_size=512,
        max_positions=128,
    )


@pytest.fixture
def options_of(tmp_path):
    """What every run has: ``options_of(checkpoint)``."""
    file = tmp_path / "in.jsonl"
    rows = [{"id": n, "prompt": prompt} for n, prompt in enumerate(PROMPTS)]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    def options_of(checkpoint):
        words = ("--model.checkpoint", checkpoint, "--data.input", file)
        return [*words, "--output_dir", tmp_path, "--max_new_tokens", 3]

    return options_of


@pytest.fixture
def damaged(checkpoint, tmp_path):
    """A copy of the checkpoint in which expert 3 of layer 1 has expert 0's weights."""
    copy = shutil.copytree(checkpoint, tmp_path / "damaged")
    tensors = load_file(copy / "model.safetensors")
    for name in ("gate_proj", "up_proj", "down_proj"):
        prefix = "model.layers.1.mlp.experts.{}." + name + ".weight"
        tensors[prefix.format(3)] = tensors[prefix.format(0)].clone()
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def run_verb(config, options):
    """On a rank: the verb's exit code."""
    return main(["verify", "--config", f"{config}.yaml", *map(str, options)])


def check_passed(directory):
    """verify.json of a run that found nothing."""
    found = json.loads((directory / "verify.json").read_text())
    assert found["passed"]
    assert found["num_rows"] == len(PROMPTS)
    assert found["greedy_tokens"]["num_rows"] == len(PROMPTS)
    for layer in found["layers"].values():
        for part in ("dense", "router", "experts", "end_to_end"):
            assert layer[part]["num_positions"] == found["num_prompt_tokens"]
    assert not (directory / "verify.parts").exists()
    return found


@pytest.mark.parametrize(
    ("dispatch", "combine", "least"),
    [
        pytest.param("working", "working", 0.0, marks=pytest.mark.wide),
        pytest.param("bfloat16", "bfloat16", 1e-4, marks=pytest.mark.wide),
        ("bfloat16", "int8", 1e-3),
    ],
)
def test_workers(checkpoint, options_of, tmp_path, dispatch, combine, least) -> None:
    wire = ("--trainer.strategy.dispatch_dtype", dispatch)
    wire += ("--trainer.strategy.combine_dtype", combine)
    finished = finish(*VERB, *RPC, *wire, *options_of(checkpoint))
    assert finished.returncode == 0, finished.stderr + finished.stdout
    found = check_passed(tmp_path)
    assert found["strategy"] == "moe_rpc"
    limit = found["tolerance"]["part"]
    for layer in found["layers"].values():
        assert least <= layer["experts"]["relative"] < limit


@pytest.mark.wide
def test_the_worker_of_a_wrong_expert_is_named(checkpoint, damaged, options_of, tmp_path) -> None:
    reference = ("--reference.checkpoint", checkpoint)
    finished = finish(*VERB, *RPC, *reference, *options_of(damaged))
    assert finished.returncode == 1, finished.stderr
    found = json.loads((tmp_path / "verify.json").read_text())
    fault = found["faults"][0]
    assert (fault["place"], fault["layer"], fault["experts"]) == ("experts", 1, [3])
    assert len(fault["slots"]) == 1
    assert "computes what expert 0 should" in fault["text"]


@pytest.mark.parametrize(
    ("config", "axis"),
    [
        ("fsdp", "fsdp 2"),
        ("expert_parallel", "ep 2"),
        ("tensor_parallel", "tp 2"),
        ("pipeline_parallel", "pp 2"),
    ],
)
def test_two_ranks(checkpoint, options_of, tmp_path, config, axis) -> None:
    assert run_on_ranks(2, run_verb, config, options_of(checkpoint)) == [0, 0]
    found = check_passed(tmp_path)
    assert found["world_size"] == 2
    assert axis in found["strategy_report"]["mesh"].split(" x ")


@pytest.mark.wide
def test_torchrun(checkpoint, options_of, tmp_path) -> None:
    finished = torchrun(2, *VERB, "--config", "expert_parallel.yaml", *options_of(checkpoint))
    assert finished.returncode == 0, finished.stderr + finished.stdout
    assert finished.stdout.count("PASSED") == 1
    check_passed(tmp_path)


def test_the_rank_of_a_wrong_expert_is_named(checkpoint, damaged, options_of, tmp_path) -> None:
    reference = ("--reference.checkpoint", checkpoint)
    codes = run_on_ranks(2, run_verb, "expert_parallel", [*reference, *options_of(damaged)])
    assert codes == [1, 0]  # the first rank compares
    found = json.loads((tmp_path / "verify.json").read_text())
    fault = found["faults"][0]
    assert (fault["place"], fault["layer"], fault["experts"]) == ("experts", 1, [3])
    # Contiguous halves: the last of four experts is on the last of two ranks.
    assert fault["slots"] == ["rank 1"]
