"""Adapters that are added to a model on meta are loaded around: the order of the strategies."""

import pytest
import torch
from adapted_models import CPU, adapted, attached, logits, rows_of
from ranks import run_on_ranks

from moe_lightning.dispatch import CollectiveDispatcher, RoutingLog
from moe_lightning.experts import ExpertShard
from moe_lightning.finetune.adapter_values import initialise_adapters
from moe_lightning.finetune.lora import (
    LoRA,
    adapter_names,
    add_adapters,
    is_adapter,
    train_adapters_only,
)
from moe_lightning.modeling.checkpoint import open_checkpoint
from moe_lightning.modeling.loading import load_model
from moe_lightning.modeling.seam import attach
from moe_lightning.modeling.sharding import RankMeshes, ShardingOptions, shard_model


def loaded_around(path, lora, *, meshes=None, experts=None):
    """A model whose adapters are added, sharded and filled before its weights are read."""

    def on_meta(model):
        add_adapters(model, lora)
        if meshes is not None:
            shard_model(model, meshes, ShardingOptions())
        initialise_adapters(model, lora, rows_of(model, experts=experts), device=CPU)

    model = load_model(
        open_checkpoint(str(path)),
        device=CPU,
        dtype=torch.float32,
        experts=experts,
        on_meta=on_meta,
        show_progress=False,
    )
    train_adapters_only(model)
    return model


def trained(model):
    """The logits, and the gradients of the adapters after one backward, whole."""
    scores = logits(model)
    scores.logsumexp(1).sum().backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == is_adapter(name)
        if parameter.grad is not None:
            whole = getattr(parameter.grad, "full_tensor", lambda grad=parameter.grad: grad)
            gradients[name] = whole()
    return scores.detach(), gradients


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_adapters_added_on_meta_equal_those_added_after(family, family_checkpoint):
    path, lora = family_checkpoint(family), LoRA(rank=4)
    model, want = loaded_around(path, lora), adapted(path, lora)
    want_state, state = want.state_dict(), model.state_dict()
    assert state.keys() == want_state.keys()
    assert all(torch.equal(state[name], want_state[name]) for name in state)
    assert torch.equal(logits(attached(model)), logits(want))


def test_layers_without_experts_here(family_checkpoint):
    lora = LoRA(rank=4)
    model = loaded_around(family_checkpoint("mixtral"), lora, experts={0: [3, 1], 1: [], 2: [0]})
    shapes = [
        model.get_parameter(name).shape[0]
        for name in adapter_names(model)
        if name.endswith("experts.down_proj_lora_A")
    ]
    assert shapes == [2, 0, 1]


def train_on_ranks(path, ep):
    """Both ranks have the same rows, so means over them are one process's."""
    lora = LoRA(rank=4)
    meshes = RankMeshes("cpu", pp=1, dp_replicate=1, fsdp=2, tp=1, ep=ep, timeout_s=60)
    held = {slot: range(8) for slot in range(2)} if ep == 1 else HELD
    here = held[meshes.rank("ep")]
    model = loaded_around(
        path, lora, meshes=meshes, experts={layer: list(here) for layer in range(3)}
    )
    if ep == 1:
        attached(model)
    else:
        attach(model, lambda layer: exchange(layer, held, meshes))
    got, got_gradients = trained(model)
    want, want_gradients = trained(adapted(path, lora))
    # Sums over experts in another order, and FSDP's means.
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert got_gradients.keys() == want_gradients.keys()
    for name, gradient in got_gradients.items():
        whole = want_gradients[name]
        whole = whole[list(here)] if ".experts." in name else whole
        torch.testing.assert_close(gradient, whole, atol=1e-4, rtol=1e-4)
    return sum(bool(gradient.any()) for gradient in got_gradients.values())


HELD = {0: [6, 1, 4, 0, 3], 1: [2, 7, 5]}


def exchange(layer, held, meshes):
    group = meshes.group("ep")
    ids = held[group.rank()]
    shard = ExpertShard(layer.experts, layer=layer.layer, expert_ids=ids, backend="grouped_mm")
    return CollectiveDispatcher(
        shard, num_experts=8, experts_of_slot=held, group=group, log=RoutingLog()
    )


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("ep", [1, 2])
def test_sharded_adapters_train_like_one_process(family, family_checkpoint, ep):
    # B has gradients at first and A none, as B is zero: 3 layers of 4 linear layers, 2 projections.
    assert run_on_ranks(2, train_on_ranks, family_checkpoint(family), ep) == [18, 18]
