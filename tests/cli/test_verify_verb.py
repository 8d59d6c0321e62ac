"""``verify``: passes for what is right, and names the place of what was made wrong on purpose.

Faults of weights are in a damaged copy of the checkpoint, which only the configured side reads.
"""

import json
import shutil

import pytest
import torch
from families import FAMILIES
from safetensors.torch import load_file, save_file
from sampling import sampled
from transformers import AutoTokenizer

from moe_lightning import MoELightningModule
from moe_lightning.demo.random_checkpoint import make_checkpoint
from moe_lightning.placement import ExpertPlacement

PROMPTS = [
    "To be",
    "or not to be, that is the question",
    "é",
    "Whether 'tis nobler in the mind to suffer the slings and arrows",
    "of outrageous fortune",
    "Or to take arms against a sea of troubles",
]
EXPERT = "model.layers.{}.mlp.experts.{}.{}.weight"
PLACEMENT = ("--trainer.strategy", "moe_placement", "--trainer.strategy.slots", "[cpu,cpu]")


@pytest.fixture(scope="module")
def square(tmp_path_factory):
    """``square(family)``: a checkpoint whose experts are as wide as the model."""
    made = {}

    def square(family="qwen3_moe"):
        if family not in made:
            made[family] = make_checkpoint(
                tmp_path_factory.mktemp("square") / family,
                family=family,
                hidden_size=32,
                num_layers=2,
                num_experts=8,
                top_k=2,
                expert_size=32,
                num_heads=4,
                num_kv_heads=2,
                vocab_size=512,
                max_positions=128,
            )
        return made[family]

    return square


@pytest.fixture
def damaged(square, tmp_path):
    """A copy of a checkpoint, with something done to its tensors or its config."""

    def damaged(do, family="qwen3_moe", **config):
        copy = shutil.copytree(square(family), tmp_path / "damaged")
        tensors = load_file(copy / "model.safetensors")
        do(tensors)
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        fields = json.loads((copy / "config.json").read_text())
        assert config.keys() <= fields.keys(), "a field that the model does not have"
        (copy / "config.json").write_text(json.dumps(fields | config))
        return copy

    return damaged


@pytest.fixture
def verify(run, write_rows):
    """Run ``verify`` on six rows; returns what it printed, and verify.json."""

    def verify(checkpoint, *options, code=0):
        rows = [{"id": f"row-{n}", "prompt": prompt} for n, prompt in enumerate(PROMPTS)]
        write_rows("in.jsonl", rows)
        words = ("--model.checkpoint", checkpoint, "--data.input", "in.jsonl")
        finished = run(
            *("verify", *words, "--output_dir", "out", "--max_new_tokens", 3),
            *("--data.max_batch_tokens", 200, *options),
        )
        assert finished.code == code, finished.err + finished.out
        with open("out/verify.json") as file:
            return finished.out, json.load(file)

    return verify


def test_a_single_device_passes(verify, square) -> None:
    out, found = verify(square())
    assert "PASSED" in out
    assert "greedy tokens equal: 100.0 %" in out
    assert found["passed"]
    assert found["faults"] == []
    assert found["num_rows"] == 6
    assert set(found["layers"]) == {"0", "1"}
    assert found["greedy_tokens"]["num"] == 18
    assert found["greedy_tokens"]["share_equal"] == 1
    # Every position of every row is compared, and nothing but rounding is there.
    num_tokens = found["num_prompt_tokens"]
    assert found["logits"]["end_to_end"]["num_positions"] == num_tokens > 100
    for layer in found["layers"].values():
        for part in ("dense", "router", "experts", "end_to_end"):
            assert layer[part]["num_positions"] == num_tokens
            assert layer[part]["relative"] < 1e-5


@pytest.mark.parametrize("family", sampled(FAMILIES, "gpt_oss", "deepseek_v3", "phimoe"))
def test_every_family_passes(verify, square, family) -> None:
    _, found = verify(square(family))
    assert found["passed"]
    judged = [layer for layer in found["layers"].values() if layer["experts"] is not None]
    assert judged
    assert all(layer["experts"]["num_positions"] > 100 for layer in judged)


@pytest.mark.parametrize(
    ("options", "least", "tolerance"),
    [
        (("--model.experts_backend", "cpu_half"), 0.0, 5.1e-3),
        (("--model.experts_backend", "cpu_int8"), 1e-3, 0.1001),
        (("--model.dtype", "bfloat16"), 1e-4, 0.05),
    ],
)
def test_lossy_settings_pass_and_show_their_cost(verify, square, options, least, tolerance) -> None:
    _, found = verify(square(), *options)
    assert found["tolerance"]["part"] == pytest.approx(tolerance)
    for layer in found["layers"].values():
        assert least <= layer["experts"]["relative"] < tolerance


def test_a_smaller_tolerance_fails_what_is_lossy(verify, square) -> None:
    options = ("--model.experts_backend", "cpu_int8", "--tolerance", 1e-4)
    out, found = verify(square(), *options, code=1)
    assert "FAILED" in out
    assert found["tolerance"]["reasons"] == ["--tolerance"]
    assert found["faults"][0]["layer"] == 0


def swap(one, other):
    """Exchange two experts of layer 1."""

    def do(tensors):
        for name in ("gate_proj", "up_proj", "down_proj"):
            a, b = EXPERT.format(1, one, name), EXPERT.format(1, other, name)
            tensors[a], tensors[b] = tensors[b], tensors[a]

    return do


def test_two_swapped_experts_are_named(verify, square, damaged) -> None:
    options = ("--reference.checkpoint", square())
    out, found = verify(damaged(swap(2, 5)), *options, code=1)
    faults = {tuple(f["experts"]): f for f in found["faults"] if f["place"] == "experts"}
    assert set(faults) == {(2,), (5,)}
    assert {fault["layer"] for fault in faults.values()} == {1}
    assert "computes what expert 5 should" in faults[2,]["text"]
    assert "computes what expert 2 should" in faults[5,]["text"]
    assert all(fault["num_rows"] > 0 for fault in faults.values())
    assert all(example["id"].startswith("row-") for example in faults[2,]["examples"])
    # Nothing before it is wrong, and nothing after it is blamed.
    assert found["faults"][0]["place"] == "experts"
    assert "layer 1" in found["first_difference"]
    assert "first difference: layer 1, expert" in out


@pytest.mark.parametrize("options", [("experts_backend", "cpu_int8"), ("dtype", "bfloat16")])
def test_lossy_settings_hide_no_swap(verify, square, damaged, options) -> None:
    name, value = options
    words = ("--reference.checkpoint", square(), f"--model.{name}", value)
    _, found = verify(damaged(swap(2, 5)), *words, code=1)
    faults = [fault for fault in found["faults"] if fault["place"] == "experts"]
    assert sorted((fault["layer"], *fault["experts"]) for fault in faults) == [(1, 2), (1, 5)]


def test_a_transposed_weight_is_named(verify, square, damaged) -> None:
    def transpose(tensors):
        name = EXPERT.format(0, 6, "down_proj")
        tensors[name] = tensors[name].T.contiguous()

    _, found = verify(damaged(transpose), "--reference.checkpoint", square(), code=1)
    fault = found["faults"][0]
    assert (fault["place"], fault["layer"], fault["experts"]) == ("experts", 0, [6])
    assert [f for f in found["faults"] if f["place"] == "experts"] == [fault]


def test_a_zeroed_bias_is_named(verify, square, damaged) -> None:
    def zero(tensors):
        name = "model.layers.1.mlp.experts.down_proj_bias"
        tensors[name] = tensors[name].clone()
        assert tensors[name][3].abs().max() > 0
        tensors[name][3] = 0

    copy = damaged(zero, "gpt_oss")
    _, found = verify(copy, "--reference.checkpoint", square("gpt_oss"), code=1)
    fault = found["faults"][0]
    assert (fault["place"], fault["layer"], fault["experts"]) == ("experts", 1, [3])
    assert "the bias of its output" in fault["text"]


def test_a_wrong_normalisation_is_a_fault_of_every_router(verify, square, damaged) -> None:
    good = json.loads((square() / "config.json").read_text())["norm_topk_prob"]
    copy = damaged(lambda tensors: None, norm_topk_prob=not good)
    _, found = verify(copy, "--reference.checkpoint", square(), code=1)
    routers = [fault for fault in found["faults"] if fault["place"] == "router"]
    assert [fault["layer"] for fault in routers] == [0, 1]
    assert "look at how the top-k weights are normalised" in routers[0]["text"]
    # Experts did what they were told.
    assert not [fault for fault in found["faults"] if fault["place"] == "experts"]


def test_a_damaged_dense_weight_is_no_expert(verify, square, damaged) -> None:
    def damage(tensors):
        tensors["model.layers.1.self_attn.o_proj.weight"] *= 1.1

    _, found = verify(damaged(damage), "--reference.checkpoint", square(), code=1)
    assert [(f["place"], f["layer"]) for f in found["faults"] if f["place"] != "tokens"] == [
        ("dense", 1)
    ]


@pytest.fixture
def replicated(work):
    """A placement on two slots in which expert 4 is on both."""
    slots = ((0,), (0,), (0,), (0,), (0, 1), (1,), (1,), (1,))
    file = work / "placement.json"
    ExpertPlacement(2, {0: slots, 1: slots}).save(file)
    return file


def test_placed_experts_with_replicas_pass(verify, square, replicated) -> None:
    _, found = verify(square(), *PLACEMENT, "--trainer.strategy.file", replicated)
    assert found["passed"]
    assert found["strategy"] == "moe_placement"


def test_a_replica_that_is_wrong_alone_is_told_from_the_right_one(
    verify, square, replicated, monkeypatch
) -> None:
    load = MoELightningModule.configure_model

    def load_wrongly(module):
        is_first = module.model is None
        load(module)
        if is_first:
            shards = [s for s in module.hosted.shards if s.layer == 1 and 4 in s.expert_ids]
            assert len(shards) == 2
            with torch.no_grad():
                shards[1].experts.down_proj[shards[1].expert_ids.index(4)] *= -1

    monkeypatch.setattr(MoELightningModule, "configure_model", load_wrongly)
    options = (*PLACEMENT, "--trainer.strategy.file", replicated)
    options += ("--model.experts_backend", "grouped_mm")  # it keeps parameters as they are
    _, found = verify(square(), *options, code=1)
    (fault,) = (f for f in found["faults"] if f["place"] == "experts")
    assert (fault["layer"], fault["experts"], fault["slots"]) == (1, [4], ["1:cpu"])
    assert "The same expert on 0:cpu is right" in fault["text"]
    assert "off by a factor of -1" in fault["text"]


def test_long_prompts_are_cut_and_that_is_said(verify, square) -> None:
    out, found = verify(square(), "--max_prompt_tokens", 4)
    tokenizer = AutoTokenizer.from_pretrained(square())
    lengths = [len(tokenizer(prompt).input_ids) for prompt in PROMPTS]
    assert found["num_prompt_tokens"] == sum(min(length, 4) for length in lengths)
    assert found["num_rows_cut"] == sum(length > 4 for length in lengths) > 0
    assert "are longer than 4 tokens and were cut there" in out


def test_fewer_rows_can_be_asked_for(verify, square) -> None:
    _, found = verify(square(), "--num_rows", 2)
    assert found["num_rows"] == 2


def test_nothing_of_an_earlier_run_is_touched(verify, square, work) -> None:
    (work / "out").mkdir()
    (work / "out" / "config.yaml").write_text("mine")
    verify(square(), "--num_rows", 1, "--report", True)
    assert (work / "out" / "config.yaml").read_text() == "mine"
    assert {path.name for path in (work / "out").iterdir()} == {"config.yaml", "verify.json"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--num_rows", 0), "--num_rows is 0"),
        (("--tolerance", 0), "--tolerance is 0"),
        (("--data.input", "none.jsonl"), "no rows to compare"),
        (("--reference.device", "nowhere"), "--reference.device nowhere"),
        (("--reference.checkpoint", "demo"), "Only checkpoints of the same shape"),
    ],
)
def test_what_cannot_be_compared_is_refused(run, square, write_rows, options, words) -> None:
    write_rows("none.jsonl", [])
    common = ("--model.checkpoint", square(), "--data.input", "demo", "--output_dir", "out")
    finished = run("verify", *common, *options)
    assert finished.code == 2, finished.out
    assert words in finished.err
