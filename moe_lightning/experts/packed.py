"""PackedExperts: an experts module whose weights have been moved into a packed layout."""

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from moe_lightning.experts.chunks import cut
from moe_lightning.experts.packed_weights import PackedWeights, Piece, PreparedRows
from moe_lightning.experts.permute import sort_by_expert

CHUNK_NUMBERS = 2**21  # what is computed at a time: 8 MB, which stays in the caches


def projections(experts: nn.Module) -> tuple[str, str]:
    """The names of an experts module's two weights: up (with the gate, if it has one) and down."""
    return ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")


def activation(experts: nn.Module) -> Callable[[Tensor], Tensor]:
    """What stands between the two projections of an experts module."""
    chosen = experts._apply_gate if experts.has_gate else experts.act_fn
    return cast(Callable[[Tensor], Tensor], chosen)


class PackedExperts:
    """Computes experts from packed weights. The module keeps its parameters' names and shapes, not
    their memory.

    Args:
        experts: The family's experts module; its weights are taken over.
        kind: The layout.
    """

    @torch.inference_mode(False)
    def __init__(self, experts: nn.Module, kind: type[PackedWeights]) -> None:
        self.experts = experts
        self.kind = kind
        self.weights: dict[str, PackedWeights] = {}
        self.num_experts = cast(int, experts.num_experts)
        self._up, self._down = projections(experts)
        widest = 1
        for name in projections(experts):
            parameter = cast(nn.Parameter, getattr(experts, name))
            weight = parameter.detach()
            widest = max(widest, *weight.shape[1:])
            self.weights[name] = kind(weight.transpose(1, 2) if experts.is_transposed else weight)
            # One NaN seen as a whole tensor: whoever uses it by mistake will notice.
            parameter.data = torch.full((), math.nan, dtype=weight.dtype).expand(weight.shape)
        self._limit_rows = max(1, CHUNK_NUMBERS // widest)

    def __call__(self, rows_RD: Tensor, index_RK: Tensor, weights_RK: Tensor) -> Tensor:
        """Weighted sum of the experts for each row; see :data:`moe_lightning.experts.Backend`."""
        assert not (torch.is_grad_enabled() and rows_RD.requires_grad), (
            "packed weights have no gradients; training uses grouped_mm"
        )
        rows = sort_by_expert(index_RK, self.num_experts)
        out_RD = torch.zeros(rows_RD.shape, dtype=torch.float32)
        if rows.order_N.numel() == 0:
            return out_RD.to(rows_RD.dtype)
        row_N = rows.order_N // index_RK.shape[1]
        weights_N1 = weights_RK.reshape(-1)[rows.order_N, None].float()
        prepared = self.weights[self._up].prepare(rows_RD)
        for chunk in cut(rows.ends_E.tolist(), limit_rows=self._limit_rows):
            part = slice(chunk.start, chunk.end)
            part_ND = self._compute(prepared.picked(row_N[part]), rows.expert_N[part], chunk.pieces)
            # In the order of the experts, whatever the chunks.
            out_RD.index_add_(0, row_N[part], part_ND.float().mul_(weights_N1[part]))
        return out_RD.to(rows_RD.dtype)

    def _compute(self, rows: PreparedRows, expert_N: Tensor, pieces: list[Piece]) -> Tensor:
        rows_NF = activation(self.experts)(self._linear(self._up, rows, expert_N, pieces))
        down = self.weights[self._down].prepare(rows_NF)
        rows_ND = self._linear(self._down, down, expert_N, pieces)
        if self.experts.has_post_expert_norm:
            rows_ND = cast(nn.Module, self.experts.post_expert_norm)(rows_ND)
        return rows_ND

    def _linear(
        self, name: str, rows: PreparedRows, expert_N: Tensor, pieces: list[Piece]
    ) -> Tensor:
        out_NY = self.weights[name].linear(rows, pieces)
        if self.experts.has_bias:
            out_NY = out_NY.add_(cast(Tensor, getattr(self.experts, f"{name}_bias"))[expert_N])
        return out_NY

    @torch.inference_mode(False)
    def make_room(self) -> None:
        """Give the module memory without its weights: NaN, until others are loaded into it."""
        for name in projections(self.experts):
            parameter = cast(nn.Parameter, getattr(self.experts, name))
            parameter.data = torch.full(parameter.shape, math.nan, dtype=parameter.dtype)
        self.weights.clear()

    @torch.inference_mode(False)
    def unpack(self) -> None:
        """Give the module its weights back, bitwise; exact layouts only.

        Raises:
            TypeError: If the layout is not exact.
        """
        for name in list(self.weights):
            weight = self.weights[name].unpack()
            del self.weights[name]
            if self.experts.is_transposed:
                weight = weight.transpose(1, 2).contiguous()
            cast(nn.Parameter, getattr(self.experts, name)).data = weight
