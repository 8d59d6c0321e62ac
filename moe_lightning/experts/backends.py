"""How a shard's experts are computed, and how one of the ways is chosen.

    backend(rows_RD, index_RK, weights_RK) -> [R, D]

The experts are the family's own module, so biases, transposed and interleaved layouts, gates and
activations are the family's. Contract and attribute names: transformers/integrations/moe.py, 5.23.
"""

import logging
from collections.abc import Callable
from functools import cache, partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm

from moe_lightning.errors import UsageError
from moe_lightning.experts.adapters import (
    experts_adapter,
    has_adapters,
    padded,
    with_merged_weights,
)
from moe_lightning.experts.names import BACKEND_NAMES
from moe_lightning.experts.own_backend import import_maker, is_own
from moe_lightning.experts.packed import PackedExperts, activation, projections
from moe_lightning.experts.packed_weights import (
    HalfWeights,
    Int8Weights,
    OneDnnWeights,
    PackedWeights,
)
from moe_lightning.experts.permute import SortedRows, sort_by_expert, weighted_combine

Backend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Computes received rows: (rows ``[R, D]``, *local* experts ``[R, K]``, router weights ``[R, K]``)
to the weighted sum of each row, ``[R, D]``, in the dtype of the rows. A local expert that is the
number of experts of the module stands for one that is computed elsewhere: it adds nothing."""

PACKED: dict[str, type[PackedWeights]] = {
    "cpu_packed": OneDnnWeights,
    "cpu_half": HalfWeights,
    "cpu_int8": Int8Weights,
}
_log = logging.getLogger("moe_lightning")


def reference(experts: nn.Module, rows_RD: Tensor, index_RK: Tensor, weights_RK: Tensor) -> Tensor:
    """The family's own unmodified code: slow, obvious, the truth of the tests."""
    if experts.num_experts == 0:
        return torch.zeros_like(rows_RD)
    family_forward = cast(
        Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor],
        type(experts).forward.__wrapped__,  # type: ignore[attr-defined]
    )
    experts = with_merged_weights(experts)
    is_here = index_RK < cast(int, experts.num_experts)
    if bool(is_here.all()):
        return family_forward(experts, rows_RD, index_RK, weights_RK)
    # Not all families skip experts that are elsewhere: the pairs that are here, as rows of their
    # own.
    row_N, k_N = is_here.nonzero(as_tuple=True)
    index_N1, weights_N1 = index_RK[row_N, k_N, None], weights_RK[row_N, k_N, None]
    rows_ND = family_forward(experts, rows_RD[row_N], index_N1, weights_N1)
    return torch.zeros_like(rows_RD).index_add(0, row_N, rows_ND)


def grouped(experts: nn.Module, rows_RD: Tensor, index_RK: Tensor, weights_RK: Tensor) -> Tensor:
    """All experts in two grouped matrix products over rows that are sorted once."""
    rows = sort_by_expert(index_RK, cast(int, experts.num_experts))
    if rows.order_N.numel() == 0 or experts.num_experts == 0:
        return torch.zeros_like(rows_RD)
    up, down = projections(experts)
    rows_ND = rows_RD[rows.order_N // index_RK.shape[1]]
    rows_NF = activation(experts)(_grouped_linear(experts, up, rows_ND, rows))
    rows_ND = _grouped_linear(experts, down, rows_NF, rows)
    if experts.has_post_expert_norm:
        rows_ND = cast(nn.Module, experts.post_expert_norm)(rows_ND)
    rows_ND = _without_elsewhere(experts, rows_ND, rows)
    return weighted_combine(rows_ND, weights_RK, rows).to(rows_RD.dtype)


def _grouped_linear(experts: nn.Module, name: str, rows_NX: Tensor, rows: SortedRows) -> Tensor:
    weight = cast(Tensor, getattr(experts, name))
    if not experts.is_transposed:
        weight = weight.transpose(-2, -1)
    # grouped_mm ignores autocast (pytorch #174763), so the rows take the weights' dtype here.
    rows_NX = rows_NX.to(weight.dtype)
    if rows_NX.requires_grad:
        rows_NX = _without_elsewhere(experts, rows_NX, rows)
    out_NY = _grouped_product(rows_NX, weight, rows.ends_E)
    adapter = experts_adapter(experts, name)
    if adapter is not None:
        a_EPX, b_EYP = padded(adapter, weight.dtype)
        rows_NP = adapter.scale * _grouped_product(rows_NX, a_EPX.mT, rows.ends_E)
        out_NY = out_NY + _grouped_product(rows_NP, b_EYP.mT, rows.ends_E)
    if out_NY.requires_grad:
        out_NY = _without_elsewhere(experts, out_NY, rows)
    if experts.has_bias:
        bias_EY = cast(Tensor, getattr(experts, f"{name}_bias"))
        out_NY = out_NY + bias_EY[rows.expert_N.clamp(max=bias_EY.shape[0] - 1)]
    return out_NY


def _without_elsewhere(experts: nn.Module, rows_NX: Tensor, rows: SortedRows) -> Tensor:
    """Zeros in the rows of experts elsewhere, and in their gradients.

    grouped_mm leaves such rows uninitialised. Those of its forward would reach gradients through
    the activation (0 * NaN), those of its backward the hidden states and biases: training has zeros
    on both sides of each product.
    """
    if not _has_rows_elsewhere(rows_NX.device):
        return rows_NX
    is_elsewhere_N1 = (rows.expert_N == cast(int, experts.num_experts))[:, None]
    return rows_NX.masked_fill(is_elsewhere_N1, 0.0)


def _has_rows_elsewhere(device: torch.device) -> bool:
    """Whether rows of experts elsewhere are among the sorted ones: on a CPU they are cut off."""
    return device.type != "cpu"


def _grouped_product(rows_NX: Tensor, weight_EXY: Tensor, ends_E: Tensor) -> Tensor:
    # In backward, the gradient of the output is an input.
    has_gradient = torch.is_grad_enabled() and (rows_NX.requires_grad or weight_EXY.requires_grad)
    out_bytes = weight_EXY.shape[-1] * weight_EXY.element_size()
    is_out_aligned = not has_gradient or out_bytes % 16 == 0
    if is_out_aligned and _is_aligned(rows_NX) and _is_aligned(weight_EXY):
        return grouped_mm(rows_NX, weight_EXY, offs=ends_E)
    # Widths that grouped_mm refuses: one product after the other, and one read of the host.
    ends = ends_E.tolist()
    starts = [0, *ends[:-1]]
    products = [
        rows_NX[a:b] @ weight for a, b, weight in zip(starts, ends, weight_EXY, strict=True)
    ]
    num_elsewhere = rows_NX.shape[0] - ends[-1]
    return torch.cat([*products, rows_NX.new_zeros(num_elsewhere, weight_EXY.shape[-1])])


def _is_aligned(tensor: Tensor) -> bool:
    """Whether grouped_mm takes the tensor: rows a multiple of 16 bytes apart, the start as well."""
    size = tensor.element_size()
    steps = [step for step in tensor.stride() if step != 1]
    return tensor.data_ptr() % 16 == 0 and all(step * size % 16 == 0 for step in steps)


def plain_backend(name: str, experts: nn.Module) -> Backend:
    """The backend that leaves the weights where they are and has gradients.

    Args:
        name: The backend asked for, as in :func:`check_name`; those that are for inference only
            give way to ``grouped_mm``.
        experts: The family's experts module.

    Returns:
        The backend.

    Raises:
        UsageError: If there is no backend of that name.
    """
    check_name(name)
    device = next(experts.parameters()).device
    # CUDA's grouped_mm needs compute capability 8.0.
    is_old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    is_reference = name == "reference" or (is_old and name != "grouped_mm")
    return partial(reference if is_reference else grouped, experts)


def make_backend(name: str, experts: nn.Module) -> Backend:
    """The backend of that name for inference; ``auto`` is the fastest exact one for the weights.

    A packed backend takes the module's weights over (see :class:`PackedExperts`). One that cannot
    serve these experts says why, once, and gives way to ``auto``.

    Args:
        name: The backend, as in :func:`check_name`.
        experts: The family's experts module, its weights in place.

    Returns:
        The backend.

    Raises:
        UsageError: If there is no backend of that name.
    """
    check_name(name)
    if name == "auto":
        return _fastest(experts)
    if name in ("reference", "grouped_mm") or experts.num_experts == 0:
        return plain_backend(name, experts)
    reason = why_not(name, experts)
    if reason is None and is_own(name):
        return import_maker(name)(experts)
    if reason is None and name == "triton":
        from moe_lightning.experts.fused import FusedExperts

        return FusedExperts(experts)
    if reason is None:
        return PackedExperts(experts, PACKED[name])
    _warn_once(f"model.experts_backend={name} is not used for some experts: {reason}.")
    return _fastest(experts)


def _fastest(experts: nn.Module) -> Backend:
    """Measured by scripts/bench_experts.py."""
    if why_not("cpu_packed", experts) is None:
        return PackedExperts(experts, OneDnnWeights)
    return plain_backend("auto", experts)


def why_not(name: str, experts: nn.Module) -> str | None:
    """Why a backend for inference cannot serve these experts; None if it can."""
    if experts.num_experts == 0:
        return "there are none here"
    if has_adapters(experts):
        return "they have LoRA adapters"
    if is_own(name):
        return None
    if name == "triton":
        from moe_lightning.experts.fused import can_fuse

        return can_fuse(experts)
    weights = [cast(Tensor, getattr(experts, projection)) for projection in projections(experts)]
    reasons = [PACKED[name].why_not(weight) for weight in weights]
    return next((reason for reason in reasons if reason is not None), None)


def bytes_per_weight(name: str, dtype: torch.dtype, device_type: str) -> int:
    """Bytes that one expert weight takes in inference.

    Args:
        name: The backend.
        dtype: Dtype that the weights are loaded in.
        device_type: ``cpu`` or ``cuda``.

    Returns:
        Bytes per weight; scales and biases are too few to count.
    """
    packed = PACKED[name].num_bytes if name in PACKED and device_type == "cpu" else None
    return dtype.itemsize if packed is None else packed


def bytes_of_experts(name: str, experts: nn.Module, device_type: str) -> int:
    """Bytes that a module's experts take in inference, with what their layout pads.

    Args:
        name: The backend.
        experts: The family's experts module; it may be on meta.
        device_type: ``cpu`` or ``cuda``.

    Returns:
        Bytes of all its experts.
    """
    kind = PACKED.get(name) if device_type == "cpu" else None
    total = 0
    for parameter_name, parameter in experts.named_parameters():
        each = parameter.element_size()
        num_weights = parameter.numel()
        if kind is not None and parameter_name in projections(experts):
            width = parameter.shape[1 if experts.is_transposed else 2]
            num_weights = num_weights // width * _rounded_up(width, kind.inputs_padded_to)
            each = bytes_per_weight(name, parameter.dtype, device_type)
        total += num_weights * each
    return total


def _rounded_up(number: int, step: int) -> int:
    return -(-number // step) * step


def check_name(name: str) -> None:
    """Refuse what is no backend.

    Args:
        name: One of :data:`BACKEND_NAMES`, or the import path of a function that makes one.

    Raises:
        UsageError: If there is no backend of that name.
    """
    if is_own(name):
        import_maker(name)
    elif name not in BACKEND_NAMES:
        raise UsageError(
            f"model.experts_backend={name!r} does not exist; choose from "
            f"{', '.join(BACKEND_NAMES)}, or name a function of your own as MODULE.FUNCTION."
        )


@cache
def _warn_once(message: str) -> None:
    _log.warning(message)
