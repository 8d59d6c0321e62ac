"""How a shard's experts are computed. A backend is a plain function with transformers' experts
contract.

    backend(experts, hidden_TD, index_TK, weights_TK) -> [T, D]

``experts`` is the family's own module, so biases, transposed and interleaved layouts, gates and
activations are the family's. Contract and attribute names: transformers/integrations/moe.py, 5.23.
"""

from collections.abc import Callable
from typing import cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm

from moe_lightning.errors import UsageError
from moe_lightning.experts.names import BackendName
from moe_lightning.experts.permute import sort_by_expert, weighted_combine

Backend = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def reference(
    experts: nn.Module, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """The family's own unmodified code: slow, obvious, the truth of the tests."""
    family_forward = cast(Backend, type(experts).forward.__wrapped__)  # type: ignore[attr-defined]
    return family_forward(experts, hidden_TD, index_TK, weights_TK)


def grouped(experts: nn.Module, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """All experts in two grouped matrix products over rows that are sorted once.

    Args:
        experts: The family's experts module.
        hidden_TD: Rows, in the model's dtype.
        index_TK: Expert of each row, in [0, number of experts of the module).
        weights_TK: Router weights, any float dtype.

    Returns:
        Weighted sum per row, ``[T, D]``, in the dtype of ``hidden_TD``.
    """
    if hidden_TD.shape[0] == 0:
        return hidden_TD
    order_N, expert_N, ends_E = sort_by_expert(index_TK, cast(int, experts.num_experts))
    rows_ND = hidden_TD[order_N // index_TK.shape[1]]
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    rows_NF = _grouped_linear(experts, name, rows_ND, expert_N, ends_E)
    activate = cast(
        Callable[[Tensor], Tensor], experts._apply_gate if experts.has_gate else experts.act_fn
    )
    rows_ND = _grouped_linear(experts, "down_proj", activate(rows_NF), expert_N, ends_E)
    if experts.has_post_expert_norm:
        rows_ND = cast(nn.Module, experts.post_expert_norm)(rows_ND)
    return weighted_combine(rows_ND, weights_TK, order_N).to(hidden_TD.dtype)


def _grouped_linear(
    experts: nn.Module, name: str, rows_NX: Tensor, expert_N: Tensor, ends_E: Tensor
) -> Tensor:
    weight = cast(Tensor, getattr(experts, name))
    if not experts.is_transposed:
        weight = weight.transpose(-2, -1)
    # grouped_mm ignores autocast (pytorch #174763), so the rows take the weights' dtype here.
    out_NY = _grouped_product(rows_NX.to(weight.dtype), weight, ends_E)
    if experts.has_bias:
        out_NY = out_NY + cast(Tensor, getattr(experts, f"{name}_bias"))[expert_N]
    return out_NY


def _grouped_product(rows_NX: Tensor, weight_EXY: Tensor, ends_E: Tensor) -> Tensor:
    if _is_aligned(rows_NX) and _is_aligned(weight_EXY):
        return grouped_mm(rows_NX, weight_EXY, offs=ends_E)
    # Widths that grouped_mm refuses: one product after the other, and one read of the host.
    ends = ends_E.tolist()
    starts = [0, *ends[:-1]]
    return torch.cat(
        [rows_NX[a:b] @ weight for a, b, weight in zip(starts, ends, weight_EXY, strict=True)]
    )


def _is_aligned(tensor: Tensor) -> bool:
    """Whether grouped_mm takes the tensor: rows a multiple of 16 bytes apart, the start as well."""
    size = tensor.element_size()
    steps = [step for step in tensor.stride() if step != 1]
    return tensor.data_ptr() % 16 == 0 and all(step * size % 16 == 0 for step in steps)


_BACKENDS: dict[str, Backend] = {"reference": reference, "grouped_mm": grouped}
BACKEND_NAMES: tuple[str, ...] = get_args(BackendName)


def choose_backend(name: str, *, device: torch.device) -> Backend:
    """The backend of that name; ``auto`` picks the fastest one that the device can run.

    Args:
        name: One of :data:`BACKEND_NAMES`.
        device: Where the experts are.

    Returns:
        The backend.

    Raises:
        UsageError: If there is no backend of that name.
    """
    if name == "auto":
        # CUDA's grouped_mm needs compute capability 8.0.
        is_old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
        name = "reference" if is_old else "grouped_mm"
    if name not in _BACKENDS:
        raise UsageError(
            f"model.experts_backend={name!r} does not exist; choose from "
            f"{', '.join(BACKEND_NAMES)}."
        )
    return _BACKENDS[name]
