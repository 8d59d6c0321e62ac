"""The states of the random numbers of a process, as plain tensors and numbers."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def random_states() -> dict[str, Any]:
    """The states of torch, numpy and Python, and of this process's GPU if it uses one.

    Returns:
        What ``torch.load`` reads without running anything.
    """
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "numpy": [
            kind,
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            position,
            has_gauss,
            gauss,
        ],
        "python": random.getstate(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random_states(saved: Sequence[dict[str, Any]], *, rank: int, num_ranks: int) -> None:
    """Go on with saved random numbers.

    Args:
        saved: The states of each rank that saved.
        rank: This rank.
        num_ranks: How many there are now. If there were others, each goes on from rank 0's.
    """
    states = saved[rank if num_ranks == len(saved) else 0]
    torch.set_rng_state(states["torch"])
    kind, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = states["python"]
    random.setstate((version, tuple(internal), gauss_next))
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
