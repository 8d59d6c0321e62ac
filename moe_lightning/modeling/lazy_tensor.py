"""A tensor of a checkpoint on its way to a device.

    file ── blocks of at most 32 MiB ──▶ memory of the device and dtype that transformers asks for

transformers (5.23, ``core_model_loading._materialize_copy``) materialises what it is given with
``tensor[...].to(device=..., dtype=...)``, several tensors at once, in threads. Were ``[...]`` to
read, each thread would hold a tensor on the host, and once more in the wanted dtype; so ``to``
reads. Of a tensor that ranks share, transformers (``sharding_utils.DtensorShardOperation``) asks
for this rank's part by ``tensor[slices]``; parts are read at once.
"""

from collections.abc import Iterator, Sequence
from math import prod
from types import EllipsisType
from typing import overload

import torch
from torch import Tensor

from moe_lightning.modeling.checkpoint import TORCH_DTYPES, TensorSlice
from moe_lightning.modeling.host_memory import empty_pages

BLOCK_BYTES = 2**25


class LazyTensor:
    """A tensor of a checkpoint, or some of its rows, read straight into where it belongs.

    Args:
        piece: The tensor on disk.
        rows: Rows of dim 0 to read, in this order; None means the whole tensor.
    """

    def __init__(self, piece: TensorSlice, rows: Sequence[int] | None = None) -> None:
        self._piece = piece
        self._rows = rows
        shape = piece.get_shape()
        self.shape = shape if rows is None else [len(rows), *shape[1:]]

    @property
    def num_elements(self) -> int:
        """Numbers that will be read."""
        return prod(self.shape)

    def get_shape(self) -> list[int]:
        """The tensor's sizes, as safetensors' slices give them."""
        return self.shape

    @overload
    def __getitem__(self, index: EllipsisType) -> "LazyTensor": ...

    @overload
    def __getitem__(self, index: tuple[slice, ...]) -> Tensor: ...

    def __getitem__(self, index: EllipsisType | tuple[slice, ...]) -> "LazyTensor | Tensor":
        """All of it, read when it is known where to; or a part, one slice a dim, read now."""
        if index is ...:
            return self
        first, *others = index
        if self._rows is None:
            return self._piece[index]
        part = LazyTensor(self._piece, self._rows[first])
        dtype = TORCH_DTYPES[self._piece.get_dtype()]
        tensor = part.to(device="cpu", dtype=dtype)[:, *others]
        return tensor.clone() if tensor.numel() < part.num_elements else tensor

    def to(self, *, device: torch.device | str | int, dtype: torch.dtype) -> Tensor:
        """Read the tensor. Beside it, the host never holds more than a block of it, or one row if
        that is larger, in the file's dtype and in the wanted one.

        Args:
            device: Where it goes.
            dtype: What it becomes.

        Returns:
            The tensor, contiguous.

        Raises:
            CheckpointError: If it cannot be read.
        """
        device = torch.device(device)
        is_as_on_disk = device.type == "cpu" and dtype == TORCH_DTYPES.get(self._piece.get_dtype())
        if self._rows is None and (is_as_on_disk or not self.shape):
            return self._piece[...].to(device=device, dtype=dtype)
        if device.type == "cpu":
            tensor = empty_pages(tuple(self.shape), dtype)
        else:
            tensor = torch.empty(self.shape, dtype=dtype, device=device)
        for start, source, num_rows in self._blocks():
            tensor[start : start + num_rows].copy_(self._piece[source : source + num_rows])
        return tensor

    def _blocks(self) -> Iterator[tuple[int, int, int]]:
        """First row here, first row on disk, and number of the rows of each read."""
        dtype = TORCH_DTYPES.get(self._piece.get_dtype(), torch.uint8)
        row_bytes = prod(self.shape[1:]) * dtype.itemsize
        max_rows = max(1, BLOCK_BYTES // max(1, row_bytes))
        rows = self._rows if self._rows is not None else range(self.shape[0])
        start = 0
        while start < len(rows):
            stop = start + 1
            while stop < len(rows) and rows[stop] == rows[stop - 1] + 1 and stop - start < max_rows:
                stop += 1
            yield start, rows[start], stop - start
            start = stop
