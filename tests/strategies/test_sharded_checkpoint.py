"""Checkpoints over ranks: any ranks load what any others saved, and killed saves do no harm.

Gradients are made up from the parameters, element by element, so that every layout of ranks takes
bitwise the same steps.
"""

import contextlib
import functools
import os
import pickle
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from torch.distributed.tensor import DTensor

from moe_lightning.collectives import RankGroup
from moe_lightning.dispatch import RoutingLog
from moe_lightning.errors import CheckpointError, UsageError
from moe_lightning.finetune.optimizers import parameter_groups
from moe_lightning.modeling.checkpoint import open_checkpoint
from moe_lightning.modeling.sharded_state import Share, local_part, model_tensors, optimizer_state
from moe_lightning.modeling.sharding import RankMeshes, ShardingOptions
from moe_lightning.placement import ExpertPlacement, make_placement
from moe_lightning.strategies import random_states, sharded_checkpoint
from moe_lightning.strategies.hosting import HostingOptions
from moe_lightning.strategies.sharded_checkpoint import (
    load_sharded,
    remove_checkpoint,
    save_sharded,
)
from moe_lightning.strategies.sharded_model import ExchangeOptions, ShardLoader

EP_2 = {"fsdp": 4, "ep": 2}


def share_of(checkpoint, *, fsdp=1, tp=1, ep=1, dp_replicate=1, replicas=0):
    """A rank's share of a model, an optimizer, what its rows are, and the ranks."""
    meshes = None
    ranks = RankGroup()
    if dist.is_initialized():
        meshes = RankMeshes(
            "cpu", pp=1, dp_replicate=dp_replicate, fsdp=fsdp, tp=tp, ep=ep, timeout_s=60
        )
        ranks = RankGroup(dist.group.WORLD)
    loader = ShardLoader(
        meshes,
        sharding=ShardingOptions(),
        exchange=ExchangeOptions(),
        device=torch.device("cpu"),
        host_ranks=ranks,
    )

    def place(num_experts, num_slots) -> ExpertPlacement:
        loads = {layer: list(range(1, n + 1)) for layer, n in num_experts.items()}
        return make_placement(
            "balanced" if replicas else "linear",
            num_experts,
            num_slots,
            loads=loads if replicas else None,
            num_replicas=replicas,
        )

    hosted = loader.load(
        open_checkpoint(checkpoint),
        HostingOptions(torch.float32, "reference", RoutingLog(), is_training=True),
        place=place,
        hosted_by=None,
    )
    optimizer = torch.optim.AdamW(
        parameter_groups(hosted.model.named_parameters(), expert_names=hosted.rows),
        lr=0.01,
        foreach=False,
    )
    return hosted.model, optimizer, hosted.rows, ranks


def train(model, optimizer, num_steps):
    for _ in range(num_steps):
        for parameter in model.parameters():
            parameter.grad = parameter.detach() * 0.5 + 0.1
        optimizer.step()


def everything(model, optimizer, rows):
    """This rank's tensors under the names that they are saved by, and where they begin."""
    found = model_tensors(model).tensors
    share = Share()
    for name, tensor in found.items():
        share.add(name, tensor, rows.get(name))
    for name, states in optimizer_state(optimizer, found).tensors.items():
        for key, value in states.items():
            share.add(name, value, rows.get(name) if value.ndim else None, form=f"{{}}@{key}")
    return share.tensors


def compare(mine, whole):
    """How many of the tensors are not those of one process."""
    differing = []
    for name, tensor in mine.items():
        local, offset = local_part(tensor)
        cut = tuple(slice(o, o + n) for o, n in zip(offset, local.shape, strict=True))
        if not torch.equal(local, whole[name][cut]):
            differing.append(name)
    return differing


def save(checkpoint, path, sizes, steps=2):
    model, optimizer, rows, ranks = share_of(checkpoint, **sizes)
    train(model, optimizer, steps)
    optimizer.param_groups[0]["lr"] = 0.125
    save_sharded(
        Path(path), model, optimizer=optimizer, rows=rows, rest={"epoch": 3}, ranks=ranks
    )
    return sum(isinstance(p, DTensor) for p in model.parameters())


def load(checkpoint, path, sizes, whole_file):
    model, optimizer, rows, ranks = share_of(checkpoint, **sizes)
    rest = load_sharded(Path(path), model, optimizer=optimizer, rows=rows, ranks=ranks)
    assert rest == {"epoch": 3}
    assert optimizer.param_groups[0]["lr"] == 0.125
    mine = everything(model, optimizer, rows)
    differing = compare(mine, torch.load(whole_file))
    train(model, optimizer, 1)  # the state is one that the optimizer goes on with
    return differing, sorted(mine)


@pytest.fixture
def whole_file(family_checkpoint, tmp_path):
    """What one process has after two steps."""

    def make(checkpoint):
        model, optimizer, rows, _ = share_of(checkpoint)
        train(model, optimizer, 2)
        tensors = everything(model, optimizer, rows)
        torch.save({name: t.clone() for name, t in tensors.items()}, tmp_path / "whole.pt")
        return tmp_path / "whole.pt"

    return make


def on_ranks(num_ranks, function, *args):
    return run_on_ranks(num_ranks, function, *args) if num_ranks else [function(*args)]


def check_loads(checkpoint, path, whole, layouts):
    for num_ranks, sizes in layouts:
        results = on_ranks(num_ranks, load, checkpoint, path, sizes, whole)
        assert [differing for differing, _ in results] == [[]] * len(results), (num_ranks, sizes)
        names = set().union(*(names for _, names in results))
        assert names == set(torch.load(whole)), (num_ranks, sizes)


def test_any_ranks_load_what_four_saved(family_checkpoint, whole_file, tmp_path):
    """6 experts: uneven over 4."""
    checkpoint = str(family_checkpoint("qwen3_moe", num_experts=6))
    path, whole = str(tmp_path / "x.ckpt"), str(whole_file(checkpoint))
    num_shared = run_on_ranks(4, save, checkpoint, path, EP_2)
    assert min(num_shared) > 0
    check_loads(
        checkpoint,
        path,
        whole,
        [
            (0, {}),
            (2, {"fsdp": 2}),
            (2, {"fsdp": 2, "ep": 2}),
            (4, {"fsdp": 4}),
            (4, {"fsdp": 4, "ep": 4}),
            (4, {"fsdp": 4, "ep": 2, "replicas": 2}),
            (4, {"dp_replicate": 2, "fsdp": 2, "ep": 2}),
            (2, {"fsdp": 1, "tp": 2}),
            (4, {"fsdp": 2, "tp": 2}),
            (4, {"fsdp": 2, "tp": 2, "ep": 2}),
        ],
    )


@pytest.mark.parametrize(
    ("num_ranks", "sizes"),
    [
        (0, {}),
        (2, {"fsdp": 2, "ep": 2, "replicas": 2}),
        (4, {"dp_replicate": 2, "fsdp": 2}),
        (4, {"fsdp": 2, "tp": 2}),
    ],
)
def test_one_process_loads_what_any_ranks_saved(
    family_checkpoint, whole_file, tmp_path, num_ranks, sizes
):
    checkpoint = str(family_checkpoint("mixtral"))
    path, whole = str(tmp_path / "x.ckpt"), str(whole_file(checkpoint))
    on_ranks(num_ranks, save, checkpoint, path, sizes)
    check_loads(checkpoint, path, whole, [(0, {})])


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_other_families(family, family_checkpoint, whole_file, tmp_path):
    """Expert biases; a routing buffer, shared experts and a dense first layer."""
    checkpoint = str(family_checkpoint(family))
    path, whole = str(tmp_path / "x.ckpt"), str(whole_file(checkpoint))
    run_on_ranks(2, save, checkpoint, path, {"fsdp": 2, "ep": 2})
    check_loads(checkpoint, path, whole, [(0, {}), (2, {"fsdp": 2})])
