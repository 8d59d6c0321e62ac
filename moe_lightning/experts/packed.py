"""PackedExperts: an experts module whose weights have been moved into a packed layout."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from moe_lightning.experts.packed_weights import PackedWeights, Piece
from moe_lightning.experts.permute import sort_by_expert, weighted_combine


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
        for name in projections(experts):
            parameter = cast(nn.Parameter, getattr(experts, name))
            weight = parameter.detach()
            self.weights[name] = kind(weight.transpose(1, 2) if experts.is_transposed else weight)
            # One NaN seen as a whole tensor: whoever uses it by mistake will notice.
            parameter.data = torch.full((), math.nan, dtype=weight.dtype).expand(weight.shape)

    def __call__(self, rows_RD: Tensor, index_RK: Tensor, weights_RK: Tensor) -> Tensor:
        """Weighted sum of the experts for each row; see :data:`moe_lightning.experts.Backend`."""
        assert not (torch.is_grad_enabled() and rows_RD.requires_grad), (
            "packed weights have no gradients; training uses grouped_mm"
        )
        rows = sort_by_expert(index_RK, self.num_experts)
        if rows.order_N.numel() == 0:
            return torch.zeros_like(rows_RD)
        ends = [0, *rows.ends_E.tolist()]
        pieces = [Piece(e, b - a) for e, (a, b) in enumerate(pairwise(ends)) if b > a]
        up, down = projections(self.experts)
        source_N = rows.order_N // index_RK.shape[1]
        rows_NF = self._linear(up, rows_RD, source_N, rows.expert_N, pieces)
        rows_NF = activation(self.experts)(rows_NF)
        rows_ND = self._linear(down, rows_NF, None, rows.expert_N, pieces)
        if self.experts.has_post_expert_norm:
            rows_ND = cast(nn.Module, self.experts.post_expert_norm)(rows_ND)
        return weighted_combine(rows_ND, weights_RK, rows).to(rows_RD.dtype)

    def _linear(
        self,
        name: str,
        rows: Tensor,
        source_N: Tensor | None,
        expert_N: Tensor,
        pieces: list[Piece],
    ) -> Tensor:
        out_NY = self.weights[name].linear(rows, source_N, pieces)
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
