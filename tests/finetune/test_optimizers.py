"""Groups of parameters for optimizers."""

import torch
import torch.distributed as dist
from ranks import run_on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from moe_lightning.finetune.optimizers import parameter_groups

EXPERTS = {"experts.weight", "experts.bias", "frozen.weight"}


def make_model():
    torch.manual_seed(5)
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("a", "experts", "b", "frozen")})
    model["frozen"].requires_grad_(False)
    return model


def names_of(model, groups):
    names = {id(p): name for name, p in model.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in groups]


def test_dense_first_then_experts_and_no_frozen_ones():
    model = make_model()
    groups = parameter_groups(model.named_parameters(), expert_names=EXPERTS)
    dense = ["a.weight", "a.bias", "b.weight", "b.bias"]
    assert names_of(model, groups) == [dense, ["experts.weight", "experts.bias"]]
    assert all(group.keys() == {"params"} for group in groups)


def test_a_kind_without_members_has_no_group():
    model = make_model()
    model["experts"].requires_grad_(False)
    groups = parameter_groups(model.named_parameters(), expert_names=EXPERTS)
    assert names_of(model, groups) == [["a.weight", "a.bias", "b.weight", "b.bias"]]
    model.requires_grad_(False)
    assert parameter_groups(model.named_parameters(), expert_names=EXPERTS) == []


def step_on_two_meshes(mixes_meshes):
    model = make_model()
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("one", "two"))
    fully_shard(model["a"], mesh=mesh["two"])
    if not mixes_meshes:
        fully_shard(model["b"], mesh=mesh["two"])
    fully_shard(model["experts"], mesh=mesh["one"])
    groups = parameter_groups(model.named_parameters(), expert_names=EXPERTS)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    # foreach is what an optimizer does by default on a GPU.
    torch.optim.AdamW([{"foreach": True, **group} for group in groups], lr=0.1).step()
    values = {n: p.detach() for n, p in model.named_parameters()}
    whole = {n: getattr(p, "full_tensor", lambda p=p: p)() for n, p in values.items()}
    return names_of(model, groups), [group.get("foreach") for group in groups], whole


def test_groups_are_the_same_on_ranks_and_steps_work():
    model = make_model()
    wanted = names_of(model, parameter_groups(model.named_parameters(), expert_names=EXPERTS))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(model.parameters(), lr=0.1).step()
    values = {name: p.detach() for name, p in model.named_parameters()}
    for mixes in (False, True):
        for names, foreach, found in run_on_ranks(2, step_on_two_meshes, mixes):
            assert names == wanted
            assert foreach == [False if mixes else None, None]
            torch.testing.assert_close(found, values, rtol=1e-6, atol=1e-7)
    assert not dist.is_initialized()
