"""Rows arrive as they were, or as near as their dtype on the wire allows; never better than they
were."""

import math
import struct
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_lightning.transport.messages import WireDtype
from moe_lightning.transport.wire import (
    Encoded,
    WireDtypeName,
    buffer_of,
    decode,
    encode,
    from_torch,
    relative_error,
    tensor_of,
    torch_dtype,
    wire_dtype,
)

WORKING = [torch.float32, torch.bfloat16, torch.float16]
NAMES: list[WireDtypeName] = ["working", "bfloat16", "float16", "int8"]
BAD = [math.nan, math.inf, -math.inf]
F16, BF16, F32, INT8 = (
    WireDtype.FLOAT16,
    WireDtype.BFLOAT16,
    WireDtype.FLOAT32,
    WireDtype.INT8,
)


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """Torch only warns of tensors over memory that must not be written."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def random_rows(num_rows: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes_R = torch.logspace(-3, 3, num_rows) if num_rows else torch.empty(0)
    rows_RD = torch.randn(num_rows, width, generator=generator) * sizes_R[:, None]
    return rows_RD.to(dtype)


def arrive(rows_RD: Tensor, wire: WireDtype, dtype: torch.dtype | None = None) -> Tensor:
    """Through bytes, as they would come out of a socket."""
    encoded = encode(rows_RD, wire)
    raw = memoryview(bytearray(buffer_of(encoded.rows)))
    scales = b"" if encoded.scales is None else buffer_of(encoded.scales)
    return decode(raw, memoryview(bytearray(scales)), *rows_RD.shape, wire, dtype or rows_RD.dtype)


# Names


@pytest.mark.parametrize(
    ("name", "working", "wire"),
    [
        ("working", torch.float32, F32),
        ("working", torch.bfloat16, BF16),
        ("working", torch.float16, F16),
        ("working", torch.float64, WireDtype.FLOAT64),
        ("bfloat16", torch.float32, BF16),
        ("float16", torch.bfloat16, F16),
        ("int8", torch.float16, INT8),
    ],
)
def test_what_a_choice_means(name: WireDtypeName, working: torch.dtype, wire: WireDtype) -> None:
    assert wire_dtype(name, working) is wire


@pytest.mark.parametrize("wire", WireDtype)
def test_dtypes_and_their_sizes(wire: WireDtype) -> None:
    assert str(torch_dtype(wire)) == f"torch.{wire.name.lower()}"
    assert from_torch(torch_dtype(wire)) is wire
    assert wire.itemsize == torch_dtype(wire).itemsize


# Values by hand


def test_known_int8_rows() -> None:
    """Scales are 1, 2, 1 (zeros) and 0.5."""
    rows_RD = torch.tensor(
        [[127.0, -1.0, 0.4], [-254.0, 3.2, 100.0], [0.0, -0.0, 0.0], [63.5, 0.2, -0.3]]
    )
    encoded = encode(rows_RD, INT8)
    assert encoded.scales is not None
    assert encoded.scales.tolist() == [1.0, 2.0, 1.0, 0.5]
    assert encoded.rows.dtype == torch.int8
    assert encoded.rows.tolist() == [[127, -1, 0], [-127, 2, 50], [0, 0, 0], [127, 0, -1]]
    assert arrive(rows_RD, INT8).tolist() == [
        [127.0, -1.0, 0.0],
        [-254.0, 4.0, 100.0],
        [0.0, 0.0, 0.0],
        [63.5, 0.0, -0.5],
    ]


@pytest.mark.parametrize(
    ("wire", "raw"),
    [
        (F32, "0000803f 000000c0"),
        (BF16, "803f 00c0"),
        (F16, "003c 00c0"),
        (INT8, "40 81"),  # 63.5 to even, and -127 as two's complement
        (WireDtype.FLOAT64, "000000000000f03f 00000000000000c0"),
    ],
)
def test_known_bytes(wire: WireDtype, raw: str) -> None:
    """1 and -2, little-endian."""
    encoded = encode(torch.tensor([[1.0, -2.0]]), wire)
    assert bytes(buffer_of(encoded.rows)) == bytes.fromhex(raw)
    if wire == INT8:
        assert encoded.scales is not None
        assert bytes(buffer_of(encoded.scales)) == struct.pack("<f", 2 / 127)
    else:
        assert encoded.scales is None


def test_known_roundings() -> None:
    """To nearest, ties to even: 10 bits after the point in float16, 7 in bfloat16."""
    rows_RD = torch.tensor([[1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8]])
    assert arrive(rows_RD, F16).tolist() == [[1.0, 1 + 2**-9, 1 + 2**-8, 1 + 3 * 2**-8]]
    assert arrive(rows_RD, BF16).tolist() == [[1.0, 1.0, 1.0, 1 + 2**-6]]


def test_float16_ends_at_its_largest_number() -> None:
    rows_RD = torch.tensor([[65504.0, 65519.0, 65520.0, 1e38], [-65504.0, -7e4, -3e38, 1.0]])
    assert arrive(rows_RD, F16).tolist() == [[65504.0] * 4, [-65504.0] * 3 + [1.0]]
    # Bfloat16 has 65280 and 65536, and nothing between.
    rows_RD = torch.tensor([[65536.0, 65280.0, -65536.0]], dtype=torch.bfloat16)
    assert arrive(rows_RD, F16, torch.float32).tolist() == [[65504.0, 65280.0, -65504.0]]


def test_float16_saturates_beside_what_is_not_finite() -> None:
    arrived_RD = arrive(torch.tensor([[7e4, math.inf, -math.inf, math.nan, -7e4, -0.0]]), F16)
    assert arrived_RD[0, :3].tolist() == [65504.0, math.inf, -math.inf]
    assert arrived_RD[0, 3].isnan()
    assert arrived_RD[0, 4:].tolist() == [-65504.0, 0.0]
    assert math.copysign(1.0, float(arrived_RD[0, 5])) == -1.0


# What arrives, for every pair of dtypes


@pytest.mark.parametrize("working", WORKING)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("num_rows", "width"), [(0, 4), (1, 1), (1, 7), (5, 1), (9, 33)])
def test_shapes_and_dtypes(
    num_rows: int, width: int, name: WireDtypeName, working: torch.dtype
) -> None:
    rows_RD = random_rows(num_rows, width, working)
    wire = wire_dtype(name, working)
    encoded = encode(rows_RD, wire)
    assert encoded.rows.shape == (num_rows, width)
    assert encoded.rows.dtype == torch_dtype(wire)
    assert encoded.rows.is_contiguous()
    assert buffer_of(encoded.rows).nbytes == num_rows * width * wire.itemsize
    assert (encoded.scales is None) == (name != "int8")
    if encoded.scales is not None:
        assert (encoded.scales.shape, encoded.scales.dtype) == ((num_rows,), torch.float32)
    arrived_RD = arrive(rows_RD, wire)
    assert (arrived_RD.shape, arrived_RD.dtype) == (rows_RD.shape, working)
    if wire == from_torch(working):
        assert torch.equal(arrived_RD, rows_RD)


@pytest.mark.parametrize("working", WORKING)
@pytest.mark.parametrize(
    ("wire", "unit", "smallest"), [(F16, 2**-11, 2**-25), (BF16, 2**-8, 0.0), (F32, 0.0, 0.0)]
)
def test_rounding_errors(
    wire: WireDtype, unit: float, smallest: float, working: torch.dtype
) -> None:
    """At most half a unit in the last place, where float16's last places end at 2**-24."""
    rows_RD = random_rows(40, 50, working)
    error_RD = (arrive(rows_RD, wire, torch.float32) - rows_RD.float()).abs()
    assert (error_RD <= rows_RD.float().abs() * unit + smallest).all()


@pytest.mark.parametrize("working", WORKING)
def test_int8_errors(working: torch.dtype) -> None:
    """Half of a 127th of the row's largest magnitude, which itself arrives as it was."""
    rows_RD = random_rows(40, 50, working)
    largest_R1 = rows_RD.float().abs().amax(1, keepdim=True)
    arrived_RD = arrive(rows_RD, INT8, torch.float32)
    error_RD = (arrived_RD - rows_RD.float()).abs()
    # Float32's own roundings of scale, quotient and product: 3 * 127 * 2**-24 of a scale.
    assert (error_RD <= largest_R1 / 254 * (1 + 1e-4)).all()
    assert (error_RD > largest_R1 / 300).any(), "the bound is not far off"
    torch.testing.assert_close(
        arrived_RD.abs().amax(1, keepdim=True), largest_R1, rtol=2**-22, atol=0
    )


# Float32 ends at 3.4e38; in the last place before that, 127 times a 127th rounds to infinity.
finite = st.floats(-(2.0**127), 2.0**127, width=32)


@given(st.lists(st.lists(finite, min_size=3, max_size=3)))
def test_any_finite_rows_arrive_finite(rows: list[list[float]]) -> None:
    rows_RD = torch.tensor(rows, dtype=torch.float32).view(-1, 3)
    largest_R1 = rows_RD.abs().amax(1, keepdim=True)
    # Rows below 127 times float32's smallest normal number arrive as zeros.
    error_RD = (arrive(rows_RD, INT8) - rows_RD).abs()
    assert (error_RD <= (largest_R1 / 254 * (1 + 1e-4)).clamp(min=1.5e-36)).all()
    saturated_RD = rows_RD.clamp(-65504, 65504)
    error_RD = (arrive(rows_RD, F16) - saturated_RD).abs()
    assert (error_RD <= saturated_RD.abs() * 2**-11 + 2**-25).all()
    assert torch.equal(arrive(rows_RD, F32), rows_RD)


def test_int8_rows_below_what_float32_holds_well_arrive_as_zeros() -> None:
    rows_RD = torch.tensor([[1.4e-36, -1e-37], [-1e-37, 1e-45], [2**-119, -(2**-120)]])
    encoded = encode(rows_RD, INT8)
    assert encoded.scales is not None
    assert encoded.scales.tolist()[:2] == [1.0, 1.0]
    assert encoded.rows.tolist() == [[0, 0], [0, 0], [127, -64]]  # -63.5 to even


@pytest.mark.parametrize("wire", [F32, BF16, F16, INT8])
def test_zeros_arrive_as_zeros(wire: WireDtype) -> None:
    rows_RD = torch.zeros(3, 4)
    rows_RD[1] = torch.tensor([1e-30, 0.0, 1.0, -1e30]).clamp(-6e4, 6e4)
    arrived_RD = arrive(rows_RD, wire)
    assert torch.equal(arrived_RD[::2], torch.zeros(2, 4))
    assert arrived_RD[1, 1] == 0


@pytest.mark.parametrize("wire", [F32, BF16, F16, INT8])
@pytest.mark.parametrize("working", WORKING)
@pytest.mark.parametrize("bad", BAD)
def test_rows_that_are_not_finite_arrive_so(
    bad: float, working: torch.dtype, wire: WireDtype
) -> None:
    rows_RD = random_rows(4, 5, torch.float32).to(working)
    rows_RD[1, 3] = bad
    rows_RD[3] = bad
    arrived_RD = arrive(rows_RD, wire)
    assert not arrived_RD[1, 3].isfinite()
    assert not arrived_RD[3].isfinite().any()
    assert arrived_RD[[0, 2]].isfinite().all(), "a bad row spoils no others"
    if wire == INT8:
        assert not arrived_RD[1].isfinite().any(), "the whole row has one scale"
    else:
        assert arrived_RD[1, [0, 1, 2, 4]].isfinite().all()


def test_both_infinities_in_an_int8_row() -> None:
    arrived_RD = arrive(torch.tensor([[math.inf, -math.inf, 0.0, 1.0, math.nan]]), INT8)
    assert not arrived_RD.isfinite().any()


@pytest.mark.parametrize("wire", [F32, BF16, F16, INT8])
def test_strides_do_not_matter(wire: WireDtype) -> None:
    base = random_rows(12, 20, torch.float32)
    for rows_RD in (base.t(), base[::2, 1::3], base[3:4].expand(5, 20), base[:, :1], base[:0]):
        contiguous_RD = rows_RD.clone(memory_format=torch.contiguous_format)
        assert torch.equal(arrive(rows_RD, wire), arrive(contiguous_RD, wire))
        assert encode(rows_RD, wire).rows.is_contiguous()


# Memory


@pytest.mark.parametrize("working", WORKING)
def test_unchanged_rows_are_copied_nowhere(working: torch.dtype) -> None:
    rows_RD = random_rows(3, 8, working)
    wire = from_torch(working)
    encoded = encode(rows_RD, wire)
    assert encoded.rows.data_ptr() == rows_RD.data_ptr()
    raw = buffer_of(encoded.rows)
    arrived_RD = decode(raw, memoryview(b""), 3, 8, wire, working)
    assert arrived_RD.data_ptr() == rows_RD.data_ptr()
    rows_RD[1, 2] = 5.0
    assert arrived_RD[1, 2] == 5.0


def test_what_was_read_from_outlives_its_name() -> None:
    """The tensor keeps the memory alive, and the bytes keep the tensor alive."""
    raw = bytearray(struct.pack("<4f", 1, 2, 3, 4))
    rows_RD = decode(memoryview(raw), memoryview(b""), 2, 2, F32, torch.float32)
    del raw
    view = buffer_of(torch.full((2, 2), 7.0))
    _ = [bytearray(16) for _ in range(1000)]  # would take freed memory
    assert rows_RD.tolist() == [[1, 2], [3, 4]]
    assert struct.unpack("<4f", view) == (7.0,) * 4


def test_memory_that_must_not_be_written_is_copied() -> None:
    raw = struct.pack("<4f", 1, 2, 3, 4)
    rows_RD = decode(memoryview(raw), memoryview(b""), 2, 2, F32, torch.float32)
    rows_RD.zero_()
    assert struct.unpack("<4f", raw) == (1, 2, 3, 4)


@pytest.mark.parametrize("offset", range(1, 8))
@pytest.mark.parametrize("wire", [F32, F16, WireDtype.FLOAT64])
def test_memory_that_is_not_aligned(wire: WireDtype, offset: int) -> None:
    """Small messages lie in zmq's buffer one after the other."""
    dtype = torch_dtype(wire)
    expected_RD = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=dtype)
    whole = bytearray(offset) + bytearray(buffer_of(expected_RD))
    raw = memoryview(whole)[offset:]
    at = torch.frombuffer(whole, dtype=torch.uint8).data_ptr() + offset
    rows_RD = decode(raw, memoryview(b""), 2, 2, wire, dtype)
    assert torch.equal(rows_RD, expected_RD)
    assert rows_RD.data_ptr() % dtype.itemsize == 0
    assert (rows_RD.data_ptr() == at) == (at % dtype.itemsize == 0)


@pytest.mark.parametrize("dtype", [*WORKING, torch.int16, torch.int8, torch.float64])
@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (6,), (0,), (2, 1, 3)])
def test_bytes_of_a_tensor_and_back(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.arange(math.prod(shape)).view(shape).to(dtype)
    raw = buffer_of(tensor)
    assert (raw.format, raw.ndim, raw.nbytes) == ("B", 1, tensor.nbytes)
    back = tensor_of(raw, dtype, shape)
    assert back.shape == shape
    assert torch.equal(back, tensor)
    assert not tensor.numel() or back.data_ptr() == tensor.data_ptr()


def test_bytes_of_what_needs_gradients() -> None:
    assert struct.unpack("<2f", buffer_of(torch.ones(1, 2, requires_grad=True))) == (1.0, 1.0)
    with torch.inference_mode():
        assert struct.unpack("<2f", buffer_of(torch.ones(1, 2))) == (1.0, 1.0)


def test_only_contiguous_memory_has_bytes() -> None:
    with pytest.raises(AssertionError, match="contiguous"):
        buffer_of(torch.zeros(2, 3).t())


# The error that is reported


def test_known_relative_errors() -> None:
    """[3, 4] arrives as [3, 5] and [1, 1]: 1 of 5, and the root of 13 of 5."""
    rows_RD = torch.tensor([[3.0, 4.0]])
    assert relative_error(rows_RD, Encoded(torch.tensor([[3.0, 5.0]]))) == pytest.approx(0.2)
    scaled = Encoded(torch.tensor([[2, 2]], dtype=torch.int8), torch.tensor([0.5]))
    assert relative_error(rows_RD, scaled) == pytest.approx(math.sqrt(13) / 5)


@pytest.mark.parametrize(
    ("wire", "low", "high"),
    # Rounding errors of evenly spread numbers: a unit / sqrt(12) on average.
    [(F32, 0.0, 0.0), (BF16, 1e-3, 2.3e-3), (F16, 1e-4, 2.9e-4), (INT8, 4e-3, 1.2e-2)],
)
def test_relative_errors_of_random_rows(wire: WireDtype, low: float, high: float) -> None:
    rows_RD = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    error = relative_error(rows_RD, encode(rows_RD, wire))
    assert low <= error <= high
    arrived_RD = arrive(rows_RD, wire)
    assert error == pytest.approx(float((rows_RD - arrived_RD).norm() / rows_RD.norm()), rel=1e-4)


@pytest.mark.parametrize("wire", [F32, BF16, F16, INT8])
def test_relative_errors_at_the_edges(wire: WireDtype) -> None:
    for rows_RD in (torch.empty(0, 4), torch.zeros(2, 4)):
        assert relative_error(rows_RD, encode(rows_RD, wire)) == 0.0
    large_RD = torch.full((2, 4), 3e38)
    error = relative_error(large_RD, encode(large_RD, wire))
    assert 0.0 <= error <= (1.0 if wire == F16 else 2**-7)
    assert math.isnan(relative_error(large_RD * 10, encode(large_RD * 10, wire)))


# Every device


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
@pytest.mark.parametrize("working", WORKING)
def test_numpy_makes_the_same_bytes_as_each_device(working: torch.dtype, device: str) -> None:
    rows_RD = random_rows(33, 70, working)
    rows_RD[4] = 0.0
    rows = rows_RD.double().numpy()
    on_device_RD = rows_RD.to(device)
    halves = encode(on_device_RD, F16)
    assert bytes(buffer_of(halves.rows)) == rows.astype(np.float16).tobytes()
    scales = np.abs(rows).max(1).astype(np.float32) / np.float32(127)
    scales[4] = 1
    codes = np.rint(rows.astype(np.float32) / scales[:, None]).astype(np.int8)
    encoded = encode(on_device_RD, INT8)
    assert encoded.scales is not None
    assert bytes(buffer_of(encoded.scales)) == scales.tobytes()
    assert bytes(buffer_of(encoded.rows)) == codes.tobytes()
    assert encoded.rows.is_pinned() == encoded.scales.is_pinned() == (device == "cuda")
    error = np.linalg.norm(codes * scales.astype(np.float64)[:, None] - rows) / np.linalg.norm(rows)
    assert relative_error(on_device_RD, encoded) == pytest.approx(error, rel=1e-4)
