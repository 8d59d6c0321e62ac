"""Dense layers are packed for inference and come back as they were."""

import copy

import pytest
import torch
from torch import nn

from moe_lightning.modeling.packing import PackedLinear, pack_dense, unpack_dense

# fp32 sums in another order.
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear_of(in_width=12, out_width=5, *, bias=True):
    linear = nn.Linear(in_width, out_width, bias=bias)
    with torch.no_grad():
        for seed, parameter in enumerate(linear.parameters()):
            parameter.copy_(random(*parameter.shape, seed=seed))
    return linear


def packed_copy(module):
    packed = copy.deepcopy(module)
    pack_dense(packed)
    return packed


@pytest.fixture
def model(family, family_checkpoint, plain_transformers):
    """Unmodified transformers' model of each family, to be packed."""
    return copy.deepcopy(plain_transformers(family_checkpoint(family)).model)


@torch.inference_mode()
def test_every_dense_layer_of_every_family(model):
    ids_BS = torch.arange(4, 24)[None]
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    shapes = {n: (p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()}
    want_BSV = model(ids_BS, use_cache=False).logits
    pack_dense(model)
    torch.testing.assert_close(model(ids_BS, use_cache=False).logits, want_BSV, **TOLERANCE)
    packed = [n for n, module in model.named_modules() if isinstance(module, PackedLinear)]
    assert packed == names
    after = dict(model.named_parameters())
    assert {n: (p.shape, p.dtype, p.requires_grad) for n, p in after.items()} == shapes
    weights = {f"{name}.weight" for name in names}
    assert len(weights) > 10
    for name in weights:
        assert after[name].isnan().all()
        assert after[name].untyped_storage().nbytes() == 4
    assert all(torch.equal(p, before[n]) for n, p in after.items() if n not in weights)

    unpack_dense(model)
    assert [n for n, module in model.named_modules() if type(module) is nn.Linear] == names
    for name, parameter in model.named_parameters():
        assert parameter is after[name]
        assert torch.equal(parameter, before[name])
        assert parameter.stride() == before[name].stride()
    assert torch.equal(model(ids_BS, use_cache=False).logits, want_BSV)


@pytest.mark.parametrize("family", ["qwen3_moe", "granitemoe"])
def test_a_head_that_shares_the_embeddings_weight(family, family_checkpoint, plain_transformers):
    path = family_checkpoint(family, tie=True)
    plain = plain_transformers(path).model
    model = copy.deepcopy(plain)
    embedding = model.get_input_embeddings().weight
    assert model.lm_head.weight is embedding
    pack_dense(model)
    assert torch.equal(embedding, plain.get_input_embeddings().weight)
    ids_BS = torch.arange(4, 24)[None]
    with torch.inference_mode():
        got_BSV = model(ids_BS, use_cache=False).logits
        torch.testing.assert_close(got_BSV, plain(ids_BS, use_cache=False).logits, **TOLERANCE)
    unpack_dense(model)
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)


def test_layers_that_share_a_weight():
    pair = nn.ModuleList([linear_of(), linear_of()])
    pair[1].weight = pair[0].weight
    rows_NX = random(3, 12, seed=7)
    want = [linear(rows_NX) for linear in pair]
    pack_dense(pair)
    with torch.inference_mode():
        for linear, want_NY in zip(pair, want, strict=True):
            torch.testing.assert_close(linear(rows_NX), want_NY, **TOLERANCE)
    unpack_dense(pair)
    assert pair[1].weight is pair[0].weight
    assert torch.equal(pair[0](rows_NX), want[0])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "rows",
    [
        random(2, 3, 12),
        random(1, 12),
        random(12),
        torch.zeros(0, 12),
        torch.zeros(2, 0, 12),
        random(2, 12, 3).transpose(1, 2),
        random(4, 24)[:, ::2],
        random(1, 12).expand(4, 12),
    ],
    ids=lambda rows: f"{tuple(rows.shape)}-{rows.stride()}",
)
def test_rows_of_every_shape(rows, bias):
    linear = linear_of(bias=bias)
    with torch.inference_mode():
        got = packed_copy(linear)(rows)
        torch.testing.assert_close(got, linear(rows), **TOLERANCE)


@pytest.mark.parametrize(("in_width", "out_width"), [(1, 1), (7, 1), (1, 7), (33, 17), (64, 96)])
def test_widths_of_every_kind(in_width, out_width):
    linear, rows = linear_of(in_width, out_width), random(5, in_width, seed=3)
    packed = packed_copy(linear)
    with torch.inference_mode():
        torch.testing.assert_close(packed(rows), linear(rows), **TOLERANCE)
    unpack_dense(packed)
    assert torch.equal(packed.weight, linear.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_another_dtype_keep_it(dtype):
    """As autocast mixes them."""
    linear, rows = linear_of(), random(3, 12, seed=3)
    with torch.inference_mode():
        got = packed_copy(linear)(rows.to(dtype))
        want = linear(rows.to(dtype).float())
    assert got.dtype == dtype
    # One rounding, to 8 or 11 bits.
    torch.testing.assert_close(got.float(), want, atol=1e-2, rtol=4e-3)


def test_bfloat16_layers():
    linear, rows = linear_of(32, 16).bfloat16(), random(3, 32, seed=3).bfloat16()
    packed = packed_copy(linear)
    with torch.inference_mode():
        got = packed(rows)
        want = linear.float()(rows.float())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, atol=3e-2, rtol=1e-2)  # roundings to 8 bits
    unpack_dense(packed)
    assert torch.equal(packed.weight, linear.bfloat16().weight)


def test_packing_twice_and_unpacking_twice_do_nothing_more():
    linear, rows = linear_of(), random(3, 12, seed=3)
    model = nn.Sequential(copy.deepcopy(linear))
    unpack_dense(model)
    for _ in range(2):
        pack_dense(model)
        pack_dense(model)
        with torch.inference_mode():
            torch.testing.assert_close(model(rows), linear(rows), **TOLERANCE)
        unpack_dense(model)
        unpack_dense(model)
        assert type(model[0]) is nn.Linear
        assert model[0].__dict__.keys() == linear.__dict__.keys()
        assert torch.equal(model(rows), linear(rows))


def test_a_layer_trains_after_it_was_packed_and_unpacked_in_inference_mode():
    linear, rows = linear_of(), random(3, 12, seed=3)
    model = copy.deepcopy(linear)
    with torch.inference_mode():
        pack_dense(model)
        model(rows)
        unpack_dense(model)
    for module in (linear, model):
        module(rows).square().sum().backward()
    assert torch.equal(model.weight.grad, linear.weight.grad)
    assert torch.equal(model.bias.grad, linear.bias.grad)


def test_what_is_no_plain_linear_layer_is_left_alone():
    class Adapted(nn.Linear):
        """A layer that somebody else has changed."""

    model = nn.ModuleList(
        [Adapted(4, 4), linear_of(4, 4).double(), linear_of(4, 4).half(), nn.Bilinear(4, 4, 4)]
    )
    model.append(nn.Linear(4, 4, device="meta"))
    before = [(type(module), module.weight.data_ptr()) for module in model]
    pack_dense(model)
    assert [(type(module), module.weight.data_ptr()) for module in model] == before
