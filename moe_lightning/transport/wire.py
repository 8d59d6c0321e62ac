"""Rows as they travel: tensors to raw bytes and back, in the rows' own dtype or a shorter one.

    rows_RD ─ encode ─▶ rows, scales ─ buffer_of ─▶ frames ─▶ ... ─▶ frames ─ decode ─▶ rows_RD

Shorter dtypes fail closed: a row with a NaN or an infinity arrives with one. Zeros arrive
as zeros.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moe_lightning.transport.messages import WireDtype

WireDtypeName = Literal["working", "bfloat16", "float16", "int8"]

_TORCH = {
    WireDtype.FLOAT32: torch.float32,
    WireDtype.BFLOAT16: torch.bfloat16,
    WireDtype.FLOAT16: torch.float16,
    WireDtype.INT8: torch.int8,
    WireDtype.FLOAT64: torch.float64,
}
_WIRE = {dtype: wire for wire, dtype in _TORCH.items()}
_FLOAT16_MAX = torch.finfo(torch.float16).max
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class Encoded:
    """Rows as they travel.

    Args:
        rows: [R, D], contiguous, on the host; the caller's own memory if nothing had to be changed.
        scales: [R], float32, on the host, if `rows` is int8.
    """

    rows: Tensor
    scales: Tensor | None = None


def torch_dtype(wire: WireDtype) -> torch.dtype:
    """What the numbers are in torch."""
    return _TORCH[wire]


def from_torch(dtype: torch.dtype) -> WireDtype:
    """How numbers of this dtype are called in messages; `KeyError` if they don't travel."""
    return _WIRE[dtype]


def wire_dtype(name: WireDtypeName, working: torch.dtype) -> WireDtype:
    """What a user's choice means for rows of a dtype.

    Args:
        name: The choice; "working" leaves rows as they are.
        working: The rows' dtype.

    Returns:
        How they travel.
    """
    return from_torch(working) if name == "working" else WireDtype[name.upper()]


def encode(rows_RD: Tensor, dtype: WireDtype) -> Encoded:
    """Make rows ready to travel.

    Int8 is symmetric: a row's scale is its largest magnitude over 127, so numbers are off by half a
    scale at most; a row whose scale were less than 1e-38, where float32 loses digits, arrives as
    zeros with the scale 1. Float16 ends at 65504, and so do finite numbers above it.

    Args:
        rows_RD: On any device, with any strides. Must not change before the bytes are sent.
        dtype: How they shall travel.

    Returns:
        Bytes on the host, pinned if rows are on a GPU; they are encoded there.
    """
    if dtype == WireDtype.INT8:
        rows_RD = rows_RD.float()
        scales_R = rows_RD.abs().amax(1) / 127
        scales_R.masked_fill_(scales_R < _SMALLEST_SCALE, 1.0)
        # NaN, also inf / inf, becomes any integer; the scale, NaN or infinite then, tells.
        codes_RD = (rows_RD / scales_R[:, None]).round_().to(torch.int8)
        return Encoded(_on_host(codes_RD), _on_host(scales_R))
    if dtype == WireDtype.FLOAT16 and rows_RD.dtype != torch.float16:
        rows_RD = _saturated(rows_RD)
    return Encoded(_on_host(rows_RD.to(torch_dtype(dtype))))


def decode(
    rows: memoryview,
    scales: memoryview,
    num_rows: int,
    width: int,
    wire: WireDtype,
    dtype: torch.dtype,
) -> Tensor:
    """Read rows that have arrived.

    Args:
        rows: R × D numbers.
        scales: R × float32 for int8; else empty.
        num_rows: R.
        width: D.
        wire: How the rows travelled.
        dtype: What they shall be now.

    Returns:
        rows_RD, on the host; over the same memory where `tensor_of` can and the dtype is the same.
    """
    rows_RD = tensor_of(rows, torch_dtype(wire), (num_rows, width))
    if wire == WireDtype.INT8:
        rows_RD = rows_RD * tensor_of(scales, torch.float32, (num_rows, 1))
    return rows_RD.to(dtype)


def relative_error(rows_RD: Tensor, encoded: Encoded) -> float:
    """How far rows are from what arrives.

    Args:
        rows_RD: As they were.
        encoded: As they travel.

    Returns:
        ‖x - arrived‖ / ‖x‖ over all numbers; 0 for no rows and for zeros, NaN if x is not finite.
    """
    arrived_RD = encoded.rows.to(rows_RD.device).float()
    if encoded.scales is not None:
        arrived_RD *= encoded.scales.to(rows_RD.device)[:, None]
    # Squares of large float32 numbers overflow in float32.
    size = torch.linalg.vector_norm(rows_RD, dtype=torch.float64)
    error = torch.linalg.vector_norm(rows_RD.float() - arrived_RD, dtype=torch.float64)
    return float(error / size) if size != 0 else 0.0


def buffer_of(tensor: Tensor) -> memoryview:
    """A contiguous tensor on the host as raw bytes, not copied; it lives as long as they do."""
    assert tensor.is_contiguous(), "only contiguous memory can be sent as it is"
    return tensor.view(-1).view(torch.uint8).numpy().data


def tensor_of(raw: memoryview, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """Raw bytes as a tensor, the opposite of `buffer_of`.

    Args:
        raw: As many bytes as it takes.
        dtype: What they are.
        shape: The tensor's.

    Returns:
        A tensor over the same memory, which it keeps alive; or over a copy, if that is read-only or
        not aligned (small messages share a buffer in zmq), which compiled loops may not survive.
    """
    if raw.nbytes == 0:  # frombuffer refuses
        return torch.empty(*shape, dtype=dtype)
    if raw.readonly:
        raw = memoryview(bytearray(raw))
    bytes_N = torch.frombuffer(raw, dtype=torch.uint8)
    if bytes_N.data_ptr() % dtype.itemsize:
        bytes_N = bytes_N.clone()
    return bytes_N.view(dtype).view(*shape)


def _saturated(rows_RD: Tensor) -> Tensor:
    if rows_RD.numel() == 0:  # aminmax refuses
        return rows_RD
    # Waiting for a GPU costs nothing: the rows are about to be fetched. Most rows are in range,
    # and one pass that writes nothing is 15 times quicker than what is below. NaN is not in range.
    least, most = map(float, torch.aminmax(rows_RD))
    if least >= -_FLOAT16_MAX and most <= _FLOAT16_MAX:
        return rows_RD
    wide_RD = rows_RD.double()  # bfloat16 has no 65504
    return torch.where(wide_RD.isinf(), wide_RD, wide_RD.clamp(-_FLOAT16_MAX, _FLOAT16_MAX))


def _on_host(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu":
        return tensor.contiguous()
    on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return on_host.copy_(tensor)
