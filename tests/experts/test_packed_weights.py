"""The layouts themselves: what they keep, what they lose, and which shapes they take."""

import pytest
import torch
from made_up_experts import relative_error

from moe_lightning.experts.packed_weights import (
    HalfWeights,
    Int8Weights,
    OneDnnWeights,
    PackedWeights,
    Piece,
)

LOSSY = {HalfWeights: 1e-3, Int8Weights: 4e-2}
SHAPES = [(3, 24, 16), (2, 10, 12), (1, 7, 1), (2, 1, 7), (1, 1, 1), (2, 17, 33), (2, 64, 513)]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def multiplied(weights, rows_NX, pieces):
    return weights.linear(weights.prepare(rows_NX), pieces)


def pieces_of(*num_rows):
    return [Piece(expert, number) for expert, number in enumerate(num_rows) if number]


def assert_same_bits(got, want):
    whole = torch.int32 if want.dtype == torch.float32 else torch.int16
    assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())
    assert torch.equal(got.view(whole), want.view(whole))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_layout_gives_back_every_bit(shape, dtype):
    weight_EYX = random(*shape).to(dtype)
    if OneDnnWeights.why_not(weight_EYX) is None:  # bfloat16 needs a CPU that has it
        assert_same_bits(OneDnnWeights(weight_EYX).unpack(), weight_EYX)


def test_exact_layout_gives_back_numbers_that_are_none():
    weight_EYX = random(2, 24, 16)
    weight_EYX[0, 0, :5] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-42])
    weight_EYX.view(torch.int32)[1, 3, 3] = 0x7FC12345  # a NaN that carries a number
    assert_same_bits(OneDnnWeights(weight_EYX).unpack(), weight_EYX)


@pytest.mark.parametrize("kind", LOSSY)
def test_layouts_that_lose_something_cannot_be_undone(kind):
    with pytest.raises(TypeError, match=kind.__name__):
        kind(random(2, 8, 8)).unpack()


@pytest.mark.parametrize("kind", [OneDnnWeights, *LOSSY])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_every_shape(kind, shape):
    weight_EYX = random(*shape)
    counts = (5, 1, 3)[: shape[0]]
    rows_NX = random(sum(counts), shape[2], seed=1)
    want_NY = torch.cat(
        [rows @ weight.t() for rows, weight in zip(rows_NX.split(counts), weight_EYX, strict=True)]
    )
    for weight in (weight_EYX, weight_EYX.transpose(1, 2).contiguous().transpose(1, 2)):
        got_NY = multiplied(kind(weight.clone()), rows_NX, pieces_of(*counts))
        if kind is OneDnnWeights:
            torch.testing.assert_close(got_NY, want_NY, atol=1e-4, rtol=1e-5)
        else:
            assert relative_error(got_NY, want_NY) < LOSSY[kind]


@pytest.mark.parametrize("kind", [OneDnnWeights, *LOSSY])
def test_rows_are_gathered_and_experts_without_rows_skipped(kind):
    weight_EYX, rows_RX = random(4, 24, 16), random(3, 16, seed=1)
    packed = kind(weight_EYX.clone())
    source_N = torch.tensor([2, 0, 2, 1])
    pieces = [Piece(1, 3), Piece(3, 1)]
    gathered_NY = packed.linear(packed.prepare(rows_RX).picked(source_N), pieces)
    assert torch.equal(gathered_NY, multiplied(packed, rows_RX[source_N], pieces))
    want_NY = torch.cat([rows_RX[[2, 0, 2]] @ weight_EYX[1].t(), rows_RX[[1]] @ weight_EYX[3].t()])
    assert relative_error(gathered_NY, want_NY) < LOSSY.get(kind, 1e-6)


def test_int8_takes_its_scales_by_row_and_by_channel():
    """Rows, and channels, of sizes that differ by a million, each as precise as the others."""
    weight_EYX, rows_RX = random(1, 24, 64), random(6, 64, seed=1)
    row_sizes_R1 = 10.0 ** torch.arange(-3, 3)[:, None]
    channel_sizes_Y = 10.0 ** (torch.arange(24) % 7 - 3)
    packed = Int8Weights(weight_EYX * channel_sizes_Y[:, None])
    got_RY = multiplied(packed, rows_RX * row_sizes_R1, [Piece(0, 6)])
    got_RY = got_RY / row_sizes_R1 / channel_sizes_Y
    want_RY = rows_RX @ weight_EYX[0].t()
    for r in range(6):
        assert relative_error(got_RY[r], want_RY[r]) < 3e-2
    for y in range(24):
        assert relative_error(got_RY[:, y], want_RY[:, y]) < 4e-2


def test_int8_by_hand():
    # Channel scales 2 and 1, row scale 1: all of it is whole numbers.
    weight_EYX = torch.tensor([[[254.0, -2.0], [3.0, -127.0]]])
    rows_RX = torch.tensor([[127.0, -5.0], [0.0, 0.0]])
    got_RY = multiplied(Int8Weights(weight_EYX), rows_RX, [Piece(0, 2)])
    want = [[127 * 254 + 5 * 2, 127 * 3 + 5 * 127], [0, 0]]
    torch.testing.assert_close(got_RY, torch.tensor(want).float(), atol=0.0, rtol=1e-6)


@pytest.mark.parametrize("kind", [OneDnnWeights, *LOSSY])
def test_a_reason_for_each_weight_that_cannot_be_packed(kind):
    def reason(weight):
        return kind.why_not(weight)

    assert reason(random(2, 8, 8)) is None
    assert "meta" in reason(random(2, 8, 8).to("meta"))
    assert "float64" in reason(random(2, 8, 8).double())
    assert (reason(random(2, 8, 8).half()) is None) == (kind is not OneDnnWeights)


def test_without_onednn_nothing_is_packed(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    kinds: list[type[PackedWeights]] = [OneDnnWeights, Int8Weights]
    assert all("no oneDNN" in kind.why_not(random(2, 8, 8)) for kind in kinds)


def test_bfloat16_is_packed_only_where_the_cpu_has_it(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert "bfloat16" in OneDnnWeights.why_not(random(2, 8, 8).bfloat16())
    assert OneDnnWeights.why_not(random(2, 8, 8)) is None


def test_half_precision_is_packed_only_where_fbgemm_is(monkeypatch):
    engines = type(torch.backends.quantized)
    monkeypatch.setattr(engines, "supported_engines", ["none", "qnnpack"])
    assert "FBGEMM" in HalfWeights.why_not(random(2, 8, 8))
