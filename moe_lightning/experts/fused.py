"""FusedExperts: the experts of one layer on a CUDA device, in three launches after the sort.

    rows [R, D] ─▶ up product, bias, gate [P, F] ─▶ down product, bias [P, D] ─▶ weighted sum [R, D]

Nothing is read back to the host. A gate that the kernel does not know runs as the family's own code
between the two products. For inference only. Kernels and letters: ``triton_kernels.py``.
"""

import importlib.util
import os
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import _default_apply_gate  # private; seen in 5.23
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from moe_lightning.errors import UsageError
from moe_lightning.experts.backends import grouped
from moe_lightning.experts.packed import activation, projections
from moe_lightning.experts.permute import SortedRows, sort_by_expert
from moe_lightning.experts.tiles import (
    SMALLEST_SHARED_BYTES,
    choose_tiles,
    max_programs,
    power_of_two,
)
from moe_lightning.extras import how_to_install

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COMBINE_BLOCK = 1024


class Gate(NamedTuple):
    """``(up + shift) * gate * sigmoid(alpha * gate)``, of gate and up limited.

    Attributes:
        layout: ``halves`` (all of gate, then all of up) or ``interleaved``.
        alpha: See above.
        shift: See above.
        limit: Largest gate, and largest up in either direction; None for no limit.
    """

    layout: str
    alpha: float
    shift: float
    limit: float | None


def known_gate(experts: nn.Module) -> Gate | None:
    """The gate of an experts module, if the kernel can compute it; None if it cannot."""
    if not experts.has_gate:
        return None
    formula = getattr(experts._apply_gate, "__func__", None)
    if formula is GptOssExperts._apply_gate:
        return Gate("interleaved", cast(float, experts.alpha), 1.0, cast(float, experts.limit))
    is_silu = isinstance(experts.act_fn, SiLUActivation | nn.SiLU)
    is_silu = is_silu or experts.act_fn is torch.nn.functional.silu
    # Halves of a transposed weight: neighbours in the tile would be far apart in memory.
    is_near = experts.is_concatenated and not experts.is_transposed
    if formula is _default_apply_gate and is_silu and is_near:
        return Gate("halves", 1.0, 0.0, None)
    return None


def can_fuse(experts: nn.Module) -> str | None:
    """Why the kernels cannot compute these experts; None if they can.

    Args:
        experts: The family's experts module, its weights in place.

    Returns:
        The reason, to follow a colon.
    """
    if importlib.util.find_spec("triton") is None:
        return f"triton is not installed ({how_to_install('triton')})"
    weights = [cast(Tensor, getattr(experts, name)) for name in projections(experts)]
    for weight in weights:
        if type(weight) not in (Tensor, nn.Parameter):
            return f"its kernels do not read weights of type {type(weight).__name__}"
        if weight.dtype not in DTYPES or weight.dtype != weights[0].dtype:
            return f"its kernels do not take {weight.dtype} weights"
        is_interpreted = weight.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
        if is_interpreted and weight.dtype == torch.bfloat16:
            return "Triton's interpreter cannot multiply bfloat16 (triton #11584)"
        if weight.device.type != "cuda" and not is_interpreted:
            return f"its kernels are for CUDA and the experts are on {weight.device.type}"
    device = weights[0].device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


class FusedExperts:
    """Computes experts where their weights are, with Triton.

    Args:
        experts: The family's experts module; it is read at every call and left as it is.

    Raises:
        UsageError: If the kernels cannot compute these experts.
    """

    def __init__(self, experts: nn.Module) -> None:
        reason = can_fuse(experts)
        if reason is not None:
            raise UsageError(
                f"model.experts_backend=triton cannot compute these experts: {reason}. Use "
                "experts_backend=grouped_mm."
            )
        from moe_lightning.experts import triton_kernels

        self.kernels: Any = triton_kernels
        self.experts = experts
        self.num_experts = cast(int, experts.num_experts)
        self.gate = known_gate(experts)
        device = next(experts.parameters()).device
        self.shared_limit_bytes = SMALLEST_SHARED_BYTES
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            # AMD's devices have no such property, and 64 KiB.
            self.shared_limit_bytes = getattr(
                properties, "shared_memory_per_block_optin", 64 * 1024
            )

    def __call__(self, rows_RD: Tensor, index_RK: Tensor, weights_RK: Tensor) -> Tensor:
        """Weighted sum of the experts for each row; see :data:`moe_lightning.experts.Backend`."""
        parameters = self.experts.parameters()
        if torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (rows_RD, weights_RK, *parameters)
        ):
            return grouped(self.experts, rows_RD, index_RK, weights_RK)
        if index_RK.numel() == 0:
            return torch.zeros_like(rows_RD)
        # Triton launches on the current device.
        with torch.cuda.device_of(rows_RD):  # type: ignore[no-untyped-call]
            pairs = sort_by_expert(index_RK, self.num_experts)
            up, down = projections(self.experts)
            up_PF = self._linear(up, rows_RD, pairs, index_RK.numel(), self.gate)
            if self.gate is None:
                up_PF = activation(self.experts)(up_PF)
            pairs_PD = self._linear(down, up_PF, pairs, index_RK.numel(), None)
            if self.experts.has_post_expert_norm:
                pairs_PD = cast(nn.Module, self.experts.post_expert_norm)(pairs_PD)
            return self._combine(pairs_PD, index_RK, weights_RK, rows_RD.dtype)

    def _linear(
        self, name: str, rows_RX: Tensor, pairs: SortedRows, num_pairs: int, gate: Gate | None
    ) -> Tensor:
        weight_EYX = cast(Tensor, getattr(self.experts, name))
        if self.experts.is_transposed:
            weight_EYX = weight_EYX.transpose(1, 2)
        _, y, x = weight_EYX.shape
        bias = (
            cast(Tensor, getattr(self.experts, f"{name}_bias")) if self.experts.has_bias else None
        )
        rows_RX = rows_RX.to(weight_EYX.dtype)
        out_PY = rows_RX.new_empty(num_pairs, y if gate is None else y // 2)
        tiles = choose_tiles(
            num_pairs,
            num_experts=self.num_experts,
            in_width=x,
            out_width=y,
            dtype=weight_EYX.dtype,
            shared_limit_bytes=self.shared_limit_bytes,
        )
        self.kernels.grouped_linear[(max_programs(num_pairs, self.num_experts, y, tiles),)](
            *(out_PY, rows_RX, weight_EYX, None if bias is None else bias.contiguous()),
            *(pairs.order_N, pairs.ends_E, self.num_experts),
            *(*rows_RX.stride(), *weight_EYX.stride()),
            X=x,
            Y=y,
            PAIRS_A_ROW=num_pairs // rows_RX.shape[0],
            GATE="none" if gate is None else gate.layout,
            ALPHA=1.0 if gate is None else gate.alpha,
            SHIFT=0.0 if gate is None else gate.shift,
            LIMIT=None if gate is None else gate.limit,
            E=power_of_two(self.num_experts, least=16),
            **tiles._asdict(),
        )
        return out_PY

    def _combine(
        self, pairs_PD: Tensor, index_RK: Tensor, weights_RK: Tensor, dtype: torch.dtype
    ) -> Tensor:
        num_rows, top_k = index_RK.shape
        width = pairs_PD.shape[1]
        out_RD = pairs_PD.new_empty(num_rows, width, dtype=dtype)
        block = min(COMBINE_BLOCK, power_of_two(width, least=16))
        self.kernels.combine[(num_rows, -(-width // block))](
            *(out_RD, pairs_PD.contiguous(), index_RK.contiguous(), weights_RK.contiguous()),
            self.num_experts,
            D=width,
            K=top_k,
            BLOCK_D=block,
        )
        return out_RD
