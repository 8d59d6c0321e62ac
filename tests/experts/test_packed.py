"""Packing takes a module's weights over, and gives them back."""

import pytest
import torch
from made_up_experts import TOLERANCE, D, E, assert_close, computed, make_experts, own, rows_of

from moe_lightning.errors import UsageError
from moe_lightning.experts import ExpertShard

PACKED = ("cpu_packed", "cpu_half", "cpu_int8")
HAS_BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
PACKED_DTYPES = [
    (backend, dtype)
    for backend in PACKED
    for dtype in (torch.float32, torch.bfloat16)
    if backend != "cpu_packed" or dtype == torch.float32 or HAS_BF16
]
LAYOUTS = [{"transposed": False}, {"transposed": True}, {"gate": False, "bias": True}]


def shard_of(experts, backend):
    return ExpertShard(experts, layer=0, expert_ids=range(E), backend=backend)


def weights_of(experts):
    """The two projections; biases and norms are never packed."""
    return {name: p for name, p in experts.named_parameters() if name.endswith("_proj")}


def compute(shard, rows):
    with torch.inference_mode():
        return shard.compute(*rows)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("backend", "dtype"), PACKED_DTYPES)
def test_packing_takes_the_weights_over(backend, dtype, layout):
    experts = make_experts(**layout).to(dtype)
    before = {name: (p, p.shape, p.requires_grad) for name, p in experts.named_parameters()}
    biases = {n: p.clone() for n, p in experts.named_parameters() if n not in weights_of(experts)}
    shard = shard_of(experts, backend)
    shard.pack()
    assert shard.device == torch.device("cpu")
    after = dict(experts.named_parameters())
    assert list(after) == list(before)
    for name, (parameter, shape, requires_grad) in before.items():
        assert after[name] is parameter
        assert (parameter.shape, parameter.dtype) == (shape, dtype)
        assert parameter.requires_grad == requires_grad
    for parameter in weights_of(experts).values():
        assert parameter.isnan().all()
        assert parameter.untyped_storage().nbytes() == dtype.itemsize
    for name, bias in biases.items():
        assert torch.equal(after[name], bias)


@pytest.mark.parametrize("backend", PACKED)
def test_packing_twice_does_nothing(backend):
    experts, rows = make_experts(bias=True), rows_of(7)
    want_RD = own(experts, *rows)
    shard = shard_of(experts, backend)
    shard.pack()
    first_RD = compute(shard, rows)
    shard.pack()
    assert torch.equal(compute(shard, rows), first_RD)
    assert_close(backend, first_RD, want_RD)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["auto", "cpu_packed"])
def test_exact_weights_come_back_bitwise(backend, dtype, layout):
    experts = make_experts(**layout).to(dtype)
    before = {name: (p, p.detach().clone()) for name, p in experts.named_parameters()}
    shard = shard_of(experts, backend)
    for _ in range(2):
        shard.pack()
        shard.unpack()
    for name, parameter in experts.named_parameters():
        same, weight = before[name]
        assert parameter is same
        assert torch.equal(parameter, weight)
        assert parameter.stride() == weight.stride()
        assert parameter.is_contiguous()


@pytest.mark.parametrize("inference", [False, True])
def test_unpacked_experts_train(inference):
    """Even if they were packed and unpacked while no gradients could be recorded."""
    experts, (rows_RD, index_RK, weights_RK) = make_experts(transposed=True), rows_of(7)
    shard = shard_of(experts, "auto")
    with torch.inference_mode(inference):
        shard.pack()
        shard.compute(rows_RD, index_RK, weights_RK)
        shard.unpack()
    out_RD = shard.compute(rows_RD.requires_grad_(), index_RK, weights_RK)
    got = torch.autograd.grad(out_RD.sum(), [rows_RD, *experts.parameters()])
    out_RD = experts.forward(rows_RD, index_RK, weights_RK)  # "eager": the loop
    want = torch.autograd.grad(out_RD.sum(), [rows_RD, *experts.parameters()])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


def test_an_optimizer_step_between_packings_is_seen():
    experts, rows = make_experts(), rows_of(7)
    shard = shard_of(experts, "auto")
    optimizer = torch.optim.SGD(experts.parameters(), lr=0.1)
    shard.pack()
    before_RD = compute(shard, rows)
    shard.unpack()
    shard.compute(*rows).square().sum().backward()
    optimizer.step()
    want_RD = own(experts, *rows)
    shard.pack()
    after_RD = compute(shard, rows)
    torch.testing.assert_close(after_RD, want_RD, **TOLERANCE)
    assert not torch.allclose(after_RD, before_RD, atol=1e-2)


@pytest.mark.parametrize("backend", ["cpu_half", "cpu_int8"])
def test_what_is_not_exact_cannot_be_unpacked(backend):
    experts, rows = make_experts(), rows_of(7)
    want_RD = own(experts, *rows)
    shard = shard_of(experts, backend)
    shard.pack()
    with pytest.raises(UsageError, match=rf"experts_backend={backend}.*trained nor saved.*auto"):
        shard.unpack()
    assert_close(backend, compute(shard, rows), want_RD)  # it still predicts


@pytest.mark.parametrize("backend", ["grouped_mm", "reference", *PACKED])
def test_a_shard_that_is_not_packed_has_nothing_to_unpack(backend):
    experts = make_experts()
    before = {name: p.detach().clone() for name, p in experts.named_parameters()}
    shard = shard_of(experts, backend)
    shard.unpack()
    shard.make_room()
    assert all(torch.equal(p, before[name]) for name, p in experts.named_parameters())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["grouped_mm", *PACKED])
def test_other_weights_can_be_loaded_into_the_room_that_is_made(backend, layout):
    experts, rows = make_experts(**layout), rows_of(7)
    other = make_experts(**layout)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-0.5)
    want_RD = own(other, *rows)
    shard = shard_of(experts, backend)
    shard.pack()
    shard.make_room()
    for name, parameter in weights_of(experts).items():
        weight = other.get_parameter(name)
        assert parameter.stride() == weight.stride()
        assert parameter.untyped_storage().nbytes() == weight.numel() * 4
    if backend != "grouped_mm":  # whoever uses it before it is filled will notice
        assert all(p.isnan().all() for p in weights_of(experts).values())
    experts.load_state_dict(other.state_dict())
    shard.pack()
    got_RD = compute(shard, rows)
    assert_close(backend, got_RD, want_RD)
    assert torch.equal(got_RD, computed(backend, other, *rows))


def test_a_shard_computes_the_experts_that_it_holds():
    experts = make_experts(bias=True)
    shard = ExpertShard(experts, layer=3, expert_ids=[7, 1, 4, 0, 2, 9], backend="auto")
    rows_RD, index_RK, weights_RK = rows_of(4)
    want_RD = own(experts, rows_RD, index_RK, weights_RK)
    torch.testing.assert_close(shard.compute(rows_RD, index_RK, weights_RK), want_RD, **TOLERANCE)
    assert (shard.layer, shard.expert_ids) == (3, (7, 1, 4, 0, 2, 9))
    with pytest.raises(AssertionError, match="its experts and no others"):
        ExpertShard(experts, layer=3, expert_ids=range(E - 1), backend="auto")


def test_an_unknown_backend_is_refused_before_any_weight_is_touched():
    with pytest.raises(UsageError, match="experts_backend='magic'"):
        shard_of(make_experts(), "magic")


@pytest.mark.parametrize("backend", PACKED)
def test_a_shard_without_experts_packs_and_unpacks(backend):
    shard = ExpertShard(make_experts(num_experts=0), layer=0, expert_ids=[], backend=backend)
    shard.pack()
    rows_RD, index_RK, weights_RK = rows_of(3)
    out_RD = compute(shard, (rows_RD, torch.zeros_like(index_RK), weights_RK))
    assert torch.equal(out_RD, torch.zeros(3, D))
    shard.unpack()
