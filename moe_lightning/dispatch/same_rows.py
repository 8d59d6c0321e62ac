"""SameRows: ranks that hold the same rows (a tensor-parallel group) share their work.

every rank: rows 0..T ──▶ rank r: its slice ──▶ its work ──▶ gathered ──▶ every rank: rows 0..T

The gradient of rows that all ranks hold is the same on all of them, so a slice's gradient is
gathered, and the gradient of what was gathered is sliced. Nothing is added up.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor


class SameRows:
    """A group of ranks that hold the same rows.

    Args:
        group: The ranks.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def slice(self, rows_TX: Tensor) -> Tensor:
        """This rank's rows; ranks with less than the others, or none, come last."""
        return cast(Tensor, _Slice.apply(rows_TX, self.group))  # type: ignore[no-untyped-call]

    def gather(self, rows_RX: Tensor, num_tokens: int) -> Tensor:
        """The rows of all ranks.

        Args:
            rows_RX: What this rank made of its slice.
            num_tokens: Rows of all ranks, T.

        Returns:
            ``[T, X]``, the same on all ranks.
        """
        return cast(Tensor, _Gather.apply(rows_RX, num_tokens, self.group))  # type: ignore[no-untyped-call]


def _rows_each(num_tokens: int, group: dist.ProcessGroup) -> int:
    return -(-num_tokens // group.size())


def _sliced(rows_TX: Tensor, group: dist.ProcessGroup) -> Tensor:
    each = _rows_each(rows_TX.shape[0], group)
    start = min(group.rank() * each, rows_TX.shape[0])
    return rows_TX[start : start + each]


def _gathered(rows_RX: Tensor, num_tokens: int, group: dist.ProcessGroup) -> Tensor:
    each = _rows_each(num_tokens, group)
    # Slices are padded to the same size: the rows that are too many stand behind all others.
    mine_RX = rows_RX.new_zeros(each, *rows_RX.shape[1:])
    mine_RX[: rows_RX.shape[0]] = rows_RX
    all_TX = rows_RX.new_empty(each * group.size(), *rows_RX.shape[1:])
    dist.all_gather_into_tensor(all_TX, mine_RX, group=group)
    return all_TX[:num_tokens]


class _Slice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_TX: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.num_tokens = group, rows_TX.shape[0]
        return _sliced(rows_TX, group)

    @staticmethod
    def backward(ctx: Any, grad_RX: Tensor) -> tuple[Tensor, None]:
        return _gathered(grad_RX, ctx.num_tokens, ctx.group), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RX: Tensor, num_tokens: int, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        # A tensor saved after the collective: see exchange._ReceiveBack on recomputation.
        ctx.save_for_backward(rows_RX.new_empty(0))
        return _gathered(rows_RX, num_tokens, group)

    @staticmethod
    def backward(ctx: Any, grad_TX: Tensor) -> tuple[Tensor, None, None]:
        _ = ctx.saved_tensors
        return _sliced(grad_TX, ctx.group), None, None
