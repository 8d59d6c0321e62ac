"""Processes with torch loaded that tests borrow as the ranks of a group: a gloo session a call.

    run_on_ranks(2, function, argument)  ──▶  [function(argument) of rank 0, of rank 1]

The function is a module-level one of a test module. It runs with a fresh default process group and
the environment that torchrun would give, so a Lightning Trainer in it finds its place. Functions
that end without leaving their group are cleaned up after; one that hangs costs its processes.
"""

import atexit
import gc
import importlib
import os
import socket
import sys
import tempfile
import traceback
from datetime import timedelta
from functools import _lru_cache_wrapper
from multiprocessing import get_context

TIMEOUT_S = 120


def run_on_ranks(num_ranks, function, *args, timeout_s=TIMEOUT_S):
    """Call ``function(*args)`` on each of so many ranks.

    Args:
        num_ranks: How many.
        function: A module-level function of a test module.
        args: Picklable arguments, the same for all.
        timeout_s: Longest wait for all.

    Returns:
        The results in the order of the ranks.

    Raises:
        AssertionError: If a rank raised (with every rank's traceback), ended, or did not come back.
    """
    pool = _pool(num_ranks)
    port = _free_port()
    for rank, (_, pipe) in enumerate(pool):
        pipe.send((rank, num_ranks, port, function.__module__, function.__qualname__, args))
    results, problems = [], []
    for rank, (_, pipe) in enumerate(pool):
        try:
            if not pipe.poll(timeout_s if not problems else 5):
                problems.append(f"rank {rank} did not come back")
                continue
            is_ok, value = pipe.recv()
        except (EOFError, OSError):
            problems.append(f"rank {rank} ended")
            continue
        if is_ok:
            results.append(value)
        else:
            problems.append(f"rank {rank}: {value}")
    if problems:
        stop_ranks()  # their state is unknown
        raise AssertionError("\n".join(problems))
    return results


_processes = []


def _pool(num_ranks):
    context = get_context("spawn")
    while len(_processes) < num_ranks:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, list(sys.path)), daemon=True)
        process.start()
        theirs.close()
        _processes.append((process, ours))
    return _processes[:num_ranks]


@atexit.register
def stop_ranks():
    """End the processes; the next call starts new ones."""
    for process, pipe in _processes:
        process.kill()
        process.join()
        pipe.close()
    _processes.clear()


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(pipe, path):
    sys.path[:] = path
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            rank, num_ranks, port, module, name, args = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                GROUP_RANK="0",
                WORLD_SIZE=str(num_ranks),
                LOCAL_WORLD_SIZE=str(num_ranks),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
                TORCHELASTIC_RUN_ID=f"tests-{port}",
            )
            torch.manual_seed(0)
            dist.init_process_group(
                "gloo", rank=rank, world_size=num_ranks, timeout=timedelta(seconds=60)
            )
            function = getattr(importlib.import_module(module), name)
            value = (True, function(*args))
        except BaseException:
            value = (False, traceback.format_exc())
        try:
            if dist.is_initialized():
                dist.destroy_process_group()
            _forget_meshes()
        except BaseException:
            value = (False, traceback.format_exc())
        pipe.send(value)


_caches = []


def _forget_meshes():
    """Drop what torch's caches keep of the meshes of a group that ended.

    They would give them to later meshes that are equal to them (torch 2.13 compares shapes and
    names, not groups). And meshes hold groups, each of which polls with three threads of gloo's
    until nothing refers to it: ``destroy_process_group`` does not end them.
    """
    from torch.distributed.tensor._redistribute import clear_redistribute_planner_cache
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    _clear_sharding_prop_cache()
    clear_redistribute_planner_cache()
    _caches.extend(
        each
        for each in gc.get_objects()
        if type(each) is _lru_cache_wrapper and str(each.__module__).startswith("torch.dist")
    )
    for cache in _caches:
        cache.cache_clear()
    for _ in range(3):  # the first one does not find all
        gc.collect()
    # What is left is of modules: half a million objects that later calls need not look through.
    gc.freeze()


def rank_directory():
    """A directory that all ranks of the group share; rank 0 makes it."""
    import torch.distributed as dist

    name = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(name)
    return name[0]
