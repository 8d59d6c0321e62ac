"""From what workers offer to slots that a placement can be planned for."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moe_lightning.devices import free_bytes
from moe_lightning.strategies.placing import SlotRoom
from moe_lightning.workers.session import memory_pool


def worker_slots(
    names: Sequence[str], offers: Sequence[Mapping[str, Any]], *, experts_backend: str
) -> list[SlotRoom]:
    """The slots that workers are.

    Args:
        names: What users call them.
        offers: What they offered when they were met.
        experts_backend: How experts are computed by those that have no way of their own.

    Returns:
        A slot for each worker.
    """
    return [
        SlotRoom(
            name,
            offer["pool"],
            torch.device(offer["device"]).type,
            offer.get("experts_backend") or experts_backend,
        )
        for name, offer in zip(names, offers, strict=False)
    ]


def free_by_pool(offers: Sequence[Mapping[str, Any]], *, here: torch.device) -> dict[str, int]:
    """Free bytes of the memory that workers and the master use.

    Args:
        offers: What workers offered; of those that share memory the least counts.
        here: The master's device.

    Returns:
        Free bytes of each pool.
    """
    free = {memory_pool(here): free_bytes(here)}
    for offer in offers:
        pool, num_bytes = offer["pool"], offer["free_bytes"]
        free[pool] = min(free.get(pool, num_bytes), num_bytes)
    return free
