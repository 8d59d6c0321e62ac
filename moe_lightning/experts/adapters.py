"""Low-rank adapters of fused experts: parameters of the experts module, one row per expert.

    out = W_e x + scale * B_e (A_e x)        A: [E, P, X]    B: [E, Y, P]

P is the rank, X and Y are the inputs and outputs of a projection, however its weight is stored. The
module's own parameters keep their names, so that loading, sharding and placement stay as they are.
What adapters start from lives in ``finetune.adapter_values``, PEFT's files in
``finetune.adapter_files``.
"""

import copy
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from moe_lightning.experts.packed import projections

LORA_A, LORA_B = "lora_A", "lora_B"


class ExpertsAdapter(NamedTuple):
    """The adapter of one projection of a layer's experts.

    Attributes:
        a_EPX: From the inputs to the rank.
        b_EYP: From the rank to the outputs.
        scale: Factor of what the adapter adds.
    """

    a_EPX: Tensor
    b_EYP: Tensor
    scale: float


def add_experts_adapter(
    experts: nn.Module, projection: str, *, rank: int, scale: float
) -> tuple[str, str]:
    """Give a projection of an experts module an adapter of zeros.

    Args:
        experts: The family's experts module, on any device, meta too; changed in place.
        projection: The projection's parameter, ``[E, Y, X]``, or ``[E, X, Y]`` if transposed.
        rank: The rank of each expert's adapter.
        scale: Factor of what the adapter adds; one for all of a module's projections.

    Returns:
        The names of the two new parameters in the module.
    """
    weight = cast(Tensor, getattr(experts, projection))
    num_experts, num_outputs, num_inputs = weight.shape
    if experts.is_transposed:
        num_outputs, num_inputs = num_inputs, num_outputs
    names = f"{projection}_{LORA_A}", f"{projection}_{LORA_B}"
    shapes = (num_experts, rank, num_inputs), (num_experts, num_outputs, rank)
    for name, shape in zip(names, shapes, strict=True):
        zeros = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        experts.register_parameter(name, nn.Parameter(zeros))
    # A plain attribute: it belongs to the options, not to the weights.
    object.__setattr__(experts, "lora_scale", scale)
    return names


def experts_adapter(experts: nn.Module, projection: str) -> ExpertsAdapter | None:
    """The adapter of a projection; None if it has none.

    Args:
        experts: The family's experts module.
        projection: The projection's parameter.

    Returns:
        The adapter, its tensors as they are now.
    """
    a_EPX = getattr(experts, f"{projection}_{LORA_A}", None)
    if a_EPX is None:
        return None
    b_EYP = cast(Tensor, getattr(experts, f"{projection}_{LORA_B}"))
    return ExpertsAdapter(cast(Tensor, a_EPX), b_EYP, cast(float, experts.lora_scale))


def has_adapters(experts: nn.Module) -> bool:
    """Whether a projection of an experts module has an adapter."""
    return any(experts_adapter(experts, name) is not None for name in projections(experts))


def padded(adapter: ExpertsAdapter, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An adapter's tensors with zeros up to a rank that takes 16 bytes, as grouped_mm wants it.

    Args:
        adapter: The adapter.
        dtype: Dtype that the products are computed in.

    Returns:
        A ``[E, P', X]`` and B ``[E, Y, P']``.
    """
    a_EPX, b_EYP = adapter.a_EPX.to(dtype), adapter.b_EYP.to(dtype)
    lacking = -a_EPX.shape[1] % (16 // dtype.itemsize)
    if lacking == 0:
        return a_EPX, b_EYP
    return pad(a_EPX, (0, 0, 0, lacking)), pad(b_EYP, (0, lacking))


def merged(
    weight: Tensor, a: Tensor, b: Tensor, *, scale: float, is_transposed: bool = False
) -> Tensor:
    """A weight with its adapter added, in no less than float32 until the end.

    Args:
        weight: ``[..., Y, X]``, or ``[..., X, Y]`` if transposed; left alone.
        a: ``[..., P, X]``.
        b: ``[..., Y, P]``.
        scale: Factor of what the adapter adds.
        is_transposed: Whether the weight is stored with its inputs first.

    Returns:
        The merged weight, in the weight's dtype and layout.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    delta = scale * (b.to(dtype) @ a.to(dtype))
    return (weight.to(dtype) + (delta.mT if is_transposed else delta)).to(weight.dtype)


def with_merged_weights(experts: nn.Module) -> nn.Module:
    """A view of an experts module whose adapted projections are merged, for the family's own code.

    It takes the memory of the merged weights; gradients go through to weights and adapters.

    Args:
        experts: The family's experts module; left alone.

    Returns:
        The module itself if it has no adapters.
    """
    if not has_adapters(experts):
        return experts
    view = copy.copy(experts)
    view._parameters = dict(experts._parameters)
    for name in projections(experts):
        adapter = experts_adapter(experts, name)
        if adapter is not None:
            weight = cast(Tensor, view._parameters.pop(name))
            a_EPX, b_EYP, scale = adapter
            whole = merged(
                weight, a_EPX, b_EYP, scale=scale, is_transposed=cast(bool, experts.is_transposed)
            )
            object.__setattr__(view, name, whole)
    return view
