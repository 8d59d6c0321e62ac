"""Random checkpoints load in unmodified transformers without a missing or unexpected tensor."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_lightning.demo.random_checkpoint import count_parameters, make_checkpoint
from moe_lightning.demo.random_tokenizer import make_tokenizer
from moe_lightning.errors import UsageError

FAMILIES = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss",
    "glm4_moe",
    "granitemoe",
    "phimoe",
]
TINY = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_experts": 4,
    "expert_size": 24,
    "num_heads": 4,
    "num_kv_heads": 2,
    "vocab_size": 300,
    "max_positions": 64,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_completely_and_answers(tmp_path, family):
    path = make_checkpoint(tmp_path / family, family=family, **TINY)
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values())
    tokenizer = AutoTokenizer.from_pretrained(path)
    inputs = tokenizer("Shall I compare thee", return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.isfinite().all()
    assert logits.std() > 0.1
    # A bias or sink of zero would hide that somebody forgot to load it.
    for name, tensor in model.state_dict().items():
        assert tensor.count_nonzero() > 0, name
        if tensor.ndim == 1 and "inv_freq" not in name:
            assert tensor.std() > 0.02, name


def test_weights_depend_on_the_seed_alone(tmp_path):
    for name, options in {
        "a": {},
        "same": {"shard_bytes": 50_000},
        "other": {"seed": 1},
    }.items():
        make_checkpoint(tmp_path / name, **TINY, **options)
    a, same, other = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        for name in ("a", "same", "other")
    )
    assert all(torch.equal(a[name], same[name]) for name in a)
    assert not any(torch.equal(a[name], other[name]) for name in a)
    index = json.loads((tmp_path / "same" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 1
    assert {p.name for p in (tmp_path / "same").glob("*.safetensors")} == files


@pytest.mark.parametrize("tie", [True, False])
def test_tied_weights_are_saved_once(tmp_path, tie):
    path = make_checkpoint(tmp_path / "m", **TINY, tie=tie)
    with safe_open(path / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) != tie  # noqa: SIM118
    model = AutoModelForCausalLM.from_pretrained(path)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie


def test_half_precision_is_saved_as_such(tmp_path):
    path = make_checkpoint(tmp_path / "m", **TINY, dtype="bfloat16")
    assert AutoModelForCausalLM.from_pretrained(path, dtype="auto").dtype == torch.bfloat16


def test_target_params_are_reached(tmp_path):
    path = make_checkpoint(tmp_path / "m", **TINY, target_params="1.5M")
    model = AutoModelForCausalLM.from_pretrained(path)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1.5e6, rel=0.02)
    assert count_parameters(model.config) == sum(p.numel() for p in model.parameters())


def test_given_tokenizer_is_used(tmp_path):
    make_tokenizer(280, max_positions=64).save_pretrained(tmp_path / "words")
    path = make_checkpoint(tmp_path / "m", **TINY, tokenizer=tmp_path / "words")
    assert len(AutoTokenizer.from_pretrained(path)) == 280
    with pytest.raises(UsageError, match="has 280 tokens and the model only 270"):
        make_checkpoint(
            tmp_path / "n", **(TINY | {"vocab_size": 270}), tokenizer=tmp_path / "words"
        )


@pytest.mark.parametrize("vocab_size", [260, 261, 300, 2048, 40_000])
def test_tokenizer_has_the_size_asked_for_and_loses_nothing(vocab_size):
    tokenizer = make_tokenizer(vocab_size, max_positions=64)
    assert len(tokenizer) == vocab_size
    text = "The quality of mercy is not strain'd — naïve 漢字\n\t 🙂"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert max(ids) < vocab_size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "nonsense"}, "family 'nonsense' is not a causal language model"),
        ({"family": "llama"}, "LlamaConfig has no setting for num_experts"),
        ({"vocab_size": 100}, "vocab_size 100 is too small"),
        ({"num_heads": 5}, "hidden_size 32 is not a multiple of num_heads 5"),
        ({"num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"top_k": 5}, "top_k 5 is more than num_experts 4"),
        ({"num_layers": 0}, "num_layers is 0: give a positive number"),
        ({"target_params": "many"}, "target_params 'many' is not a count"),
        ({"overrides": {"no_such": 1}}, r"overrides \['no_such'\]"),
        ({"tokenizer": "none"}, "tokenizer 'none' is not a directory"),
    ],
)
def test_sizes_that_cannot_work_are_refused(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        make_checkpoint(tmp_path / "m", **(TINY | options))
    assert not list(tmp_path.iterdir())


def test_existing_checkpoint_is_never_overwritten(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="is not an empty directory"):
        make_checkpoint(tmp_path, **TINY)
