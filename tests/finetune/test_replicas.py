"""Gradients of experts that several ranks hold: sums, norms, and copies that stay equal."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from moe_lightning.collectives import RankGroup
from moe_lightning.finetune.clipping import clip_by_norm, gradient_norm
from moe_lightning.finetune.holders import held_parameters
from moe_lightning.finetune.local_parts import local_part
from moe_lightning.finetune.replicas import local_expert_ids, sum_replica_gradients
from moe_lightning.modeling.expert_rows import ExpertRows

NUM_EXPERTS = 5
PLACES = {
    # Uneven, with a rank that holds one expert; 2 and 4 have copies.
    2: ((0, 2, 4), (1, 2, 3, 4)),
    4: ((0, 2), (2, 4, 1), (2,), (3, 4)),
}
SHAPES = {"up": (3, 2), "bias": (3,)}


class Experts(nn.Module):
    def __init__(self, expert_ids):
        super().__init__()
        for name, shape in SHAPES.items():
            rows = [torch.full(shape, float(e)) for e in expert_ids]
            setattr(self, name, nn.Parameter(torch.stack(rows)))


def dense_gradients():
    """Of a layer on all ranks' mesh, in two dimensions or one, and of one that every rank holds."""
    torch.manual_seed(3)
    return {"sharded": torch.randn(7, 2), "everywhere": torch.randn(3)}


class Dense(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros_like(dense_gradients()[name]))


def gradient_part(name, expert, place):
    """What the rows that were sent to one copy of an expert add to its gradient."""
    generator = torch.Generator().manual_seed(100 * expert + place + len(name))
    return torch.randn(SHAPES[name], generator=generator)


def whole_gradients():
    """One process: an expert's gradient is the sum over its copies."""
    return {
        ep: {
            name: torch.stack(
                [
                    sum(gradient_part(name, e, p) for p, ids in enumerate(places) if e in ids)
                    for e in range(NUM_EXPERTS)
                ]
            )
            for name in SHAPES
        }
        for ep, places in PLACES.items()
    }


def set_gradient(parameter, grad):
    if isinstance(parameter, DTensor):
        grad = distribute_tensor(grad, parameter.device_mesh, parameter.placements)
    parameter.grad = grad.clone()


def sum_and_clip(ep, is_hsdp, max_norm):
    """A layer's experts over (dp_replicate, efsdp) at each place of ep, and two dense layers."""
    world = dist.get_world_size()
    copies = 2 if is_hsdp else 1
    axes = ("dp_replicate", "efsdp", "ep")
    mesh = init_device_mesh("cpu", (copies, world // ep // copies, ep), mesh_dim_names=axes)
    shape = (2, world // 2) if is_hsdp else (world,)
    dense_mesh = init_device_mesh("cpu", shape, mesh_dim_names=axes[: len(shape)])
    place = mesh["ep"].get_local_rank()
    ids = PLACES[ep][place]
    model = nn.ModuleDict({name: Dense(name) for name in dense_gradients()})
    model["experts"] = Experts(ids)
    fully_shard(model["sharded"], mesh=dense_mesh)
    if world > ep:
        experts_mesh = mesh[("dp_replicate", "efsdp")] if is_hsdp else mesh["efsdp"]
        fully_shard(model["experts"], mesh=experts_mesh)
    for name, grad in dense_gradients().items():
        set_gradient(model[name].weight, grad)
    for name, parameter in model["experts"].named_parameters():
        set_gradient(parameter, torch.stack([gradient_part(name, e, place) for e in ids]))
    rows = {f"experts.{name}": ExpertRows(ids, NUM_EXPERTS) for name in SHAPES}
    num_holders = [sum(e in p for p in PLACES[ep]) for e in range(NUM_EXPERTS)]
    holders = {name: num_holders for name in rows}
    group = RankGroup(mesh[("efsdp", "ep")]._flatten().get_group())
    sum_replica_gradients(model.named_parameters(), rows, holders, group=group)
    held = held_parameters(
        model.named_parameters(), world_size=world, ep_size=ep, rows=rows, num_holders=holders
    )
    norm = gradient_norm(held, world=RankGroup(dist.group.WORLD))
    clip_by_norm(model.parameters(), max_norm=max_norm, norm=norm)
    mine = {
        name: (local_expert_ids(p, rows[f"experts.{name}"]), local_part(p.grad))
        for name, p in model["experts"].named_parameters()
    }
    dense = {name: model[name].weight.grad for name in dense_gradients()}
    dense["sharded"] = dense["sharded"].full_tensor()
    return norm, mine, dense


@pytest.mark.parametrize(
    ("num_ranks", "ep", "is_hsdp"),
    [(2, 2, False), (4, 2, False), (4, 4, False), (4, 2, True)],
)
@pytest.mark.parametrize("max_norm", [1.0, 1e6])
def test_copies_have_the_gradient_and_norm_of_one_process(num_ranks, ep, is_hsdp, max_norm):
    wanted = whole_gradients()[ep] | dense_gradients()
    parameters = [nn.Parameter(grad) for grad in wanted.values()]
    for parameter in parameters:
        parameter.grad = parameter.detach().clone()
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    wanted = {name: p.grad for name, p in zip(wanted, parameters, strict=True)}
    results = run_on_ranks(num_ranks, sum_and_clip, ep, is_hsdp, max_norm)
    copies = {}
    for found_norm, mine, dense in results:
        torch.testing.assert_close(found_norm, norm, rtol=1e-6, atol=0)  # order of the sum
        for name, grad in dense.items():
            torch.testing.assert_close(grad, wanted[name], rtol=1e-5, atol=1e-6)
        for name, (ids, grads) in mine.items():
            for expert, grad in zip(ids, grads, strict=True):
                torch.testing.assert_close(grad, wanted[name][expert], rtol=1e-5, atol=1e-6)
                copies.setdefault((name, expert), []).append(grad)
    for (_, expert), grads in copies.items():
        assert len(grads) == sum(expert in ids for ids in PLACES[ep]) * (2 if is_hsdp else 1)
        assert all(torch.equal(grad, grads[0]) for grad in grads), "copies must stay equal"
    assert len(copies) == len(SHAPES) * NUM_EXPERTS


def sum_with_a_missing_gradient():
    rank = dist.get_rank()
    parameter = nn.Parameter(torch.zeros(1 + rank, 2))  # rank 0: expert 1; rank 1: experts 0, 1
    ids = ((1,), (0, 1))[rank]
    if rank == 1:
        parameter.grad = torch.tensor([[1.0, 2], [3, 4]])
    frozen = nn.Parameter(torch.zeros(1, 2), requires_grad=False)
    rows = {"p": ExpertRows(ids, 2), "frozen": ExpertRows((0,), 1)}
    named = [("p", parameter), ("frozen", frozen), ("dense", nn.Parameter(torch.zeros(2)))]
    group = RankGroup(dist.group.WORLD)
    sum_replica_gradients(named, rows, {"p": (1, 2), "frozen": (2,)}, group=group)
    assert frozen.grad is None
    return parameter.grad.tolist()


def test_copy_that_got_no_rows_gets_the_gradient_of_the_other():
    assert run_on_ranks(2, sum_with_a_missing_gradient) == [[[3, 4]], [[1, 2], [3, 4]]]
