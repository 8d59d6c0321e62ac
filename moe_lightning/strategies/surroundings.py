"""What devices a trainer has: the cluster that ``moe_auto`` and ``plan`` choose for."""

import os
from collections.abc import Sequence

import psutil
import torch

from moe_lightning.devices import CGROUP, free_bytes
from moe_lightning.placement.cluster import Cluster
from moe_lightning.workers.place import read_place


def this_machine() -> list[torch.device]:
    """All GPUs of this machine, or its CPU where there is none."""
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return gpus or [torch.device("cpu")]


def num_launched() -> int:
    """How many processes torchrun or SLURM started together with this one; 1 if it is alone."""
    place = read_place(os.environ)
    return 1 if place is None else place.size


def look_around(devices: Sequence[torch.device], *, num_nodes: int, training: bool) -> Cluster:
    """The cluster that a trainer's devices are.

    Ranks must all see the same, so they go by what memory there is; a process that is alone goes by
    what is free of it.

    Args:
        devices: The devices of one machine, all of one type.
        num_nodes: Machines.
        training: Whether each device is going to have a process of its own.

    Returns:
        The cluster.
    """
    kind = "cuda" if devices[0].type == "cuda" else "cpu"
    launched = num_launched()
    per_node = len(devices)
    if launched > 1:  # the trainer may have been told less
        per_node = max(1, launched // _num_machines(launched, num_nodes))
        num_nodes = launched // per_node
    elif kind == "cpu" and not training:
        per_node = 1  # one process computes on all of it
    has_ranks = launched > 1 or (per_node * num_nodes > 1 and training)
    if kind == "cuda":
        each = min((_total_bytes if has_ranks else free_bytes)(device) for device in devices)
        host = 0 if has_ranks else free_bytes(torch.device("cpu"))
        return Cluster(num_nodes, per_node, each, "cuda", host)
    whole = (_total_bytes if has_ranks else free_bytes)(devices[0])
    return Cluster(num_nodes, per_node, whole // per_node, "cpu")


def _num_machines(launched: int, num_nodes: int) -> int:
    place = read_place(os.environ)
    assert place is not None, "several processes were launched"
    if place.is_one_machine:
        return 1
    per_node = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE")
    if per_node and per_node.isdigit() and int(per_node):
        return max(1, launched // int(per_node))
    nodes = os.environ.get("SLURM_STEP_NUM_NODES") or os.environ.get("SLURM_NNODES") or ""
    return int(nodes) if nodes.isdigit() else num_nodes


def _total_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = int(psutil.virtual_memory().total)
    try:
        return min(total, int((CGROUP / "memory.max").read_text()))
    except (OSError, ValueError):  # no control groups, or "max"
        return total
