"""Waiting until every rank has loaded its share, by counting in the ranks' store."""

import time

import torch.distributed as dist

LOADED, LOADED_POLL_S = "moe_lightning/loaded", 0.1


def wait_until_all_have_loaded(num_ranks: int) -> None:
    """Wait for ranks whose disks are slower, however long they take.

    A collective would give up after the strategy's ``timeout_s``. A rank that dies meanwhile is
    found by the watch. All ranks call this, after each load.

    Args:
        num_ranks: All ranks of the run.
    """
    store = dist.distributed_c10d._get_default_store()
    # Loads of all ranks, over all that this process group has seen.
    num_loads = store.add(LOADED, 1)
    wanted = -(-num_loads // num_ranks) * num_ranks
    while store.add(LOADED, 0) < wanted:
        time.sleep(LOADED_POLL_S)
