"""Some of a checkpoint's experts: which tensors hold them, under which names they become a whole.

    experts {1, 3, 7} of a layer:   ...experts.1.w1, ...experts.3.w1, ...experts.7.w1
                          renamed   ...experts.0.w1, ...experts.1.w1, ...experts.2.w1
                       or, fused,   rows 1, 3, 7 of ...experts.gate_up_proj

transformers' converters then see a smaller model with all of its experts. Nothing else is read;
reading lives in ``lazy_tensor``, filling in ``filling``.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_lightning.errors import CheckpointError
from moe_lightning.modeling.checkpoint import CheckpointView
from moe_lightning.modeling.lazy_tensor import LazyTensor
from moe_lightning.modeling.seam import MoELayer, find_moe_layers
from moe_lightning.modeling.tensor_names import Target, find_targets


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor to load.

    Attributes:
        name: Its name on disk, with the expert's local number if it is of one expert.
        target: Where it goes.
        tensor: What is to be read.
    """

    name: str
    target: Target
    tensor: LazyTensor


def keep_experts(layer: MoELayer, expert_ids: Sequence[int]) -> None:
    """Cut a layer's experts module on meta down to some of its experts.

    Args:
        layer: The layer; its module is changed in place.
        expert_ids: Logical experts to keep, in the order of the rows to come; may be empty.

    Raises:
        ValueError: If an expert does not exist or is named twice.
    """
    if len(set(expert_ids)) != len(expert_ids) or not all(
        0 <= e < layer.num_experts for e in expert_ids
    ):
        raise ValueError(
            f"experts {list(expert_ids)} of layer {layer.layer}: each must be in [0, "
            f"{layer.num_experts}), and there only once."
        )
    for name, parameter in list(layer.experts.named_parameters(recurse=False)):
        assert parameter.shape[0] == layer.num_experts, f"{layer.name}.{name} is not per expert"
        shape = (len(expert_ids), *parameter.shape[1:])
        setattr(
            layer.experts,
            name,
            nn.Parameter(torch.empty(shape, dtype=parameter.dtype, device="meta")),
        )
    object.__setattr__(layer.experts, "num_experts", len(expert_ids))


def select_sources(
    model: PreTrainedModel, view: CheckpointView, experts: Mapping[int, Sequence[int]]
) -> list[Source]:
    """Cut a model's experts down, and choose the tensors that fill what is left.

    Args:
        model: The checkpoint's model on meta, whole; changed in place.
        view: The opened checkpoint.
        experts: For each MoE layer the logical experts to keep; a layer left out keeps all.

    Returns:
        Every tensor of the checkpoint but those of the experts left out.

    Raises:
        CheckpointError: If the experts' tensors cannot be told apart.
        ValueError: If an expert, or a layer with experts, is asked for that does not exist.
    """
    layers = find_moe_layers(model)
    if unknown := experts.keys() - {layer.layer for layer in layers}:
        raise ValueError(
            f"layers {sorted(unknown)} have no experts, but experts were asked of them."
        )
    targets = find_targets(model, view.tensors)
    chosen: dict[str, tuple[Sequence[int], int]] = {}
    for layer in layers:
        if layer.layer in experts:
            ids, num_experts = experts[layer.layer], layer.num_experts
            for name, _ in layer.experts.named_parameters(recurse=False):
                chosen[f"{layer.name}.{name}"] = (ids, num_experts)
            keep_experts(layer, ids)
    sources = []
    for name, piece in view.slices(view.tensors).items():
        target = targets[name]
        if target.name not in chosen:
            sources.append(Source(name, target, LazyTensor(piece)))
            continue
        ids, num_experts = chosen[target.name]
        number = _expert_number(name, target.pattern)
        if number is not None:
            expert = int(number[1])
            if expert in ids:
                local = f"{name[: number.start(1)]}{ids.index(expert)}{name[number.end(1) :]}"
                sources.append(Source(local, target, LazyTensor(piece)))
        elif piece.get_shape()[:1] != [num_experts]:
            raise CheckpointError(
                f"{view.path}: tensor {name!r} is {piece.get_shape()}, so it is not known which "
                f"part of it belongs to which of {num_experts} experts, and experts cannot be "
                "loaded one by one. Load the model with transformers and save it again."
            )
        elif ids:
            sources.append(Source(name, target, LazyTensor(piece, ids)))
    return sources


def _expert_number(name: str, pattern: str | None) -> re.Match[str] | None:
    """Where a name on disk names one expert by number; None for a fused tensor of all experts."""
    if pattern is None or "*" not in pattern:
        return None
    return re.search(r"experts\.(\d+)\.", name)
