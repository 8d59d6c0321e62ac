"""NaN and infinity show in the rows that they belong to, and nowhere else, under any backend."""

import pytest
import torch
from made_up_experts import ALL, computed, make_experts, rows_of

INF, NAN = float("inf"), float("nan")


@pytest.fixture(params=ALL)
def name(request):
    """Each of the backends of a CPU in turn."""
    return request.param


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_bad_number_spoils_its_row_and_no_other(name, bad, transposed):
    experts = make_experts(bias=True, transposed=transposed)
    rows_RD, index_RK, weights_RK = rows_of(9)
    before_RD = computed(name, experts, rows_RD, index_RK, weights_RK)
    rows_RD[4, 7] = bad
    after_RD = computed(name, experts, rows_RD, index_RK, weights_RK)
    assert not after_RD[4].isfinite().all()
    if bad != bad:
        assert after_RD[4].isnan().all()
    others = torch.arange(9) != 4
    # Bitwise: as many rows as before for each expert.
    assert torch.equal(after_RD[others], before_RD[others])


def test_a_row_of_nothing_but_nan(name):
    experts, (rows_RD, index_RK, weights_RK) = make_experts(), rows_of(9)
    before_RD = computed(name, experts, rows_RD, index_RK, weights_RK)
    rows_RD[0] = NAN
    after_RD = computed(name, experts, rows_RD, index_RK, weights_RK)
    assert after_RD[0].isnan().all()
    assert torch.equal(after_RD[1:], before_RD[1:])


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("projection", ["gate_up_proj", "down_proj"])
def test_a_bad_weight_spoils_the_rows_of_its_expert(name, projection, bad):
    experts, (rows_RD, index_RK, weights_RK) = make_experts(), rows_of(9)
    before_RD = computed("grouped_mm", experts, rows_RD, index_RK, weights_RK)
    with torch.no_grad():
        getattr(experts, projection)[2, 3, 5] = bad
    after_RD = computed(name, experts, rows_RD, index_RK, weights_RK)
    is_visitor_R = (index_RK == 2).any(1)
    assert 0 < int(is_visitor_R.sum()) < 9
    assert not after_RD[is_visitor_R].isfinite().all(1).any()
    error_RD = after_RD[~is_visitor_R] - before_RD[~is_visitor_R]
    assert error_RD.norm() < 4e-2 * before_RD[~is_visitor_R].norm()


def test_rows_of_zeros_and_of_the_smallest_numbers(name):
    """A scale for each row must not divide by nothing."""
    experts, (rows_RD, index_RK, weights_RK) = make_experts(), rows_of(4)
    rows_RD[0], rows_RD[1], rows_RD[2] = 0.0, 1e-45, -1e-40
    out_RD = computed(name, experts, rows_RD, index_RK, weights_RK)
    assert not out_RD[0].any()
    assert out_RD.isfinite().all()
    assert out_RD[1:3].abs().max() < 1e-35
    assert out_RD[3].any()
