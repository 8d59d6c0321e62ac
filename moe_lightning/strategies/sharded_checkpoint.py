"""Saving and loading training checkpoints over ranks: each rank writes and reads its own share.

    save:   X.ckpt.tmp-<id> ◀── every rank ──▶ complete.json ──▶ X.ckpt ──▶ older one removed
    load:   X.ckpt ──▶ every rank reads its rows, whatever ranks wrote them

What is in the directory, lives in ``modeling/training_checkpoint``; names of tensors in
``modeling/sharded_state``.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from moe_lightning.collectives import RankGroup
from moe_lightning.errors import CheckpointError, UsageError
from moe_lightning.modeling.expert_rows import ExpertRows
from moe_lightning.modeling.sharded_state import (
    OPTIMIZER,
    Share,
    make_state,
    model_tensors,
    optimizer_state,
    restore_groups,
    without_expert,
)
from moe_lightning.modeling.training_checkpoint import (
    SafeReader,
    find_sharded,
    read_meta,
    read_tensors,
)
from moe_lightning.strategies.agreement import by_rank_0, of_all_ranks, together
from moe_lightning.strategies.checkpoint_directories import begin, finish
from moe_lightning.strategies.random_states import random_states, restore_random_states


def save_sharded(
    path: Path,
    model: nn.Module,
    *,
    optimizer: Optimizer | None = None,
    rows: Mapping[str, ExpertRows],
    rest: Mapping[str, Any],
    ranks: RankGroup | None = None,
    only_trainable: bool = False,
) -> None:
    """Save a model that ranks share; all ranks call this together.

    Args:
        path: The directory to make. One that is there is replaced once the new one is complete.
        model: This rank's share.
        optimizer: Its optimizer.
        rows: What rows of this rank's parameters are experts, by name.
        rest: What else is saved; rank 0's is.
        ranks: All ranks, on a group that moves objects of the host; None is a process alone.
        only_trainable: Whether frozen parameters are left out.

    Raises:
        UsageError: If the directory cannot be written; an older one of its name is as it was.
    """
    ranks = ranks or RankGroup()
    found = model_tensors(model)
    left_out = [n for n, t in found.tensors.items() if only_trainable and _is_frozen(t)]
    state = None if optimizer is None else optimizer_state(optimizer, found.tensors)
    share = Share()
    for name, tensor in found.tensors.items():
        if name not in left_out:
            share.add(name, tensor, rows.get(name))
    for name, states in ({} if state is None else state.tensors).items():
        for key, value in states.items():
            share.add(
                name, value, rows.get(name) if value.ndim else None, form=f"{OPTIMIZER}{{}}.{key}"
            )
    random = of_all_ranks(random_states(), ranks)
    meta = {
        "rest": dict(rest),
        "groups": None if state is None else state.groups,
        "random": random,
        "aliases": found.aliases,
        "left_out": left_out,
    }
    temporary = Path(by_rank_0(ranks, lambda: str(begin(path)), f"{path} cannot be written"))
    try:
        save(
            share.tensors,
            storage_writer=FileSystemWriter(temporary, sync_files=True),
            process_group=ranks.group,
            no_dist=ranks.group is None,
        )
    except CheckpointException as error:
        by_rank_0(ranks, lambda: shutil.rmtree(temporary, ignore_errors=True), "")
        reason = "; ".join(
            sorted({f"rank {r}: {e[0]}" for r, e in error.failures.items() if e[0] is not None})
        )
        raise UsageError(
            f"{path} cannot be written ({reason}). Free space, or choose another directory; the "
            "previous checkpoint is as it was."
        ) from error
    by_rank_0(ranks, lambda: finish(temporary, path, meta), f"{path} cannot be written")


def load_sharded(
    path: Path,
    model: nn.Module,
    *,
    optimizer: Optimizer | None = None,
    rows: Mapping[str, ExpertRows],
    ranks: RankGroup | None = None,
) -> dict[str, Any]:
    """Load what :func:`save_sharded` saved, over any ranks; all of them call this together.

    Args:
        path: The directory.
        model: This rank's share; filled in place.
        optimizer: Its optimizer; None loads the model alone.
        rows: What rows of this rank's parameters are experts, by name.
        ranks: All ranks; None is a process alone.

    Returns:
        What else was saved.

    Raises:
        CheckpointError: If it is damaged, or of another model.
    """
    ranks = ranks or RankGroup()
    directory = Path(by_rank_0(ranks, lambda: str(_find(path)), f"{path} cannot be read"))

    def read() -> tuple[dict[str, Any], dict[str, TensorStorageMetadata]]:
        meta = read_meta(directory)
        stored = read_tensors(directory)
        return meta, stored

    meta, stored = together(ranks, read)
    share, names = _wanted(model, rows, meta)
    _check_names(directory, set().union(*of_all_ranks(names, ranks)), stored)
    if optimizer is not None:
        _add_optimizer(share, optimizer, model, rows, meta, stored)
    together(ranks, lambda: _check_tensors(directory, share.tensors, stored))

    def fill() -> None:
        try:
            # Every rank knows what it wants and where that is: there is nothing to agree on.
            load(share.tensors, storage_reader=SafeReader(directory), no_dist=True)
        except CheckpointException as error:
            raise CheckpointError(f"{directory} cannot be read: {error}") from error

    together(ranks, fill)
    share.finish_reading()
    if optimizer is not None:
        restore_random_states(meta["random"], rank=ranks.rank, num_ranks=ranks.size)
    rest: dict[str, Any] = meta["rest"]
    return rest


def _find(path: Path) -> Path:
    directory = find_sharded(path)
    if directory is None:
        raise CheckpointError(f"{path}: there is no training checkpoint directory of that name.")
    return directory


def _is_frozen(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and not tensor.requires_grad


def _wanted(
    model: nn.Module, rows: Mapping[str, ExpertRows], meta: Mapping[str, Any]
) -> tuple[Share, set[str]]:
    """The tensors of this rank's share that are in a checkpoint, and all names that it knows."""
    share = Share()
    left_out = set(meta["left_out"])
    names = set(left_out)
    for name, tensor in model_tensors(model).tensors.items():
        source = meta["aliases"].get(name, name)  # a tensor that was tied to another
        names.add(source)
        if source not in left_out:
            share.add(source, tensor, rows.get(name))
    return share, names


def _add_optimizer(
    share: Share,
    optimizer: Optimizer,
    model: nn.Module,
    rows: Mapping[str, ExpertRows],
    meta: Mapping[str, Any],
    stored: Mapping[str, TensorStorageMetadata],
) -> None:
    if meta["groups"] is None:
        raise CheckpointError(
            "this training checkpoint was saved without its optimizer, so fit cannot go on from "
            "it. Export it, and start a new fit from that."
        )
    sizes: dict[str, dict[str, int]] = {}
    for key, saved in stored.items():
        if key.startswith(OPTIMIZER):
            name, _, state = key.removeprefix(OPTIMIZER).rpartition(".")
            sizes.setdefault(without_expert(name)[0], {})[state] = len(saved.size)
    parameters = model_tensors(model).tensors
    for name, states in make_state(optimizer, parameters, sizes).items():
        for state, tensor in states.items():
            of_experts = rows.get(name) if tensor.ndim else None
            share.add(name, tensor, of_experts, form=f"{OPTIMIZER}{{}}.{state}")
    restore_groups(optimizer, parameters, meta["groups"])


def _check_names(
    directory: Path, known: set[str], stored: Mapping[str, TensorStorageMetadata]
) -> None:
    names = {without_expert(key)[0] for key in stored if not key.startswith(OPTIMIZER)}
    if unexpected := sorted(names - known):
        raise CheckpointError(
            f"{directory}: the model has no place for {', '.join(unexpected[:3])}. {_SAME_MODEL}"
        )


def _check_tensors(
    directory: Path, tensors: Mapping[str, Tensor], stored: Mapping[str, TensorStorageMetadata]
) -> None:
    if missing := sorted(tensors.keys() - stored.keys()):
        raise CheckpointError(
            f"{directory}: there is no {', '.join(missing[:3])}, which the model needs. "
            f"{_SAME_MODEL}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != stored[name].size:
            raise CheckpointError(
                f"{directory}: {name} is {list(stored[name].size)}, and {list(tensor.shape)} in "
                f"the model. {_SAME_MODEL}"
            )


_SAME_MODEL = (
    "Give the --model.checkpoint and --model.lora with which fit saved this training checkpoint."
)
