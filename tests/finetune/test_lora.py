"""Adapters are where they were asked for, add nothing at first, and alone are trained."""

import pytest
import torch
from adapted_models import CPU, adapted, attached, load, logits, merge_into, randomise, rows_of
from families import FAMILIES
from ranks import run_on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from moe_lightning.errors import UsageError
from moe_lightning.experts.packed import projections
from moe_lightning.finetune.adapter_values import initialise_adapters
from moe_lightning.finetune.lora import LoRA, adapter_names, add_adapters
from moe_lightning.modeling.checkpoint import open_checkpoint
from moe_lightning.modeling.expert_selection import keep_experts
from moe_lightning.modeling.loading import build_on_meta
from moe_lightning.modeling.packing import PackedLinear, pack_dense
from moe_lightning.modeling.seam import find_moe_layers

QKVO = {"q_proj", "k_proj", "v_proj", "o_proj"}
LATENT = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
ATTENTION = {family: QKVO for family in FAMILIES} | {"deepseek_v3": LATENT, "deepseek_v2": LATENT}


def on_meta(path):
    return build_on_meta(open_checkpoint(str(path)).config)


def test_every_family_gets_adapters_and_nothing_else_trains(family, family_checkpoint):
    model = on_meta(family_checkpoint(family))
    frozen = {name for name, _ in model.named_parameters()}
    names = add_adapters(model, LoRA(rank=4))
    linears = {name for name in names if ".self_attn." in name}
    assert {name.split(".")[-2] for name in linears} == ATTENTION[family]
    assert len(linears) == 3 * 2 * len(ATTENTION[family])  # layers, A and B
    layers = find_moe_layers(model)
    assert set(names) - linears == {
        f"{layer.name}.{projection}_lora_{letter}"
        for layer in layers
        for projection in ("gate_up_proj", "down_proj")
        for letter in "AB"
    }
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(names)
    assert not trained & frozen
    # A takes the inputs, whatever the layout of the weight: hidden size 32, expert size 24.
    shapes = {
        name: tuple(layers[0].experts.get_parameter(name).shape)
        for name in (
            "gate_up_proj_lora_A",
            "gate_up_proj_lora_B",
            "down_proj_lora_A",
            "down_proj_lora_B",
        )
    }
    assert list(shapes.values()) == [(8, 4, 32), (8, 48, 4), (8, 4, 24), (8, 32, 4)]


@pytest.mark.parametrize("backend", ["grouped_mm", "reference"])
def test_new_adapters_change_no_bit(family, family_checkpoint, backend):
    path = family_checkpoint(family)
    with torch.no_grad():
        want = logits(attached(load(path), backend))
        got = logits(adapted(path, LoRA(), backend=backend))
    assert torch.equal(got, want)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_gradients_are_those_of_merged_weights(family, family_checkpoint, plain_transformers):
    path = family_checkpoint(family)
    lora = LoRA(rank=4, alpha=6.0)
    model = randomise(adapted(path, lora))
    loss = logits(model).logsumexp(1).sum()
    loss.backward()
    plain = merge_into(load(path), model, scale=1.5)
    plain.set_experts_implementation("eager")
    want = logits(plain).logsumexp(1).sum()
    torch.testing.assert_close(loss, want, atol=1e-4, rtol=1e-5)  # 12 * log(320): fp32 sums
    want.backward()
    for name in adapter_names(model):
        if not name.endswith("lora_A"):
            continue
        a, b = model.get_parameter(name), model.get_parameter(name[:-1] + "B")
        module_name, _, own_name = name.rpartition(".")
        module = plain.get_submodule(module_name)
        dw = getattr(module, own_name[: -len("lora_A")].removesuffix("_") or "weight").grad
        if getattr(module, "is_transposed", False):
            dw = dw.mT
        # W' = W + s B A, so dA = s B^T dW and dB = s dW A^T; sums in another order.
        torch.testing.assert_close(a.grad, 1.5 * b.mT @ dw, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(b.grad, 1.5 * dw @ a.mT, atol=1e-4, rtol=1e-4)
        assert a.grad.any()
        assert b.grad.any()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_training_lowers_the_loss_and_leaves_the_base_alone(family_checkpoint):
    model = adapted(family_checkpoint("qwen3_moe"), LoRA(rank=4))
    names = adapter_names(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        scores = logits(model)
        loss = torch.nn.functional.cross_entropy(scores[:-1], torch.arange(11) + 20)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.5
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if name not in names)
    assert not any(torch.equal(after[name], before[name]) for name in names)


def test_start_is_uniform_and_of_the_seed(family_checkpoint):
    path = family_checkpoint("mixtral")
    first, again, other = (adapted(path, LoRA(seed=seed)) for seed in (3, 3, 4))
    drawn = []
    for name in adapter_names(first):
        value = first.get_parameter(name)
        assert torch.equal(again.get_parameter(name), value)
        if name.endswith("B"):
            assert not value.any()
            continue
        drawn.append(value.flatten() * value.shape[-1] ** 0.5)
        assert not torch.equal(other.get_parameter(name), value)
    values = torch.cat(drawn).detach()
    assert values.abs().max() <= 1
    assert values.unique().numel() > 0.99 * values.numel()  # no two adapters alike
    # The variance of a uniform number in [-1, 1] is 1/3; there are 10^4 of them.
    assert float(values.var()) == pytest.approx(1 / 3, rel=0.05)


def test_start_of_an_expert_does_not_depend_on_who_holds_it(family_checkpoint):
    path = family_checkpoint("gpt_oss")
    lora = LoRA(rank=4)
    whole = adapted(path, lora)
    held = {0: [5, 1], 1: [], 2: [7, 0, 3]}
    part = load(path, experts=held)
    add_adapters(part, lora)
    initialise_adapters(part, lora, rows_of(part, experts=held), device=CPU)
    for layer in find_moe_layers(whole):
        for name in adapter_names(layer.experts):
            want = layer.experts.get_parameter(name)[held[layer.layer]]
            assert torch.equal(part.get_parameter(f"{layer.name}.{name}"), want)


def test_meta_adapters_get_memory_and_the_rest_stays(family_checkpoint):
    path = family_checkpoint("qwen3_moe")
    lora = LoRA(rank=4)
    model = on_meta(path)
    names = set(add_adapters(model, lora))
    for parameter in model.parameters():
        parameter.requires_grad_(True)  # as loading leaves them
    initialise_adapters(model, lora, rows_of(model), device=CPU)
    whole = adapted(path, lora)
    for name, parameter in model.named_parameters():
        assert parameter.is_meta == (name not in names)
        assert parameter.requires_grad == (name in names)
        if name in names:
            assert torch.equal(parameter, whole.get_parameter(name))


def start_on_ranks(path, is_meta):
    """Whether each rank's FSDP shards are those of one process; experts 6, 1, 4 over 2 ranks."""
    lora = LoRA(rank=4)
    held = {layer: [6, 1, 4] for layer in range(3)}
    whole = adapted(path, lora)
    model = on_meta(path) if is_meta else load(path)
    for layer in find_moe_layers(model):
        if is_meta:
            keep_experts(layer, held[layer.layer])
    experts = held if is_meta else None
    add_adapters(model, lora)
    mesh = init_device_mesh("cpu", (2,))
    for layer in find_moe_layers(model):
        fully_shard(layer.experts, mesh=mesh)
    for decoder_layer in model.base_model.layers:
        fully_shard(decoder_layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    initialise_adapters(model, lora, rows_of(model, experts=experts), device=CPU)
    sizes = set()
    for name in adapter_names(model):
        parameter = model.get_parameter(name)
        assert isinstance(parameter, DTensor)
        assert not parameter.is_meta
        assert parameter.requires_grad
        want = whole.get_parameter(name)
        if ".experts." in name:
            want = want[[6, 1, 4]] if is_meta else want
            sizes.add(parameter.to_local().shape[0])
        assert torch.equal(parameter.full_tensor(), want), name
    if not is_meta:  # it runs, and FSDP takes the values as its own
        with torch.no_grad():
            assert torch.equal(logits(attached(model)), logits(whole))
    return sorted(sizes)


@pytest.mark.parametrize(("is_meta", "sizes"), [(True, [[2], [1]]), (False, [[4], [4]])])
def test_ranks_start_with_the_numbers_of_one_process(family_checkpoint, is_meta, sizes):
    path = family_checkpoint("qwen3_moe")
    assert run_on_ranks(2, start_on_ranks, path, is_meta) == sizes


def test_packed_linear_layers_keep_their_adapters(family_checkpoint):
    """As predict packs them after fit."""
    model = randomise(adapted(family_checkpoint("qwen3_moe"), LoRA(rank=4)))
    with torch.inference_mode():
        want = logits(model)
        pack_dense(model)
        assert any(isinstance(module, PackedLinear) for module in model.modules())
        # The same sums by another library, logits up to 5.
        torch.testing.assert_close(logits(model), want, atol=5e-5, rtol=1e-5)


def test_some_targets_only(family_checkpoint):
    model = on_meta(family_checkpoint("deepseek_v3"))
    names = add_adapters(model, LoRA(targets=["o_proj", "kv_b_proj"], experts=False))
    assert {name.split(".")[-2] for name in names} == {"o_proj", "kv_b_proj"}
    model = on_meta(family_checkpoint("deepseek_v3"))
    assert all(".experts." in name for name in add_adapters(model, LoRA(targets=[])))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "lora.rank=0"),
        ({"alpha": 0.0}, "lora.alpha=0.0"),
        ({"targets": [], "experts": False}, "nothing would be trained"),
    ],
)
def test_options_that_make_no_sense(options, words):
    with pytest.raises(UsageError, match=words):
        LoRA(**options)


def test_unknown_targets_are_named_with_the_choice(family_checkpoint):
    model = on_meta(family_checkpoint("mixtral"))
    with pytest.raises(UsageError, match=r"no w1; choose from k_proj, o_proj, q_proj, v_proj"):
        add_adapters(model, LoRA(targets=["q_proj", "w1"]))


def test_a_model_without_attention_linears(family_checkpoint):
    model = on_meta(family_checkpoint("mixtral"))
    for layer in model.base_model.layers:
        layer.self_attn = torch.nn.Identity()
    with pytest.raises(UsageError, match="no linear layers"):
        add_adapters(model, LoRA())


def test_experts_without_a_fused_weight(family_checkpoint):
    model = on_meta(family_checkpoint("mixtral"))
    experts = find_moe_layers(model)[1].experts
    del experts.down_proj
    with pytest.raises(UsageError, match=r"layers\.1\..*no fused weight 'down_proj'"):
        add_adapters(model, LoRA())
    assert projections(experts) == ("gate_up_proj", "down_proj")


def test_adapters_are_added_once(family_checkpoint):
    model = on_meta(family_checkpoint("mixtral"))
    add_adapters(model, LoRA())
    with pytest.raises(UsageError, match="already"):
        add_adapters(model, LoRA())
