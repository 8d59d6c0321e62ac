"""Tensors read straight into the device and dtype that is asked for, in blocks."""

import pytest
import torch
from safetensors.torch import load_file

from moe_lightning.modeling.checkpoint import open_checkpoint
from moe_lightning.modeling.lazy_tensor import BLOCK_BYTES, LazyTensor

ROWS = [None, [3, 4, 5, 0], [7], [0, 2, 4, 6], [], list(range(8))]


class Rows:
    """A bf16 tensor on no disk, which notes how much of it is read at once."""

    def __init__(self, *shape):
        self.shape = shape
        self.reads = []

    def get_shape(self):
        return list(self.shape)

    def get_dtype(self):
        return "BF16"

    def __getitem__(self, index):
        part = torch.empty(self.shape, dtype=torch.bfloat16, device="meta")[index]
        self.reads.append(part.numel() * 2)
        return part


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_read_in_the_order_asked_for(rows, dtype, family_checkpoint):
    path = family_checkpoint("granitemoe")
    name = "model.layers.1.block_sparse_moe.input_linear.weight"
    whole = load_file(path / "model.safetensors")[name]
    view = open_checkpoint(path)
    lazy = LazyTensor(view.slices([name])[name], rows)
    assert view.bytes_read == 0
    want = (whole if rows is None else whole[rows]).to(dtype)
    got = lazy[...].to(device="cpu", dtype=dtype)
    assert got.dtype == dtype
    assert got.is_contiguous()
    assert torch.equal(got, want)
    assert lazy.shape == list(want.shape)
    assert view.bytes_read == want.numel() * whole.element_size()


@pytest.mark.parametrize(
    ("shape", "rows"),
    [((1000, 100_000), None), ((64, 100_000, 10), list(range(3, 60))), ((10**8,), None)],
)
def test_another_device_is_filled_in_blocks(shape, rows):
    piece = Rows(*shape)
    lazy = LazyTensor(piece, rows)
    tensor = lazy[...].to(device=torch.device("meta"), dtype=torch.float32)
    assert tensor.device.type == "meta"
    assert sum(piece.reads) == 2 * tensor.numel() == 2 * lazy.num_elements
    assert max(piece.reads) <= BLOCK_BYTES
    assert len(piece.reads) <= sum(piece.reads) / BLOCK_BYTES * 1.3 + 1


def test_a_row_larger_than_a_block_is_read_whole():
    piece = Rows(4, 10_000, 5_000)
    LazyTensor(piece, [2, 3]).to(device="meta", dtype=torch.bfloat16)
    assert piece.reads == [10**8, 10**8]


def test_a_tensor_of_one_number():
    piece = Rows()
    assert LazyTensor(piece).to(device="meta", dtype=torch.float32).shape == ()
    assert piece.reads == [2]
