"""Pairs whose expert is elsewhere (id = number of experts) add nothing, under any backend."""

import logging

import pytest
import torch
from made_up_experts import (
    ALL,
    EXACT,
    TOLERANCE,
    D,
    E,
    assert_close,
    computed,
    make_experts,
    own,
    rows_of,
)

from moe_lightning.experts import backends
from moe_lightning.experts.adapters import add_experts_adapter
from moe_lightning.experts.backends import plain_backend
from moe_lightning.experts.permute import SortedRows
from moe_lightning.modeling.seam import find_moe_layers

NAN = float("nan")


@pytest.fixture(params=ALL)
def name(request):
    """Each of the backends of a CPU in turn."""
    return request.param


def one_pair_at_a_time(experts, rows_RD, index_RK, weights_RK):
    """By the family's own code, which some families wrote without a thought of elsewhere."""
    out_RD = torch.zeros_like(rows_RD)
    for r, k in (index_RK < experts.num_experts).nonzero().tolist():
        pair = rows_RD[r : r + 1], index_RK[r : r + 1, k : k + 1], weights_RK[r : r + 1, k : k + 1]
        out_RD[r] += own(experts, *pair)[0]
    return out_RD


def some_elsewhere(rows_RD, index_RK, weights_RK, *, num_experts):
    """Some pairs, all of rows 2 and 5, and none of row 3."""
    generator = torch.Generator().manual_seed(3)
    is_elsewhere = torch.rand(index_RK.shape, generator=generator) < 0.4
    is_elsewhere[[2, 5]], is_elsewhere[3] = True, False
    return rows_RD, index_RK.masked_fill(is_elsewhere, num_experts), weights_RK


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_some_pairs_elsewhere_in_every_layout(name, bias, transposed, norm):
    experts = make_experts(bias=bias, transposed=transposed, norm=norm)
    rows = some_elsewhere(*rows_of(9, 3), num_experts=E)
    got_RD = computed(name, experts, *rows)
    assert_close(name, got_RD, own(experts, *rows))
    assert not got_RD[[2, 5]].any()


def test_some_pairs_elsewhere_in_every_family(name, family, family_checkpoint, plain_transformers):
    experts = find_moe_layers(plain_transformers(family_checkpoint(family)).model)[-1].experts
    rows = some_elsewhere(*rows_of(9, 3, num_experts=8, hidden=32), num_experts=8)
    assert_close(name, computed(name, experts, *rows), one_pair_at_a_time(experts, *rows))


@pytest.mark.parametrize("num_rows", [1, 7])
def test_all_pairs_elsewhere(name, num_rows):
    rows_RD, index_RK, weights_RK = rows_of(num_rows)
    out_RD = computed(
        name, make_experts(bias=True), rows_RD, torch.full_like(index_RK, E), weights_RK
    )
    assert torch.equal(out_RD, torch.zeros(num_rows, D))


@pytest.mark.parametrize("name", ["auto", *ALL])
@pytest.mark.parametrize("num_rows", [0, 4])
def test_no_experts_at_all(name, num_rows, caplog):
    """A slot that holds none of a layer's experts; nothing to warn of."""
    caplog.set_level(logging.WARNING, logger="moe_lightning")
    experts = make_experts(bias=True, num_experts=0)
    rows_RD, _, weights_RK = rows_of(num_rows)
    index_RK = torch.zeros(num_rows, 2, dtype=torch.int64)
    out_RD = computed(name, experts, rows_RD, index_RK, weights_RK)
    assert torch.equal(out_RD, torch.zeros(num_rows, D))
    assert caplog.messages == []


def test_bad_rows_and_weights_stay_elsewhere(name):
    experts, (rows_RD, index_RK, weights_RK) = make_experts(), rows_of(5, 2)
    want_RD = own(experts, rows_RD, index_RK, weights_RK)
    index_RK[1], rows_RD[1], want_RD[1] = E, NAN, 0.0
    index_RK = torch.cat([index_RK, torch.full((5, 1), E)], 1)
    weights_RK = torch.cat([weights_RK, torch.full((5, 1), NAN)], 1)
    assert_close(name, computed(name, experts, rows_RD, index_RK, weights_RK), want_RD)


@pytest.mark.parametrize("name", [*EXACT, "cpu_int8"])  # cpu_half refuses bad weights
def test_bad_experts_do_not_reach_pairs_elsewhere(name):
    experts, rows = make_experts(), some_elsewhere(*rows_of(9, 3), num_experts=E)
    want_RD = own(experts, *rows)
    with torch.no_grad():
        experts.gate_up_proj[0] = experts.down_proj[0] = NAN  # no row goes to expert 0
    assert_close(name, computed(name, experts, *rows), want_RD)


@pytest.mark.parametrize("name", ["reference", "grouped_mm"])
def test_gradients_do_not_come_from_elsewhere(name):
    experts = make_experts(bias=True)
    rows_RD, index_RK, weights_RK = some_elsewhere(*rows_of(9, 3), num_experts=E)
    upstream_RD = torch.randn(9, D, generator=torch.Generator().manual_seed(7))
    gradients = []
    for compute in (plain_backend(name, experts), experts.forward):  # "eager": the loop
        sources = [rows_RD.clone().requires_grad_(), weights_RK.clone().requires_grad_()]
        out_RD = compute(sources[0], index_RK, sources[1])
        gradients.append(
            torch.autograd.grad(out_RD, [*sources, *experts.parameters()], upstream_RD)
        )
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, **TOLERANCE)
    assert not gradients[0][1][index_RK == E].any()


class OnlyGroups(torch.autograd.Function):
    """grouped_mm as on a GPU: rows after the last group are left as they were, here NaN."""

    @staticmethod
    def forward(ctx, rows_NX, weight_EXY, ends_E):
        ctx.save_for_backward(rows_NX, weight_EXY, ends_E)
        out_NY = rows_NX.new_full((rows_NX.shape[0], weight_EXY.shape[2]), NAN)
        for a, b, weight in spans(ends_E, weight_EXY):
            out_NY[a:b] = rows_NX[a:b] @ weight
        return out_NY

    @staticmethod
    def backward(ctx, upstream_NY):
        rows_NX, weight_EXY, ends_E = ctx.saved_tensors
        of_rows_NX, of_weight_EXY = torch.full_like(rows_NX, NAN), torch.zeros_like(weight_EXY)
        for e, (a, b, weight) in enumerate(spans(ends_E, weight_EXY)):
            of_rows_NX[a:b] = upstream_NY[a:b] @ weight.mT
            of_weight_EXY[e] = rows_NX[a:b].mT @ upstream_NY[a:b]
        return of_rows_NX, of_weight_EXY, None


def spans(ends_E, weight_EXY):
    ends = ends_E.tolist()
    return zip([0, *ends[:-1]], ends, weight_EXY, strict=True)


def sorted_as_on_a_gpu(index_TK, num_experts):
    """Rows of experts elsewhere stay, at the end."""
    expert_N, order_N = torch.sort(index_TK.reshape(-1), stable=True)
    ends_E = torch.searchsorted(expert_N, torch.arange(num_experts), right=True)
    return SortedRows(order_N, expert_N, ends_E.int())


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("has_adapters", [False, True])
def test_gradients_on_a_gpu_do_not_come_from_elsewhere(monkeypatch, has_adapters, norm):
    """A GPU's grouped_mm and sorting, imitated; the widths suit it."""
    experts = make_experts(bias=True, norm=norm)
    if has_adapters:
        for projection in ("gate_up_proj", "down_proj"):
            for name in add_experts_adapter(experts, projection, rank=4, scale=2.0):
                torch.nn.init.normal_(getattr(experts, name), std=0.2)
    rows_RD, index_RK, weights_RK = some_elsewhere(*rows_of(9, 3), num_experts=E)
    upstream_RD = torch.randn(9, D, generator=torch.Generator().manual_seed(7))

    def outcome():
        sources = [rows_RD.clone().requires_grad_(), weights_RK.clone().requires_grad_()]
        out_RD = plain_backend("grouped_mm", experts)(sources[0], index_RK, sources[1])
        wanted = [*sources, *experts.parameters()]
        return [out_RD, *torch.autograd.grad(out_RD, wanted, upstream_RD)]

    want = outcome()
    calls = []
    monkeypatch.setattr(backends, "sort_by_expert", sorted_as_on_a_gpu)
    monkeypatch.setattr(backends, "_has_rows_elsewhere", lambda device: True)
    monkeypatch.setattr(
        backends,
        "grouped_mm",
        lambda rows, weight, offs: calls.append(1) or OnlyGroups.apply(rows, weight, offs),
    )
    for got, expected in zip(outcome(), want, strict=True):
        torch.testing.assert_close(got, expected, **TOLERANCE)
    assert len(calls) == (6 if has_adapters else 2)
