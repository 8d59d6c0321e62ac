"""PEFT reads what we write, and we read what PEFT writes: equal logits, equal tensors."""

import json
import warnings

import peft
import pytest
import torch
from adapted_models import CPU, adapted, attached, load, logits, merge_into, randomise, rows_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moe_lightning.errors import CheckpointError, UsageError
from moe_lightning.finetune.adapter_files import save_adapter
from moe_lightning.finetune.adapter_layout import experts_from_peft, experts_to_peft
from moe_lightning.finetune.adapter_values import initialise_adapters
from moe_lightning.finetune.lora import LoRA, adapter_names, add_adapters
from moe_lightning.modeling.seam import find_moe_layers

# Logits are up to 5. Each way is up to 3e-5 off the same model in float64, as adapters of random A
# and B are as large as the weights, and PEFT merges where we add low-rank products.
TOLERANCE = {"atol": 5e-5, "rtol": 1e-5}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def base(path):
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, experts_implementation="eager"
    )
    return model.eval()


def save(model, lora, directory, path):
    tensors = ((name, model.get_parameter(name)) for name in adapter_names(model))
    save_adapter(directory, tensors, rank=lora.rank, alpha=lora.alpha, base=str(path))


def peft_model(path, targets, parameters, *, rank=4, alpha=6, **options):
    """A model of PEFT's own injection with random adapters."""
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=targets,
        target_parameters=parameters,
        task_type="CAUSAL_LM",
        **options,
    )
    model = peft.get_peft_model(base(path), config).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                draw = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(draw * parameter.shape[-1] ** -0.5)
    return model


def last_names(family):
    if family.startswith("deepseek"):
        return ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    return ["q_proj", "k_proj", "v_proj", "o_proj"]


def both_projections(path):
    name = find_moe_layers(load(path))[0].name
    prefix = ".".join(name.split(".")[-2:])
    return [f"{prefix}.gate_up_proj", f"{prefix}.down_proj"]


def test_peft_computes_what_we_saved(family, family_checkpoint, tmp_path):
    path = family_checkpoint(family)
    lora = LoRA(rank=4, alpha=6.0)
    model = randomise(adapted(path, lora))
    save(model, lora, tmp_path, path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys")
        theirs = peft.PeftModel.from_pretrained(base(path), tmp_path).eval()
    with torch.no_grad():
        ours, want = logits(model), logits(theirs)
        untouched = logits(attached(load(path)))
    torch.testing.assert_close(ours, want, **TOLERANCE)
    assert (ours - untouched).abs().max() > 0.1
    # All adapters of PEFT's model came from the file, and all of the file went into it.
    state, file = peft.get_peft_model_state_dict(theirs), load_file(tmp_path / WEIGHTS)
    assert state.keys() == file.keys()
    assert all(torch.equal(state[key], file[key]) for key in file)


def test_we_compute_what_peft_saved(family, family_checkpoint, tmp_path):
    path = family_checkpoint(family)
    theirs = peft_model(path, last_names(family), both_projections(path))
    theirs.save_pretrained(tmp_path / "theirs")
    lora = LoRA(adapter=str(tmp_path / "theirs"))
    assert (lora.rank, lora.alpha) == (4, 6.0)
    model = adapted(path, lora)
    with torch.no_grad():
        torch.testing.assert_close(logits(model), logits(theirs), **TOLERANCE)
    save(model, lora, tmp_path / "ours", path)
    want, got = (load_file(tmp_path / which / WEIGHTS) for which in ("theirs", "ours"))
    assert want.keys() == got.keys()
    assert all(torch.equal(got[key], want[key]) for key in want)


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
@pytest.mark.parametrize(
    ("targets", "projections"),
    [
        (["q_proj", "v_proj"], []),
        ([], ["gate_up_proj", "down_proj"]),
        (["o_proj"], ["gate_up_proj"]),
        (["k_proj"], ["down_proj"]),
    ],
)
def test_parts_of_a_model_there_and_back(family, family_checkpoint, tmp_path, targets, projections):
    path = family_checkpoint(family)
    parameters = [f"mlp.experts.{name}" for name in projections]
    theirs = peft_model(path, targets, parameters or None)
    theirs.save_pretrained(tmp_path / "theirs")
    lora = LoRA(adapter=str(tmp_path / "theirs"))
    model = adapted(path, lora)
    with torch.no_grad():
        want = logits(theirs)
        torch.testing.assert_close(logits(model), want, **TOLERANCE)
        save(model, lora, tmp_path / "ours", path)
        again = peft.PeftModel.from_pretrained(base(path), tmp_path / "ours").eval()
        torch.testing.assert_close(logits(again), want, **TOLERANCE)


def test_other_linear_layers_of_an_adapter(family_checkpoint, tmp_path):
    """Someone's adapter may also adapt what is no attention."""
    path = family_checkpoint("qwen2_moe")
    theirs = peft_model(path, ["o_proj", "shared_expert_gate"], None)
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        got = logits(adapted(path, LoRA(adapter=str(tmp_path))))
        torch.testing.assert_close(got, logits(theirs), **TOLERANCE)


def test_rank_stabilised_scale(family_checkpoint, tmp_path):
    path = family_checkpoint("mixtral")
    theirs = peft_model(path, ["q_proj"], both_projections(path), use_rslora=True)
    theirs.save_pretrained(tmp_path / "theirs")
    lora = LoRA(adapter=str(tmp_path / "theirs"))
    assert lora.scale == 3.0  # alpha 6 / sqrt(rank 4)
    model = adapted(path, lora)
    save(model, lora, tmp_path / "ours", path)
    again = peft.PeftModel.from_pretrained(base(path), tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(logits(model), logits(theirs), **TOLERANCE)
        torch.testing.assert_close(logits(again), logits(theirs), **TOLERANCE)


def test_some_experts_of_an_adapter(family_checkpoint, tmp_path):
    path = family_checkpoint("qwen3_moe")
    peft_model(path, ["q_proj"], both_projections(path)).save_pretrained(tmp_path)
    lora = LoRA(adapter=str(tmp_path))
    whole = adapted(path, lora)
    held = {0: [5, 1], 1: [], 2: [7, 0, 3]}
    part = load(path, experts=held)
    add_adapters(part, lora)
    initialise_adapters(part, lora, rows_of(part, experts=held), device=CPU)
    for layer in find_moe_layers(whole):
        for name in adapter_names(layer.experts):
            want = layer.experts.get_parameter(name)[held[layer.layer]]
            assert torch.equal(part.get_parameter(f"{layer.name}.{name}"), want)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"])
def test_merged_weights_compute_the_same(family, family_checkpoint):
    path = family_checkpoint(family)
    model = randomise(adapted(path, LoRA(rank=4, alpha=6.0)))
    plain = merge_into(base(path), model, scale=1.5)
    with torch.no_grad():
        torch.testing.assert_close(logits(model), logits(plain), **TOLERANCE)


def test_layouts_by_hand():
    a = torch.tensor([[[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [10, 11, 12]]])  # 2 experts, rank 2
    a_peft = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]])
    b = torch.tensor([[[1, 2]], [[3, 4]]])  # one output
    b_peft = torch.tensor([[1, 3, 2, 4]])  # rank 0 of both experts, rank 1 of both
    assert torch.equal(experts_to_peft(a, "lora_A"), a_peft)
    assert torch.equal(experts_to_peft(b, "lora_B"), b_peft)
    assert torch.equal(experts_from_peft(a_peft, "lora_A", num_experts=2), a)
    assert torch.equal(experts_from_peft(b_peft, "lora_B", num_experts=2), b)


def test_config_says_what_is_adapted(family_checkpoint, tmp_path):
    path = family_checkpoint("qwen3_moe")
    lora = LoRA(rank=4, alpha=6.0)
    save(adapted(path, lora), lora, tmp_path, path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 6)
    assert sorted(config["target_modules"]) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert config["target_parameters"] == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    assert config["base_model_name_or_path"] == str(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


# What cannot be loaded.


@pytest.fixture
def saved(family_checkpoint, tmp_path):
    """An adapter of qwen3_moe, and its checkpoint."""
    path = family_checkpoint("qwen3_moe")
    lora = LoRA(rank=4)
    save(adapted(path, lora), lora, tmp_path / "adapter", path)
    return tmp_path / "adapter", path


def edit(directory, **settings):
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(config | settings))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q_proj": 2}, "bias": "all"}, "rank_pattern, bias"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"r": 0}, "r 0"),
    ],
)
def test_options_that_cannot_be_loaded_are_named(saved, settings, words):
    edit(saved[0], **settings)
    with pytest.raises(CheckpointError, match=words):
        LoRA(adapter=str(saved[0]))


def test_a_directory_without_an_adapter(tmp_path):
    with pytest.raises(UsageError, match=f"{CONFIG} cannot be read"):
        LoRA(adapter=str(tmp_path))
    (tmp_path / CONFIG).write_text("[]")
    with pytest.raises(CheckpointError, match="not the config of a LoRA adapter"):
        LoRA(adapter=str(tmp_path))


def test_a_directory_without_weights(saved):
    (saved[0] / WEIGHTS).unlink()
    with pytest.raises(UsageError, match=f"has no {WEIGHTS}"):
        LoRA(adapter=str(saved[0]))


def test_damaged_weights(saved):
    (saved[0] / WEIGHTS).write_bytes(b"no safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        adapted(saved[1], LoRA(adapter=str(saved[0])))


def test_lacking_and_unknown_tensors_are_named(saved):
    tensors = load_file(saved[0] / WEIGHTS)
    name = next(name for name in tensors if "experts.lora_B" in name)
    tensors[name.replace("experts", "experts.3.w1")] = tensors.pop(name)
    save_file(tensors, saved[0] / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"lacks .*experts\.lora_B.* no place .*\.3\.w1"):
        adapted(saved[1], LoRA(adapter=str(saved[0])))


def test_an_adapter_of_another_model(saved, family_checkpoint):
    lora = LoRA(adapter=str(saved[0]))
    wider = family_checkpoint("qwen3_moe", hidden_size=64)
    with pytest.raises(CheckpointError, match="made for another model"):
        adapted(wider, lora)
    more = family_checkpoint("qwen3_moe", num_experts=16)
    with pytest.raises(CheckpointError, match="16 experts of rank 4"):
        adapted(more, lora, num_experts=16)


def test_peft_is_asked_for_by_its_extra(family_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    lora = LoRA()
    with pytest.raises(UsageError, match=r"moe-lightning\[lora\]"):
        save(adapted(family_checkpoint("mixtral"), lora), lora, tmp_path, "base")


def test_every_family_has_the_projection_up_first(family, family_checkpoint):
    """PEFT nests in the order of the module's parameters, and saving relies on it."""
    experts = find_moe_layers(load(family_checkpoint(family)))[0].experts
    names = [name for name, _ in experts.named_parameters() if name.endswith("proj")]
    assert names == ["gate_up_proj", "down_proj"]
