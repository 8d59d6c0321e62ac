"""Activation checkpointing of an attached, sharded model: same losses, same gradients."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from moe_lightning.collectives import RankGroup
from moe_lightning.dispatch import LocalDispatcher, RoutingLog
from moe_lightning.experts import ExpertShard
from moe_lightning.finetune.losses import language_model_losses
from moe_lightning.finetune.router_watch import RouterWatch
from moe_lightning.modeling.seam import attach

IDS = torch.randint(4, 320, (4, 9), generator=torch.Generator().manual_seed(1))


def load(path):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    attach(model, lambda layer: LocalDispatcher(make_shard(layer), log=RoutingLog()))
    return model.train()


def make_shard(layer):
    ids = tuple(range(layer.num_experts))
    return ExpertShard(layer.experts, layer=layer.layer, expert_ids=ids, backend="grouped_mm")


def step(model, ids, ranks):
    losses = language_model_losses(
        model,
        {"input_ids": ids, "labels": ids},
        ranks=ranks,
        routers=RouterWatch(model),
        aux_loss_weight=0.2,
        z_loss_weight=0.1,
    )
    losses.share.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return losses.next_token, losses.aux, losses.z, grads


def sharded_step(path, is_on):
    model = load(path)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer.mlp.experts, mesh=mesh)
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if is_on:
        model.activation_checkpointing_enable()
    ids = IDS[:1] if dist.get_rank() == 0 else IDS[1:]
    *values, grads = step(model, ids, RankGroup(dist.group.WORLD))
    return values, {name: grad.full_tensor() for name, grad in grads.items()}


@pytest.mark.parametrize("is_on", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_sharded_model_has_the_losses_and_gradients_of_one_process(
    family_checkpoint, family, is_on
):
    path = family_checkpoint(family)
    *values, grads = step(load(path), IDS, RankGroup())
    for found_values, found in run_on_ranks(2, sharded_step, path, is_on):
        torch.testing.assert_close(found_values, values, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found, grads, rtol=1e-4, atol=1e-6)


def test_validation_within_inference_mode_works_while_it_is_on(family_checkpoint):
    model = load(family_checkpoint("mixtral"))
    batch = {"input_ids": IDS, "labels": IDS}
    with torch.inference_mode():
        wanted = language_model_losses(model.eval(), batch, ranks=RankGroup()).next_token
        model.activation_checkpointing_enable()
        found = language_model_losses(model, batch, ranks=RankGroup()).next_token
    assert torch.equal(found, wanted)
