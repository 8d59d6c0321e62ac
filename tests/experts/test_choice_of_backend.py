"""Which backend a name stands for, and what happens where it cannot serve."""

import logging

import pytest
import torch
from made_up_experts import TOLERANCE, E, computed, make_experts, own, relative_error, rows_of

from moe_lightning.errors import UsageError
from moe_lightning.experts import backends, make_backend
from moe_lightning.experts.backends import bytes_of_experts, bytes_per_weight, plain_backend
from moe_lightning.experts.packed import PackedExperts
from moe_lightning.experts.packed_weights import HalfWeights, Int8Weights, OneDnnWeights


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("auto", OneDnnWeights),
        ("cpu_packed", OneDnnWeights),
        ("cpu_half", HalfWeights),
        ("cpu_int8", Int8Weights),
    ],
)
def test_packed_backends_by_name(name, kind):
    compute = make_backend(name, make_experts())
    assert isinstance(compute, PackedExperts)
    assert compute.kind is kind


@pytest.mark.parametrize("make", [make_backend, plain_backend])
def test_unknown_backend_lists_the_known_ones(make):
    with pytest.raises(UsageError, match=r"experts_backend='magic'.*reference.*cpu_int8"):
        make("magic", make_experts())


@pytest.fixture
def warnings(caplog):
    """Lines of the package's log; each is written once a process, so what was before is undone."""
    backends._warn_once.cache_clear()
    caplog.set_level(logging.WARNING, logger="moe_lightning")
    return caplog


def test_float16_experts_fall_back_with_one_warning(warnings):
    experts, (rows_RD, index_RK, weights_RK) = make_experts(bias=True).half(), rows_of(9)
    rows = rows_RD.half(), index_RK, weights_RK.half()
    got_RD = computed("cpu_packed", experts, *rows)
    computed("cpu_packed", experts, *rows)
    (line,) = warnings.messages
    assert "experts_backend=cpu_packed" in line
    assert "float16" in line
    want_RD = own(experts.float(), rows_RD.half().float(), index_RK, weights_RK.half().float())
    assert got_RD.dtype == torch.float16
    assert relative_error(got_RD, want_RD) < 2e-3  # roundings to 11 bits


def test_auto_falls_back_without_a_word(warnings):
    experts, (rows_RD, index_RK, weights_RK) = make_experts().half(), rows_of(9)
    computed("auto", experts, rows_RD.half(), index_RK, weights_RK.half())
    assert warnings.messages == []


def test_triton_on_a_cpu_falls_back_with_one_warning(warnings, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    experts, rows = make_experts(), rows_of(9)
    got_RD = computed("triton", experts, *rows)
    torch.testing.assert_close(got_RD, own(experts, *rows), **TOLERANCE)
    (line,) = warnings.messages
    assert "experts_backend=triton" in line


@pytest.mark.parametrize("value", [7e4, -1e30, float("inf"), float("-inf"), float("nan")])
def test_weights_that_float16_cannot_hold_are_not_clamped(value, warnings):
    experts, rows = make_experts(), rows_of(9)
    with torch.no_grad():
        experts.down_proj[E - 1, 0, 0] = value
    got_RD, want_RD = computed("cpu_half", experts, *rows), own(experts, *rows)
    torch.testing.assert_close(got_RD, want_RD, equal_nan=True, **TOLERANCE)
    (line,) = warnings.messages
    assert "beyond float16's range" in line


@pytest.mark.parametrize("transposed", [False, True])
def test_bytes_of_experts_count_what_a_layout_pads(transposed):
    # Up takes 16 inputs and gives 48 numbers, down takes 24 and gives 16; biases of 48 and 16.
    experts = make_experts(gate=True, bias=True, transposed=transposed)
    biases = E * (48 + 16) * 4
    weights = E * (48 * 16 + 16 * 24)
    padded = E * (48 * 512 + 16 * 512)
    got = {
        name: bytes_of_experts(name, experts, "cpu")
        for name in ("auto", "cpu_packed", "cpu_half", "cpu_int8")
    }
    assert got == {
        "auto": 4 * weights + biases,
        "cpu_packed": 4 * weights + biases,
        "cpu_half": 2 * padded + biases,
        "cpu_int8": weights + biases,
    }
    assert bytes_of_experts("cpu_half", experts, "cuda") == 4 * weights + biases


def test_bytes_per_weight():
    table = {
        name: [bytes_per_weight(name, torch.float32, device) for device in ("cpu", "cuda")]
        for name in ("auto", "cpu_packed", "cpu_half", "cpu_int8")
    }
    # A backend for CPUs gives way on a GPU, where weights stay as they are.
    assert table == {
        "auto": [4, 4],
        "cpu_packed": [4, 4],
        "cpu_half": [2, 4],
        "cpu_int8": [1, 4],
    }
    assert bytes_per_weight("cpu_half", torch.bfloat16, "cpu") == 2
    assert bytes_per_weight("grouped_mm", torch.bfloat16, "cpu") == 2
