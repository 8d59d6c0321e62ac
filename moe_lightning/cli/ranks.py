"""How many processes a run over ranks has, where the command line leaves it open."""

import os
from typing import Any

import torch
from jsonargparse import Namespace

from moe_lightning.strategies import SHARDED_PRESETS, ShardedStrategy
from moe_lightning.workers.place import Place, read_place

CPU_RANKS = 2
"""Ranks of ``--trainer.devices auto`` on a machine without a GPU: what a first try needs."""


def settle_ranks(trainer: Namespace) -> None:
    """Fill in devices and nodes of a run over ranks.

    torchrun and SLURM have decided about them, whatever the command line says; otherwise ``auto``
    is every GPU of the machine, or two processes on its CPU.

    Args:
        trainer: The parsed options of the trainer; changed in place.
    """
    if not _is_over_ranks(trainer.get("strategy")):
        return
    place = read_place(os.environ)
    if place is not None and place.size > 1:
        trainer.devices = _ranks_per_node(place)
        trainer.num_nodes = place.size // trainer.devices
    elif trainer.devices in ("auto", -1, "-1") and _is_on_cpu(trainer.accelerator):
        trainer.devices = CPU_RANKS


def _is_over_ranks(strategy: Any) -> bool:
    if isinstance(strategy, str):
        return strategy in SHARDED_PRESETS or strategy.startswith("ddp")
    name = str(getattr(strategy, "class_path", ""))
    return name.rpartition(".")[2] == ShardedStrategy.__name__


def _is_on_cpu(accelerator: Any) -> bool:
    return accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())


def _ranks_per_node(place: Place) -> int:
    if place.is_one_machine:
        return place.size
    local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE")
    return int(local) if local else place.size // int(os.environ["SLURM_NNODES"])
