"""What a link between slots can do, found by trying: a few megabytes, a few times."""

import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer

NUM_BYTES = 4 * 2**20
NUM_TRIES = 4


def probe_link(trainer: Trainer) -> float | None:
    """Try the links of a run. All ranks call this at the same time.

    Ranks all send to all at once, as experts' rows do. Of one process it is the copy from the first
    slot to the second. Workers on other machines are not tried.

    Args:
        trainer: The trainer; its strategy is set up.

    Returns:
        Bytes per second, over all links of a rank at once; None where nothing was tried.
    """
    if trainer.world_size > 1:
        if not dist.is_initialized():
            return None
        device = trainer.strategy.root_device
        size = NUM_BYTES // trainer.world_size * trainer.world_size
        sent = torch.zeros(size, dtype=torch.uint8, device=device)
        received = torch.empty_like(sent)
        away = size - size // trainer.world_size
        return away / _best(lambda: dist.all_to_all_single(received, sent), device)
    devices = getattr(trainer.strategy, "devices", None)
    if devices is None or len(devices) < 2:
        return None
    source = torch.zeros(NUM_BYTES, dtype=torch.uint8, device=devices[0])
    target = torch.empty(NUM_BYTES, dtype=torch.uint8, device=devices[1])
    return NUM_BYTES / _best(lambda: target.copy_(source), devices[1])


def _best(move: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for _ in range(NUM_TRIES):
        started_s = time.perf_counter()
        move()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started_s)
    return max(min(seconds), 1e-9)
