"""Clipping over meshes against torch's own on one process with the whole gradients."""

import math

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from moe_lightning.collectives import RankGroup
from moe_lightning.finetune.clipping import (
    HeldParameter,
    clip_by_norm,
    clip_by_value,
    gradient_norm,
    num_copies,
)
from moe_lightning.finetune.local_parts import local_part


def make_model():
    """Sizes that no number of ranks divides; `few` leaves ranks without rows."""
    torch.manual_seed(7)
    model = nn.ModuleDict(
        {"dense": nn.Linear(6, 5), "few": nn.Linear(6, 1, bias=False), "plain": nn.Linear(3, 3)}
    )
    model["experts"] = nn.Linear(6, 7)
    return model


def whole_gradients():
    torch.manual_seed(11)
    return {name: torch.randn_like(p) for name, p in make_model().named_parameters()}


def one_process(max_norm):
    model = make_model()
    for name, grad in whole_gradients().items():
        model.get_parameter(name).grad = grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return norm, {name: p.grad for name, p in model.named_parameters()}


def set_gradients(model):
    for name, grad in whole_gradients().items():
        parameter = model.get_parameter(name)
        if isinstance(parameter, DTensor):
            grad = distribute_tensor(grad, parameter.device_mesh, parameter.placements)
        parameter.grad = grad.clone()


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def clip_on_rank(mesh_kind, max_norm):
    """Dense on one mesh, experts on another, and a layer that every rank holds."""
    world = dist.get_world_size()
    model = make_model()
    if mesh_kind == "hsdp":
        dense = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp_replicate", "fsdp"))
        experts, experts_outside = dense["fsdp"], 2  # a mesh of its own in each half
    else:
        dense = init_device_mesh("cpu", (world,), mesh_dim_names=("fsdp",))
        experts = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("x", "efsdp"))["efsdp"]
        experts_outside = world // 2
    fully_shard(model["experts"], mesh=experts)
    fully_shard(model["dense"], mesh=dense)
    fully_shard(model["few"], mesh=dense)
    set_gradients(model)
    held = []
    for name, parameter in model.named_parameters():
        outside = {"experts": experts_outside, "plain": world}.get(name.partition(".")[0], 1)
        held.append(HeldParameter(parameter, num_copies(parameter, outside=outside)))
    norm = gradient_norm(held, world=RankGroup(dist.group.WORLD))
    clip_by_norm(model.parameters(), max_norm=max_norm, norm=norm)
    num_empty = sum(local_part(p).numel() == 0 for p in model.parameters())
    return norm, {name: whole(p.grad) for name, p in model.named_parameters()}, num_empty


@pytest.mark.parametrize(("num_ranks", "kind"), [(2, "two"), (2, "hsdp"), (4, "two"), (4, "hsdp")])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_norm_and_gradients_equal_one_process(num_ranks, kind, max_norm):
    norm, grads = one_process(max_norm)
    results = run_on_ranks(num_ranks, clip_on_rank, kind, max_norm)
    for found_norm, found, _ in results:
        torch.testing.assert_close(found_norm, norm, rtol=1e-6, atol=0)  # order of the sum
        torch.testing.assert_close(found, grads, rtol=2e-6, atol=0)
    assert (sum(n for _, _, n in results) > 0) == (kind == "two" or num_ranks == 4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_gradients_become_nan_as_in_torch(bad):
    parameters = [[nn.Parameter(torch.ones(3)) for _ in range(2)] for _ in range(2)]
    for mine in parameters:
        mine[0].grad = torch.tensor([1.0, bad, 2.0])
        mine[1].grad = torch.ones(3)
    want = torch.nn.utils.clip_grad_norm_(parameters[0], 1.0)
    norm = gradient_norm([HeldParameter(p) for p in parameters[1]], world=RankGroup())
    clip_by_norm(parameters[1], max_norm=1.0, norm=norm)
    torch.testing.assert_close(norm, want, rtol=0, atol=0, equal_nan=True)
    for theirs, ours in zip(*parameters, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0, equal_nan=True)


def test_rows_with_copies_count_once():
    """Two ranks' worth of rows by hand: the second row is on two ranks, the first on one."""
    parameter = nn.Parameter(torch.zeros(2, 2, 2))
    parameter.grad = torch.tensor([[[3.0, 0], [0, 0]], [[0, 4.0], [4.0, 0]]])
    held = [HeldParameter(parameter, torch.tensor([1, 2]))]
    assert gradient_norm(held, world=RankGroup()) == 5.0  # 9 + 32 / 2


def test_no_gradients_have_norm_zero():
    held = [HeldParameter(nn.Parameter(torch.ones(2)), 1)]
    held.append(HeldParameter(nn.Parameter(torch.ones(0, 4)), torch.ones(0, dtype=torch.int64)))
    held[1].parameter.grad = torch.zeros(0, 4)
    assert gradient_norm(held, world=RankGroup()) == 0
    assert gradient_norm([], world=RankGroup()) == 0
    clip_by_norm([item.parameter for item in held], max_norm=1.0, norm=torch.tensor(0.0))


def test_clipping_by_value_is_torchs():
    parameters = [[nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2))] for _ in range(2)]
    for mine in parameters:
        mine[0].grad = torch.tensor([-3.0, 0.25, math.nan, 2.0])
    torch.nn.utils.clip_grad_value_(parameters[0], 0.5)
    clip_by_value(parameters[1], max_value=0.5)
    assert parameters[1][1].grad is None
    want, found = parameters[0][0].grad, parameters[1][0].grad
    torch.testing.assert_close(found, want, rtol=0, atol=0, equal_nan=True)
