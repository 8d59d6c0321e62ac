"""Every backend computes what the family's own code computes; those that train, backward too."""

import pytest
import torch
from made_up_experts import (
    ALL,
    ERRORS,
    TOLERANCE,
    TRAINING,
    E,
    assert_close,
    computed,
    make_experts,
    own,
    relative_error,
    rows_of,
)

from moe_lightning.experts import make_backend
from moe_lightning.experts.backends import plain_backend
from moe_lightning.modeling.seam import find_moe_layers


@pytest.fixture(params=ALL)
def name(request):
    """Each of the backends of a CPU in turn."""
    return request.param


def forward_and_gradients(compute, experts, rows_RD, index_RK, weights_RK):
    inputs = [rows_RD.clone().requires_grad_(), weights_RK.clone().requires_grad_()]
    out_RD = compute(inputs[0], index_RK, inputs[1])
    upstream_RD = torch.randn(out_RD.shape, generator=torch.Generator().manual_seed(7))
    sources = inputs + list(experts.parameters())
    return [out_RD, *torch.autograd.grad(out_RD, sources, upstream_RD)]


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


# Every layout and family.


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gate", [False, True])
def test_every_layout_equals_the_obvious_loop(gate, bias, transposed, norm):
    experts = make_experts(gate=gate, bias=bias, transposed=transposed, norm=norm)
    rows = rows_of(11)
    want = forward_and_gradients(experts.forward, experts, *rows)  # "eager": the loop
    for name in TRAINING:
        compute = plain_backend(name, experts)
        assert_same(forward_and_gradients(compute, experts, *rows), want)
    for name in ("cpu_packed", *ERRORS):
        assert_close(name, computed(name, experts, *rows), want[0].detach())


@pytest.mark.parametrize("name", TRAINING)
def test_gradients_of_every_family_equal_its_own_eager_code(
    name, family, family_checkpoint, plain_transformers
):
    layer = find_moe_layers(plain_transformers(family_checkpoint(family)).model)[-1]
    rows = rows_of(23, num_experts=8, hidden=32)
    want = forward_and_gradients(layer.experts.forward, layer.experts, *rows)
    compute = plain_backend(name, layer.experts)
    assert_same(forward_and_gradients(compute, layer.experts, *rows), want)


def test_every_family_equals_its_own_eager_code(
    name, family, family_checkpoint, plain_transformers
):
    layer = find_moe_layers(plain_transformers(family_checkpoint(family)).model)[-1]
    rows = rows_of(23, num_experts=8, hidden=32)
    assert_close(name, computed(name, layer.experts, *rows), own(layer.experts, *rows))


def test_errors_at_the_widths_of_checkpoints_are_as_stated():
    experts = make_experts(hidden=1024, width=768, num_experts=2)
    rows = rows_of(32, 1, num_experts=2, hidden=1024)
    want = own(experts, *rows)
    # What the options' help promises.
    assert relative_error(computed("cpu_half", experts, *rows), want) < 4e-4
    assert 1e-2 < relative_error(computed("cpu_int8", experts, *rows), want) < 3e-2


# Unusual routings, rows and widths.


def test_one_row(name):
    experts, rows = make_experts(bias=True), rows_of(1)
    assert_close(name, computed(name, experts, *rows), own(experts, *rows))


@pytest.mark.parametrize("top_k", [1, E - 1])
def test_one_and_nearly_all_experts_a_row(name, top_k):
    experts, rows = make_experts(), rows_of(7, top_k)
    assert_close(name, computed(name, experts, *rows), own(experts, *rows))


def test_all_rows_to_one_expert(name):
    experts = make_experts(bias=True, transposed=True)
    rows_RD, index_RK, weights_RK = rows_of(9, 1)
    rows = rows_RD, torch.full_like(index_RK, E - 1), weights_RK
    assert_close(name, computed(name, experts, *rows), own(experts, *rows))


def test_rows_that_are_not_contiguous(name):
    experts, (rows_RD, index_RK, weights_RK) = make_experts(), rows_of(9)
    want = own(experts, rows_RD, index_RK, weights_RK)
    strided_RD = torch.stack([rows_RD, rows_RD], dim=2)[..., 0]
    columns = rows_RD.t().contiguous().t(), index_RK.t().contiguous().t(), weights_RK
    for rows in ((strided_RD, index_RK, weights_RK), columns):
        assert not rows[0].is_contiguous()
        assert_close(name, computed(name, experts, *rows), want)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("hidden", "width"), [(16, 10), (12, 24), (10, 7)])
def test_odd_widths(name, hidden, width, transposed):
    """torch's grouped_mm wants rows of a multiple of 16 bytes; checkpoints need not."""
    experts = make_experts(hidden=hidden, width=width, transposed=transposed)
    rows = rows_of(9, hidden=hidden)
    assert_close(name, computed(name, experts, *rows), own(experts, *rows))


def test_the_answer_does_not_depend_on_the_order_of_rows(name):
    experts, (rows_RD, index_RK, weights_RK) = make_experts(bias=True), rows_of(12)
    flip = torch.arange(11, -1, -1)
    there = computed(name, experts, rows_RD, index_RK, weights_RK)
    back = computed(name, experts, rows_RD[flip], index_RK[flip], weights_RK[flip])
    torch.testing.assert_close(back[flip], there, **TOLERANCE)


def test_no_rows(name, family, family_checkpoint, plain_transformers):
    layer = find_moe_layers(plain_transformers(family_checkpoint(family)).model)[-1]
    out_RD = computed(name, layer.experts, *rows_of(0, num_experts=8, hidden=32))
    assert out_RD.shape == (0, 32)
    assert out_RD.dtype == torch.float32


def test_calls_leave_their_arguments_alone(name):
    rows = rows_of(9)
    before = [tensor.clone() for tensor in rows]
    computed(name, make_experts(bias=True), *rows)
    assert all(torch.equal(a, b) for a, b in zip(rows, before, strict=True))


# Dtypes.


@pytest.mark.parametrize("width", [24, 12])
def test_bfloat16_keeps_its_dtype_and_stays_close(name, width):
    experts = make_experts(bias=True, norm=True, width=width).to(torch.bfloat16)
    rows_RD, index_RK, weights_RK = rows_of(9)
    rows_RD, weights_RK = rows_RD.bfloat16(), weights_RK.bfloat16()
    got_RD = computed(name, experts, rows_RD, index_RK, weights_RK)
    want_RD = own(experts.float(), rows_RD.float(), index_RK, weights_RK.float())
    assert got_RD.dtype == torch.bfloat16
    # A few roundings to 8 bits, 2e-3 each; int8 has its own error as well.
    assert relative_error(got_RD, want_RD) < (5e-2 if name == "cpu_int8" else 2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["grouped_mm", "cpu_packed", "cpu_half", "cpu_int8"])
def test_rows_may_have_another_dtype_than_experts(name, dtype):
    """As autocast gives them; the family's own code does not take them."""
    experts, (rows_RD, index_RK, weights_RK) = make_experts(bias=True), rows_of(9)
    got_RD = computed(name, experts, rows_RD.to(dtype), index_RK, weights_RK)
    assert got_RD.dtype == dtype
    want_RD = own(experts, rows_RD.to(dtype).float(), index_RK, weights_RK)
    assert relative_error(got_RD, want_RD) < (4e-2 if name == "cpu_int8" else 1e-2)


# Training.


@pytest.mark.parametrize("name", TRAINING)
def test_gradients_of_experts_without_rows_are_zero(name):
    experts = make_experts(bias=True)
    compute = plain_backend(name, experts)
    _, _, _, *gradients = forward_and_gradients(compute, experts, *rows_of(5))
    assert len(gradients) == 4
    for gradient in gradients:
        assert not gradient[0].any()
        assert gradient[1:].any()


def test_an_expanded_upstream_gradient_is_fine():
    """``out.sum()`` sends back one number, expanded to all rows."""
    experts = make_experts()
    gradients = []
    for name in TRAINING:
        rows_RD, index_RK, weights_RK = rows_of(6)
        rows_RD.requires_grad_()
        plain_backend(name, experts)(rows_RD, index_RK, weights_RK).sum().backward()
        gradients.append(rows_RD.grad)
    torch.testing.assert_close(gradients[1], gradients[0], **TOLERANCE)


@pytest.mark.parametrize("name", ["auto", "cpu_packed", "cpu_half", "cpu_int8"])
def test_until_packed_every_backend_trains(name):
    experts = make_experts()
    compute = plain_backend(name, experts)
    rows = rows_of(6)
    want = forward_and_gradients(experts.forward, experts, *rows)
    assert_same(forward_and_gradients(compute, experts, *rows), want)


def test_packed_experts_refuse_to_train():
    compute = make_backend("cpu_packed", make_experts())
    rows_RD, index_RK, weights_RK = rows_of(3)
    with pytest.raises(AssertionError, match="no gradients"):
        compute(rows_RD.requires_grad_(), index_RK, weights_RK)
