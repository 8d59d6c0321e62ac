"""The experts that a worker holds: read alone, computed as the family does, within its memory."""

import re

import pytest
import torch
from masters import CPU, EXPERT_BYTES, LAYERS

from moe_lightning.errors import CheckpointError
from moe_lightning.experts.backends import reference
from moe_lightning.modeling.checkpoint import open_checkpoint
from moe_lightning.modeling.seam import find_moe_layers
from moe_lightning.workers.expert_host import ExpertHost


@pytest.fixture
def host_of():
    """A host of a checkpoint: ``host_of(path, ...)``."""
    views = []

    def host_of(path, **options):
        views.append(open_checkpoint(str(path)))
        return ExpertHost(views[-1], device=CPU, **options)

    yield host_of
    for view in views:
        view.close()


@pytest.fixture
def host(host_of, checkpoint):
    return lambda **options: host_of(checkpoint, **options)


def load(host, experts, *, dtype=torch.float32, backend="auto"):
    host.load(experts, dtype=dtype, experts_backend=backend)


def test_experts_of_every_family_give_what_the_family_gives(
    family, family_checkpoint, plain_transformers, host_of
):
    """Loaded in two parts, in no order, next to experts that are elsewhere."""
    path = family_checkpoint(family)
    layers = find_moe_layers(plain_transformers(path).model)
    held = host_of(path)
    load(held, {layer.layer: [6, 1] for layer in layers})
    load(held, {layer.layer: [2, 0, 6, 7] for layer in layers})
    generator = torch.Generator().manual_seed(5)
    hidden_TD = torch.randn(31, 32, generator=generator)
    weights_TK, index_TK = torch.rand(31, 8, generator=generator).topk(3, dim=1)
    is_here_TK = torch.isin(index_TK, torch.tensor([0, 1, 2, 6, 7]))
    for layer in layers:
        sums_TD = held.compute(
            layer.layer, hidden_TD, index_TK.masked_fill(~is_here_TK, 8), weights_TK
        )
        with torch.no_grad():
            want_TD = reference(
                layer.experts, hidden_TD, index_TK, weights_TK.masked_fill(~is_here_TK, 0.0)
            )
        # fp32 sums in another order.
        torch.testing.assert_close(sums_TD, want_TD, atol=1e-6, rtol=1e-5)


def test_only_the_experts_that_are_asked_for_are_read(host):
    held = host()
    load(held, {0: [3], 2: [1, 7]})
    assert held.view.bytes_read == 3 * EXPERT_BYTES
    load(held, {0: [3], 2: [1, 7]})
    assert held.view.bytes_read == 3 * EXPERT_BYTES, "what is held is not read again"
    load(held, {0: [3, 4], 1: [0]})
    assert held.view.bytes_read == 5 * EXPERT_BYTES


def test_what_is_not_held_is_not_computed(host, rows):
    held = host()
    hidden_TD, index_TK, weights_TK = rows(3)
    assert held.compute(1, hidden_TD, index_TK, weights_TK) is None
    load(held, {1: range(7)})
    assert held.compute(0, hidden_TD, index_TK, weights_TK) is None
    assert held.compute(1, hidden_TD, torch.full_like(index_TK, 7), weights_TK) is None
    assert held.compute(1, hidden_TD, torch.full_like(index_TK, 6), weights_TK) is not None
    held.free()
    assert held.compute(1, hidden_TD, torch.full_like(index_TK, 6), weights_TK) is None


def test_the_rows_of_a_request_stay_as_they_are(host, rows):
    """They are in the memory of the message."""
    held = host()
    load(held, {0: range(8)})
    some = rows(9)
    before = [each.clone() for each in some]
    held.compute(0, *some)
    assert all(torch.equal(*pair) for pair in zip(some, before, strict=True))


# Memory.


def test_a_limit_counts_what_is_held(host):
    held = host(memory_bytes=10 * EXPERT_BYTES)
    assert held.offered_bytes() == 10 * EXPERT_BYTES
    load(held, {0: [0, 1, 2], 1: [5]})
    assert held.offered_bytes() == 6 * EXPERT_BYTES
    with pytest.raises(ValueError, match="GB are free"):
        load(held, {2: range(7)})
    assert held.offered_bytes() == 6 * EXPERT_BYTES
    load(held, {2: range(6)})
    assert held.offered_bytes() == 0
    load(held, {2: range(6)})  # nothing new
    with pytest.raises(ValueError, match="GB are free"):
        load(held, {0: [0, 1, 2, 3]})
    held.free()
    assert held.offered_bytes() == 10 * EXPERT_BYTES


def test_smaller_weights_leave_more_room(host):
    half, int8 = host(memory_bytes=1e6), host(memory_bytes=1e6)
    load(half, {0: range(8)}, dtype=torch.bfloat16)
    assert half.offered_bytes() == 1_000_000 - 8 * EXPERT_BYTES // 2
    load(int8, {0: range(8)}, backend="cpu_int8")
    # Each weight one byte, and a scale for each row of a matrix.
    taken = 1_000_000 - int8.offered_bytes()
    assert 8 * EXPERT_BYTES / 4 <= taken < 8 * EXPERT_BYTES / 2


def test_no_more_is_offered_than_there_is(host, monkeypatch):
    monkeypatch.setattr("moe_lightning.workers.expert_host.free_bytes", lambda device: 12_345)
    assert host().offered_bytes() == 12_345
    assert host(memory_bytes=1e9).offered_bytes() == 12_345
    assert host(memory_bytes=1e4).offered_bytes() == 10_000
    with pytest.raises(ValueError, match="GB are free"):
        load(host(), {0: [0, 1]})


# A way of its own.


def test_a_worker_may_compute_in_a_way_of_its_own(host, rows, expected):
    some = rows(200)
    exact, int8 = host(), host(experts_backend="cpu_int8")
    for held in (exact, int8):
        load(held, {0: range(8)}, backend="grouped_mm")
    want_TD = expected(0, *some)
    errors = [
        float((held.compute(0, *some) - want_TD).norm() / want_TD.norm()) for held in (exact, int8)
    ]
    # As tests/experts/made_up_experts.py: int8 errs by 1e-3 to 4e-2.
    assert errors[0] < 1e-6
    assert 1e-3 < errors[1] < 4e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_have_the_dtype_of_the_run(dtype, host, rows, expected):
    hidden_TD, index_TK, weights_TK = rows(20)
    held = host()
    load(held, {0: range(8)}, dtype=dtype)
    sums_TD = held.compute(0, hidden_TD.to(dtype), index_TK, weights_TK)
    assert sums_TD.dtype == dtype
    want_TD = expected(0, hidden_TD, index_TK, weights_TK)
    # Rows, weights and what is between are rounded to 8 or 11 bits.
    tolerance = 3e-2 if dtype == torch.bfloat16 else 4e-3
    assert 1e-5 < float((sums_TD.float() - want_TD).norm() / want_TD.norm()) < tolerance


# Wrong requests.


@pytest.mark.parametrize(
    ("experts", "words"),
    [
        ({0: [8]}, "layer 0 has no experts [8]"),
        ({0: [1], 2: [0, -1]}, "layer 2 has no experts [-1]"),
        ({3: [0]}, "layers [3] have no experts"),
        ({-1: []}, "layers [-1] have no experts"),
    ],
)
def test_experts_that_do_not_exist_are_named(experts, words, host):
    held = host(memory_bytes=1e6)
    for _ in range(2):  # with nothing held, and with all of one layer
        before = held.offered_bytes()
        with pytest.raises(ValueError, match=re.escape(words)):
            load(held, experts)
        assert held.offered_bytes() == before
        load(held, {0: range(8)})


def test_a_dense_layer_has_no_experts(family_checkpoint, host_of):
    """The DeepSeek families begin with one."""
    held = host_of(family_checkpoint("deepseek_v3"))
    with pytest.raises(ValueError, match=r"layers \[0\] have no experts"):
        load(held, {0: [1]})
    load(held, {1: [1]})


def test_a_file_that_is_gone_is_an_error_and_nothing_is_held(
    family_checkpoint, host_of, rows, tmp_path
):
    path = tmp_path / "copy"
    path.mkdir()
    for file in family_checkpoint("mixtral").iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    held = host_of(path, memory_bytes=1e6)
    for file in path.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(CheckpointError):
        load(held, {layer: [0, 1] for layer in LAYERS})
    assert held.offered_bytes() == 1_000_000
    assert held.compute(0, *rows(1)) is None
