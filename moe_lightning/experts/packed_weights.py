"""Weights of several experts in the layouts that CPUs compute fast; inference only.

    parameter [E, Y, X] ── pack, one expert after the other ──▶ E packed weights
    rows [N, X], sorted by expert ── one product per expert that has rows ──▶ [N, Y]

| kind | weights | rows | products | relative error against float32 |
|---|---|---|---|---|
| OneDnnWeights | as they are | as they are | oneDNN | none |
| HalfWeights | float16 | float32 | FBGEMM, float32 sums | 4e-4 |
| Int8Weights | int8, a scale per channel | uint8, a scale per row | oneDNN, int32 sums | 3e-2 |

Operators, as of torch 2.13: ``torch.ops.mkldnn`` (what Inductor's freezing uses),
``torch.ops.quantized`` and ``torch.ops.onednn``. None has a gradient.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

# oneDNN compiles a product for each number of rows (about 0.4 ms) and keeps the last 1024 of them;
# long runs have more. It reads this at its first product.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")

ROWS_HINT = 16  # the layout that oneDNN picks for so many rows serves all numbers of rows
LARGEST_HALF = torch.finfo(torch.float16).max


class Piece(NamedTuple):
    """The sorted rows of one expert.

    Attributes:
        expert: The expert.
        num_rows: How many rows it has, at least one.
    """

    expert: int
    num_rows: int


class PreparedRows(NamedTuple):
    """Rows in the form that a kind of weights multiplies.

    Attributes:
        values_RX: The rows.
        scale_R1: What each product of a row is multiplied by afterwards; None stands for 1.
    """

    values_RX: Tensor
    scale_R1: Tensor | None

    def picked(self, source_N: Tensor) -> "PreparedRows":
        """Some of the rows, in that order."""
        scale_R1 = None if self.scale_R1 is None else self.scale_R1[source_N]
        return PreparedRows(self.values_RX[source_N], scale_R1)


class PackedWeights(ABC):
    """One projection of several experts.

    Args:
        weight_EYX: Weights, one matrix per expert; any strides.
    """

    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.bfloat16, torch.float16)
    num_bytes: ClassVar[int | None] = None  # of one weight; None if it keeps its dtype
    inputs_padded_to: ClassVar[int] = 1  # the layout fills up the input width with zeros
    is_exact: ClassVar[bool] = False

    def __init__(self, weight_EYX: Tensor) -> None:
        self.packed = [self._pack(weight_YX) for weight_YX in weight_EYX]

    @classmethod
    def why_not(cls, weight: Tensor) -> str | None:
        """Why weights like this cannot be packed here; None if they can."""
        if weight.device.type != "cpu":
            return f"its layout is for CPUs and the experts are on {weight.device.type}"
        if weight.dtype not in cls.dtypes:
            return f"it does not take {weight.dtype} weights"
        if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            return "this build of PyTorch has no oneDNN"
        return None

    @staticmethod
    @abstractmethod
    def _pack(weight_YX: Tensor) -> Any:
        """One expert's weight in the packed layout."""

    @abstractmethod
    def prepare(self, rows_RX: Tensor) -> PreparedRows:
        """Bring rows into the form that these weights multiply."""

    @abstractmethod
    def _multiply(self, values_NX: Tensor, expert: int) -> Tensor:
        """Multiply rows by one expert's weight."""

    def linear(self, rows: PreparedRows, pieces: Sequence[Piece]) -> Tensor:
        """Multiply rows by their expert's weight.

        Args:
            rows: Prepared rows, sorted by expert.
            pieces: The experts of the rows, in order.

        Returns:
            ``[N, Y]``, memory of its own.
        """
        parts = torch.split(rows.values_RX, [piece.num_rows for piece in pieces])
        products = [
            self._multiply(values_NX, piece.expert)
            for values_NX, piece in zip(parts, pieces, strict=True)
        ]
        out_NY = products[0] if len(products) == 1 else torch.cat(products)
        return out_NY if rows.scale_R1 is None else out_NY.mul_(rows.scale_R1)

    def unpack(self) -> Tensor:
        """The weights as they were, ``[E, Y, X]``, bitwise.

        Raises:
            TypeError: If the kind is not exact.
        """
        raise TypeError(f"{type(self).__name__} does not keep the weights it was made of")


class OneDnnWeights(PackedWeights):
    """oneDNN's blocked layout: the same numbers in another order."""

    dtypes = (torch.float32, torch.bfloat16)
    is_exact = True

    @classmethod
    def why_not(cls, weight: Tensor) -> str | None:
        """Why weights like this cannot be packed here; None if they can."""
        bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported
        if weight.dtype == torch.bfloat16 and not bf16():
            return "this CPU has no bfloat16 instructions"
        return super().why_not(weight)

    @staticmethod
    def _pack(weight_YX: Tensor) -> Any:
        # contiguous: oneDNN is about 100 times slower on padded strides.
        return torch.ops.mkldnn._reorder_linear_weight(weight_YX.contiguous(), ROWS_HINT)

    def prepare(self, rows_RX: Tensor) -> PreparedRows:
        """Under autocast, rows may come in another dtype than the weights."""
        return PreparedRows(rows_RX.to(self.packed[0].dtype), None)

    def _multiply(self, values_NX: Tensor, expert: int) -> Tensor:
        return onednn_linear(values_NX, self.packed[expert], None)

    def unpack(self) -> Tensor:
        """The weights as they were, ``[E, Y, X]``, bitwise."""
        num_experts, first = len(self.packed), self.packed[0]
        weight_EYX = torch.empty(num_experts, *first.shape, dtype=first.dtype)
        for weight_YX, packed in zip(weight_EYX, self.packed, strict=True):
            weight_YX.copy_(packed.to_dense())  # one at a time: all of them would be a second copy
        return weight_EYX


class HalfWeights(PackedWeights):
    """float16 weights, float32 rows and sums."""

    num_bytes = 2
    inputs_padded_to = 512

    @classmethod
    def why_not(cls, weight: Tensor) -> str | None:
        """Why weights like this cannot be packed here; None if they can."""
        if "fbgemm" not in torch.backends.quantized.supported_engines:
            return "this build of PyTorch has no FBGEMM"
        reason = super().why_not(weight)
        if reason is None and weight.numel() > 0:
            low, high = torch.aminmax(weight)
            # FBGEMM would clamp, NaN as well.
            if not (low >= -LARGEST_HALF and high <= LARGEST_HALF):
                return "some of their weights are NaN or beyond float16's range"
        return reason

    @staticmethod
    def _pack(weight_YX: Tensor) -> Any:
        return torch.ops.quantized.linear_prepack_fp16(weight_YX.float().contiguous(), None)

    def prepare(self, rows_RX: Tensor) -> PreparedRows:
        """The rows stay in float32."""
        return PreparedRows(rows_RX.float(), None)

    def _multiply(self, values_NX: Tensor, expert: int) -> Tensor:
        product = torch.ops.quantized.linear_dynamic_fp16(values_NX, self.packed[expert])
        return cast(Tensor, product)


class Int8Weights(PackedWeights):
    """int8 weights with a scale per output channel; rows in uint8 with a scale per row."""

    num_bytes = 1

    def __init__(self, weight_EYX: Tensor) -> None:
        super().__init__(weight_EYX)
        self.zero_Y = torch.zeros(weight_EYX.shape[1], dtype=torch.int64)

    @staticmethod
    def _pack(weight_YX: Tensor) -> Any:
        weight_YX = weight_YX.float().contiguous()  # what follows does not look at strides
        scale_Y = (weight_YX.abs().amax(dim=1) / 127).clamp_(min=torch.finfo(torch.float32).tiny)
        whole_YX = (weight_YX / scale_Y[:, None]).round_().to(torch.int8)
        return torch.ops.onednn.qlinear_prepack(whole_YX, [ROWS_HINT, weight_YX.shape[1]]), scale_Y

    def prepare(self, rows_RX: Tensor) -> PreparedRows:
        """uint8 around 128, which VNNI multiplies by int8 directly."""
        rows_RX = rows_RX.float()
        scale_R1 = rows_RX.abs().amax(dim=1, keepdim=True).div_(127)
        scale_R1.clamp_(min=torch.finfo(torch.float32).tiny)
        return PreparedRows((rows_RX / scale_R1).add_(128.5).to(torch.uint8), scale_R1)

    def _multiply(self, values_NX: Tensor, expert: int) -> Tensor:
        weight, scale_Y = self.packed[expert]
        return cast(
            Tensor,
            torch.ops.onednn.qlinear_pointwise(
                *(values_NX, 1.0, 128, weight, scale_Y, self.zero_Y, None),
                *(1.0, 0, torch.float32, "none", [], ""),
            ),
        )


def onednn_linear(rows: Tensor, weight: Tensor, bias_Y: Tensor | None) -> Tensor:
    """``functional.linear`` by oneDNN.

    Args:
        rows: Rows ``[..., X]`` on a CPU, in the weight's dtype.
        weight: A weight from ``mkldnn._reorder_linear_weight``, or a contiguous ``[Y, X]``.
        bias_Y: The bias, if there is one.

    Returns:
        The product, ``[..., Y]``.
    """
    product = torch.ops.mkldnn._linear_pointwise(rows, weight, bias_Y, "none", [], "")
    return cast(Tensor, product)
