"""RowFormat: how a row travels between ranks. One message holds all that belongs to a row."""

from typing import NamedTuple

import torch
from torch import Tensor

ROW_ALIGNMENT = 16
"""Bytes; grouped matrix products want rows that start at a multiple of it."""


class RowFormat(NamedTuple):
    """How a row is laid out on the wire: the row itself, its router weights, its local experts.

    Attributes:
        width: D.
        dtype: Dtype of the row on the wire.
        top_k: K.
        weights_dtype: Dtype of the router weights, on the wire as well.
    """

    width: int
    dtype: torch.dtype
    top_k: int
    weights_dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of a row."""
        return _aligned(self._index_at + 4 * self.top_k, ROW_ALIGNMENT)

    @property
    def _weights_at(self) -> int:
        return _aligned(self.width * self.dtype.itemsize, 8)

    @property
    def _index_at(self) -> int:
        return _aligned(self._weights_at + self.top_k * self.weights_dtype.itemsize, 4)

    def pack(self, rows_RD: Tensor, weights_RK: Tensor, index_RK: Tensor | None) -> Tensor:
        """Lay rows out.

        Args:
            rows_RD: The rows, cast to the dtype of the wire.
            weights_RK: Their router weights.
            index_RK: Their local experts; None, for gradients, sends zeros.

        Returns:
            ``[R, num_bytes]`` uint8.
        """
        shape = (rows_RD.shape[0], self.num_bytes)
        bytes_RX = torch.empty(shape, dtype=torch.uint8, device=rows_RD.device)
        rows_view, weights_view, index_view = self.views(bytes_RX)
        rows_view.copy_(rows_RD)
        weights_view.copy_(weights_RK)
        if index_RK is None:
            index_view.zero_()
        else:
            index_view.copy_(index_RK)
        return bytes_RX

    def views(self, bytes_RX: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rows, router weights and local experts (int32) in the bytes, without a copy."""
        ends = (
            self.width * self.dtype.itemsize,
            self._weights_at + self.top_k * self.weights_dtype.itemsize,
            self._index_at + 4 * self.top_k,
        )
        return (
            bytes_RX[:, : ends[0]].view(self.dtype),
            bytes_RX[:, self._weights_at : ends[1]].view(self.weights_dtype),
            bytes_RX[:, self._index_at : ends[2]].view(torch.int32),
        )


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
