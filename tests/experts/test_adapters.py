"""Adapters of fused experts compute what merged weights compute, forward and backward."""

import copy

import pytest
import torch
from made_up_experts import TOLERANCE, TRAINING, D, E, F, make_experts, rows_of
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from moe_lightning.experts import make_backend
from moe_lightning.experts.adapters import (
    add_experts_adapter,
    has_adapters,
    merged,
    with_merged_weights,
)
from moe_lightning.experts.backends import plain_backend, why_not
from moe_lightning.experts.packed import projections

SCALE = 1.5


def adapted_experts(*, rank=4, which=(0, 1), **layout):
    """Made-up experts with adapters of random A and B on some of their projections."""
    experts = make_experts(**layout)
    generator = torch.Generator().manual_seed(5)
    for position in which:
        names = add_experts_adapter(experts, projections(experts)[position], rank=rank, scale=SCALE)
        for name in names:
            parameter = getattr(experts, name)
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return experts


def by_merged_weights(experts, rows_RD, index_RK, weights_RK):
    """The family's own loop on weights merged by a formula of the tests."""
    weights = {}
    for name in projections(experts):
        a, b = (getattr(experts, f"{name}_lora_{letter}", None) for letter in "AB")
        if a is not None:
            order = "eyp,epx->exy" if experts.is_transposed else "eyp,epx->eyx"
            weights[name] = getattr(experts, name) + SCALE * torch.einsum(order, b, a)
    return functional_call(experts, weights, (rows_RD, index_RK, weights_RK))  # "eager"


def forward_and_gradients(compute, experts, rows_RD, index_RK, weights_RK):
    inputs = [rows_RD.clone().requires_grad_(), weights_RK.clone().requires_grad_()]
    out_RD = compute(inputs[0], index_RK, inputs[1])
    upstream_RD = torch.randn(out_RD.shape, generator=torch.Generator().manual_seed(7))
    return [out_RD, *torch.autograd.grad(out_RD, inputs + list(experts.parameters()), upstream_RD)]


def assert_like_merged(name, experts, rows):
    got = forward_and_gradients(plain_backend(name, experts), experts, *rows)
    want = forward_and_gradients(
        lambda *inputs: by_merged_weights(experts, *inputs), experts, *rows
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gate", [False, True])
def test_every_layout_equals_merged_weights(name, gate, bias, transposed):
    experts = adapted_experts(gate=gate, bias=bias, transposed=transposed)
    assert_like_merged(name, experts, rows_of(11))


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_any_rank(name, rank):
    assert_like_merged(name, adapted_experts(rank=rank, bias=True, norm=True), rows_of(9))


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize("which", [(0,), (1,)])
def test_one_of_the_projections(name, which):
    assert_like_merged(name, adapted_experts(which=which, transposed=True), rows_of(9))


@pytest.mark.parametrize("name", TRAINING)
def test_pairs_elsewhere(name):
    rows_RD, index_RK, weights_RK = rows_of(9, 3)
    index_RK[2], index_RK[5, 1] = E, E
    assert_like_merged(name, adapted_experts(bias=True), (rows_RD, index_RK, weights_RK))


@pytest.mark.parametrize("name", TRAINING)
def test_widths_that_grouped_mm_refuses(name):
    experts = adapted_experts(hidden=6, width=5)
    assert_like_merged(name, experts, rows_of(9, hidden=6))


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize("num_rows", [0, 3])
def test_no_experts_here(name, num_rows):
    experts = adapted_experts(num_experts=0)
    rows_RD, _, weights_RK = rows_of(num_rows)
    index_RK = torch.zeros(num_rows, 2, dtype=torch.int64)
    out_RD = plain_backend(name, experts)(rows_RD, index_RK, weights_RK)
    assert torch.equal(out_RD, torch.zeros(num_rows, D))


@pytest.mark.parametrize("name", TRAINING)
def test_adapters_of_zeros_change_no_bit(name):
    plain, rows = make_experts(bias=True), rows_of(11)
    experts = make_experts(bias=True)
    for projection in projections(experts):
        a_name, _ = add_experts_adapter(experts, projection, rank=4, scale=SCALE)
        torch.nn.init.normal_(getattr(experts, a_name))
    want_RD = plain_backend(name, plain)(*rows)
    assert torch.equal(plain_backend(name, experts)(*rows), want_RD)


class LargestNew(TorchDispatchMode):
    """Notes the most numbers in a tensor that has memory of its own."""

    def __init__(self, known):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            is_tensor = isinstance(tensor, torch.Tensor)
            if is_tensor and tensor.untyped_storage().data_ptr() not in self.known:
                self.most = max(self.most, tensor.numel())
        return out


def test_grouped_never_makes_a_weight_of_all_experts():
    experts = adapted_experts(rank=4)
    for name in projections(experts):
        getattr(experts, name).requires_grad_(False)
    rows_RD, index_RK, weights_RK = rows_of(3)
    with LargestNew(experts.parameters()) as largest:
        plain_backend("grouped_mm", experts)(rows_RD, index_RK, weights_RK).sum().backward()
    assert 0 < largest.most < E * D * F  # the smaller of the two weights
    assert experts.down_proj_lora_B.grad is not None
    assert experts.down_proj.grad is None


@pytest.mark.parametrize("name", ["auto", "cpu_packed", "cpu_int8"])
def test_backends_for_inference_give_way(name):
    experts, rows = adapted_experts(), rows_of(11)
    with torch.no_grad():
        want_RD = by_merged_weights(experts, *rows)
    got_RD = make_backend(name, copy.deepcopy(experts))(*rows)
    torch.testing.assert_close(got_RD, want_RD, **TOLERANCE)
    assert "LoRA" in why_not("cpu_packed", experts)
    assert why_not("cpu_packed", make_experts()) is None


def test_bfloat16_weights_and_float32_adapters():
    experts = adapted_experts()
    for name in projections(experts):
        parameter = getattr(experts, name)
        parameter.data = parameter.data.bfloat16()
    rows_RD, index_RK, weights_RK = rows_of(11)
    with torch.no_grad():
        want_RD = by_merged_weights(copy.deepcopy(experts).float(), rows_RD, index_RK, weights_RK)
    with torch.no_grad():
        got_RD = plain_backend("grouped_mm", experts)(rows_RD, index_RK, weights_RK)
    # bfloat16 keeps 8 bits: a few roundings of 2^-9 each.
    assert float((got_RD - want_RD).norm() / want_RD.norm()) < 2e-2


@pytest.mark.parametrize("is_transposed", [False, True])
def test_merged_of_one_weight(is_transposed):
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64)
    a, b = torch.tensor([[1.0, -1.0]]), torch.tensor([[1.0], [0.0], [2.0]])
    want = torch.tensor([[3.0, 0.0], [3.0, 4.0], [9.0, 2.0]], dtype=torch.float64)
    stored = weight.mT if is_transposed else weight
    got = merged(stored, a, b, scale=2.0, is_transposed=is_transposed)
    assert torch.equal(got, want.mT if is_transposed else want)


def test_merging_a_view_leaves_the_module_alone():
    experts = adapted_experts()
    before = {name: tensor.clone() for name, tensor in experts.state_dict().items()}
    view = with_merged_weights(experts)
    assert not torch.equal(view.down_proj, experts.down_proj)
    assert experts.state_dict().keys() == before.keys()
    assert all(torch.equal(experts.state_dict()[name], before[name]) for name in before)
    plain = make_experts()
    assert with_merged_weights(plain) is plain
    assert not has_adapters(plain)


@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("width", [5, 6])
def test_only_the_width_is_refused_by_grouped_mm(rank, width):
    """The forward's inputs suit grouped_mm, and the gradient of its output does not."""
    assert_like_merged("grouped_mm", adapted_experts(rank=rank, width=width), rows_of(9))
