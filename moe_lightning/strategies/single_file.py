"""Loading Lightning's single-file checkpoint of one device into a model that ranks share.

Every rank maps the file into memory and copies its own rows; nothing is sent.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moe_lightning.errors import CheckpointError
from moe_lightning.modeling.expert_rows import ExpertRows
from moe_lightning.modeling.sharded_state import (
    OPTIMIZER,
    Share,
    local_part,
    make_state,
    model_tensors,
    without_expert,
)


def load_single_file(
    path: Path,
    model: nn.Module,
    *,
    optimizer: Optimizer | None = None,
    rows: Mapping[str, ExpertRows],
) -> dict[str, Any]:
    """Load a single-file checkpoint; all ranks call this together.

    Args:
        path: The file.
        model: This rank's share; filled in place.
        optimizer: Its optimizer, with the groups of ``finetune.optimizers``; None loads the model
            alone.
        rows: What rows of this rank's parameters are experts, by name.

    Returns:
        What else was saved.

    Raises:
        CheckpointError: If it is no checkpoint, or of another model.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        whole = {k.removeprefix("model."): t for k, t in content.pop("state_dict").items()}
    except Exception as error:  # whatever the unpickler raises
        raise CheckpointError(
            f"{path} is no training checkpoint of fit ({type(error).__name__}: {error})."
        ) from error
    share = Share()
    found = model_tensors(model)
    for name, tensor in found.tensors.items():
        share.add(name, tensor, rows.get(name))
    saved = content.pop("optimizer_states", [])
    if optimizer is not None:
        whole |= _named_state(path, optimizer, found.tensors, saved)
        sizes: dict[str, dict[str, int]] = {}
        for key, tensor in whole.items():
            if key.startswith(OPTIMIZER):
                name, _, state = key.removeprefix(OPTIMIZER).rpartition(".")
                sizes.setdefault(name, {})[state] = tensor.ndim
        for name, states in make_state(optimizer, found.tensors, sizes).items():
            for state, tensor in states.items():
                of_experts = rows.get(name) if tensor.ndim else None
                share.add(name, tensor, of_experts, form=f"{OPTIMIZER}{{}}.{state}")
    for key, tensor in share.tensors.items():
        _copy(path, key, tensor, whole)
    share.finish_reading()
    rest: dict[str, Any] = content
    return rest


def _copy(path: Path, key: str, tensor: Tensor, whole: Mapping[str, Tensor]) -> None:
    name, expert = _source(key)
    if name not in whole:
        raise CheckpointError(f"{path}: there is no {name}, which the model needs. {_SAME_MODEL}")
    source = whole[name] if expert is None else whole[name][expert]
    if source.shape != tensor.shape:
        raise CheckpointError(
            f"{path}: {name} is {list(whole[name].shape)}, which does not fit. {_SAME_MODEL}"
        )
    local, offset = local_part(tensor)
    ends = (start + size for start, size in zip(offset, local.shape, strict=True))
    cut = tuple(slice(start, end) for start, end in zip(offset, ends, strict=True))
    local.copy_(source[cut])


def _source(key: str) -> tuple[str, int | None]:
    if not key.startswith(OPTIMIZER):
        return without_expert(key)
    name, _, state = key.removeprefix(OPTIMIZER).rpartition(".")
    name, expert = without_expert(name)
    return f"{OPTIMIZER}{name}.{state}", expert


def _named_state(
    path: Path, optimizer: Optimizer, parameters: Mapping[str, Tensor], saved: list[Any]
) -> dict[str, Tensor]:
    """The file numbers parameters in the order of the groups, which follows from names alone."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    if len(saved) != 1 or [len(g["params"]) for g in saved[0]["param_groups"]] != sizes:
        raise CheckpointError(
            f"{path}: its optimizer had other parameters than this one. {_SAME_MODEL}"
        )
    whole: dict[str, Tensor] = {}
    for group, old in zip(optimizer.param_groups, saved[0]["param_groups"], strict=True):
        for parameter, index in zip(group["params"], old["params"], strict=True):
            for state, value in saved[0]["state"].get(index, {}).items():
                whole[f"{OPTIMIZER}{names[id(parameter)]}.{state}"] = torch.as_tensor(value)
        group.update(
            {k: v for k, v in old.items() if k not in ("params", "foreach", "fused", "capturable")}
        )
    return whole


_SAME_MODEL = (
    "Give the --model.checkpoint, --model.lora and --model.trainable with which fit saved it."
)
