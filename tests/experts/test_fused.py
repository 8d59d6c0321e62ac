"""The Triton backend computes what the family's own code computes.

Without a GPU the kernels run in Triton's interpreter (tests/conftest.py sets TRITON_INTERPRET=1
before anything imports triton). With one, TRITON_INTERPRET=0 runs the same tests on it.
"""

import os
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.integrations.moe import use_experts_implementation

from moe_lightning.errors import UsageError
from moe_lightning.experts.backends import grouped
from moe_lightning.experts.fused import FusedExperts, can_fuse, known_gate
from moe_lightning.experts.tiles import choose_tiles
from moe_lightning.modeling.seam import find_moe_layers

E, D, F = 6, 16, 24
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if IS_INTERPRETED else "cuda")
CONFIG = SimpleNamespace(_experts_implementation="eager")
# fp32 sums in another order; values are of order 1 to 10.
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def make_experts(
    *, gate=True, bias=False, transposed=False, norm=False, hidden=D, width=F, act_fn=None
):
    """Experts of a made-up family, whose own forward is the obvious loop."""

    class MadeUpExperts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts = E
            self.act_fn = act_fn or (nn.functional.silu if gate else nn.functional.relu)
            self.up_name = "gate_up_proj" if gate else "up_proj"
            generator = torch.Generator().manual_seed(0)
            shapes = {self.up_name: (2 * width if gate else width, hidden)}
            shapes["down_proj"] = (hidden, width)
            for name, (rows, columns) in shapes.items():
                weight = torch.randn(E, rows, columns, generator=generator) * columns**-0.5
                weight = weight.transpose(1, 2).contiguous() if transposed else weight
                setattr(self, name, nn.Parameter(weight))
                if bias:
                    bias_EY = torch.randn(E, rows, generator=generator)
                    setattr(self, f"{name}_bias", nn.Parameter(bias_EY))
            if norm:
                self.post_expert_norm = nn.RMSNorm(hidden)

        def forward(self, hidden_TD, index_TK, weights_TK):
            out_TD = torch.zeros_like(hidden_TD)
            for t, choices in enumerate(index_TK.tolist()):
                for k, e in enumerate(choices):
                    if e < self.num_experts:
                        row = self._apply_gate if gate else self.act_fn
                        row = self.linear("down_proj", e, row(self.up(e, hidden_TD[t])))
                        row = self.post_expert_norm(row) if norm else row
                        out_TD[t] += weights_TK[t, k] * row
            return out_TD

        def up(self, expert, row):
            return self.linear(self.up_name, expert, row)

        def linear(self, name, expert, row):
            weight = getattr(self, name)[expert]
            out = row @ weight if transposed else weight @ row
            return out + getattr(self, f"{name}_bias")[expert] if bias else out

    decorated = use_experts_implementation(
        MadeUpExperts,
        has_gate=gate,
        has_bias=bias,
        is_transposed=transposed,
        has_post_expert_norm=norm,
    )
    return decorated(CONFIG).to(DEVICE)


def rows_of(num_rows, top_k=2, *, num_experts=E, hidden=D):
    """Rows, and distinct experts for each; expert 0 never has any."""
    generator = torch.Generator().manual_seed(num_rows)
    rows_RD = torch.randn(num_rows, hidden, generator=generator)
    scores_RE = torch.rand(num_rows, num_experts - 1, generator=generator)
    weights_RK, index_RK = scores_RE.topk(top_k, dim=1)
    return rows_RD.to(DEVICE), (index_RK + 1).to(DEVICE), weights_RK.to(DEVICE)


def fused(experts, rows_RD, index_RK, weights_RK):
    compute = FusedExperts(experts)
    with torch.inference_mode():
        if DEVICE.type == "cpu" or torch.are_deterministic_algorithms_enabled():
            return compute(rows_RD, index_RK, weights_RK)
        compute(rows_RD, index_RK, weights_RK)  # compiles, which may wait; nothing else may
        torch.cuda.set_sync_debug_mode("error")
        try:
            return compute(rows_RD, index_RK, weights_RK)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def own(experts, rows_RD, index_RK, weights_RK):
    with torch.inference_mode():
        return type(experts).forward(experts, rows_RD, index_RK, weights_RK)  # "eager": its loop


def assert_equals_own(experts, *rows, **tolerance):
    got_RD = fused(experts, *rows)
    torch.testing.assert_close(got_RD, own(experts, *rows), **(tolerance or TOLERANCE))


@pytest.fixture
def uninitialised_is_nan():
    """What nobody has written is NaN, wherever the allocator got it from."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.ones(1).new_empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gate", [False, True])
def test_every_layout_equals_the_obvious_loop(gate, bias, transposed, norm):
    experts = make_experts(gate=gate, bias=bias, transposed=transposed, norm=norm)
    assert (known_gate(experts) is not None) == (gate and not transposed)
    assert_equals_own(experts, *rows_of(7))


def test_every_family_equals_its_own_eager_code(family, family_checkpoint, plain_transformers):
    layer = find_moe_layers(plain_transformers(family_checkpoint(family)).model)[-1]
    experts = layer.experts.to(DEVICE)
    assert known_gate(experts) is not None
    assert_equals_own(experts, *rows_of(9, num_experts=8, hidden=32))


def test_clamped_gates_are_clamped(family_checkpoint, plain_transformers):
    layer = find_moe_layers(plain_transformers(family_checkpoint("gpt_oss")).model)[-1]
    experts = layer.experts.to(DEVICE)
    rows_RD, index_RK, weights_RK = rows_of(3, num_experts=8, hidden=32)
    rows = 1e4 * rows_RD, index_RK, weights_RK
    # gate <= 7 and |up| <= 7: nothing that leaves the gate is above (7 + 1) * 7.
    bound = weights_RK.sum(1).max() * 56 * experts.down_proj.abs().sum(1).max()
    assert bound / 100 < fused(experts, *rows).abs().max() < bound
    # Values of order 10, of sums of order 1e4 that the limits cut off.
    assert_equals_own(experts, *rows, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("norm", [False, True])
def test_pairs_elsewhere_add_nothing(norm, uninitialised_is_nan):
    experts = make_experts(bias=True, norm=norm)
    rows_RD, index_RK, weights_RK = rows_of(8)
    index_RK[0] = E
    index_RK[3:6, 1] = E
    weights_RK[index_RK == E] = torch.nan
    got_RD = fused(experts, rows_RD, index_RK, weights_RK)
    assert not got_RD[0].any()
    torch.testing.assert_close(got_RD, own(experts, rows_RD, index_RK, weights_RK), **TOLERANCE)


def test_all_pairs_elsewhere(uninitialised_is_nan):
    rows_RD, index_RK, weights_RK = rows_of(3)
    assert not fused(make_experts(), rows_RD, torch.full_like(index_RK, E), weights_RK).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_rows(dtype):
    rows_RD, index_RK, weights_RK = rows_of(0)
    out_RD = fused(make_experts(), rows_RD.to(dtype), index_RK, weights_RK)
    assert out_RD.shape == (0, D)
    assert out_RD.dtype == dtype


@pytest.mark.parametrize(("num_rows", "top_k"), [(1, 1), (1, E - 1), (4, 1)])
def test_one_row_and_one_expert_a_row(num_rows, top_k):
    assert_equals_own(make_experts(bias=True), *rows_of(num_rows, top_k))


@pytest.mark.parametrize("expert", [0, E - 1])
def test_all_rows_to_one_expert(expert):
    """More rows than a block holds, of an expert that is the first or the last."""
    rows_RD, index_RK, weights_RK = rows_of(40, 1)
    assert choose_tiles(40, num_experts=E, in_width=D, out_width=2 * F, dtype=torch.float32)[0] < 40
    assert_equals_own(make_experts(), rows_RD, torch.full_like(index_RK, expert), weights_RK)


@pytest.mark.parametrize(("hidden", "width"), [(20, 37), (33, 5)])
@pytest.mark.parametrize("transposed", [False, True])
def test_widths_that_no_block_divides(hidden, width, transposed):
    experts = make_experts(transposed=transposed, bias=True, hidden=hidden, width=width)
    assert_equals_own(experts, *rows_of(5, hidden=hidden))


@pytest.mark.parametrize("gate", [False, True])
def test_widths_of_several_blocks(gate):
    assert_equals_own(make_experts(gate=gate, hidden=150, width=70), *rows_of(3, hidden=150))


def test_groups_of_blocks():
    """Enough rows for tiles with GROUP_M > 1: at least 9 blocks of pairs, 3 of columns."""
    tiles = choose_tiles(520, num_experts=E, in_width=D, out_width=80, dtype=torch.float32)
    assert (tiles.BLOCK_M, tiles.BLOCK_Y, tiles.GROUP_M) == (64, 32, 8)
    assert_equals_own(make_experts(width=40), *rows_of(260))


@pytest.fixture
def bfloat16_products(monkeypatch):
    """The interpreter multiplies the bits of bfloat16 (triton #11584): give it float32 instead."""
    if not IS_INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    def create_dot(self, a, b, *rest):
        if a.dtype == b.dtype == tl.bfloat16:
            a, b = self.cast_impl(a, tl.float32), self.cast_impl(b, tl.float32)
        return original(self, a, b, *rest)

    original = InterpreterBuilder.create_dot
    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype_and_stays_close(dtype, bfloat16_products):
    experts = make_experts(bias=True)
    compute = FusedExperts(experts)  # before it is bfloat16, which the interpreter may not have
    experts.to(dtype)
    rows_RD, index_RK, weights_RK = rows_of(9)
    with torch.inference_mode():
        got_RD = compute(rows_RD.to(dtype), index_RK, weights_RK)
    want_RD = own(experts.float(), rows_RD.to(dtype).float(), index_RK, weights_RK)
    assert got_RD.dtype == dtype
    # Sums in float32; three roundings to 8 bits of mantissa on values of order 1.
    torch.testing.assert_close(got_RD.float(), want_RD, atol=2e-2, rtol=2e-2)


def test_rows_and_weights_may_have_other_dtypes():
    experts = make_experts()
    rows_RD, index_RK, weights_RK = rows_of(5)
    got_RD = fused(experts, rows_RD.half(), index_RK, weights_RK.double())
    want_RD = own(experts, rows_RD.half().float(), index_RK, weights_RK)
    assert got_RD.dtype == torch.float16
    torch.testing.assert_close(got_RD.float(), want_RD, atol=1e-3, rtol=1e-3)  # rounding to half


def test_any_strides():
    experts = make_experts(bias=True)
    rows = rows_of(6)
    want_RD = own(experts, *rows)
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(experts, name)
        wider = torch.full((E, weight.shape[1] + 3, weight.shape[2] * 2), torch.nan, device=DEVICE)
        view = wider[:, 1:-2, ::2]
        view.copy_(weight.detach())
        weight.data = view
    strided = [torch.stack([tensor, tensor], dim=-1)[..., 0] for tensor in rows]
    assert not any(tensor.is_contiguous() for tensor in strided)
    torch.testing.assert_close(fused(experts, *strided), want_RD, **TOLERANCE)
    by_column_RD = rows[0].T.contiguous().T
    torch.testing.assert_close(fused(experts, by_column_RD, *rows[1:]), want_RD, **TOLERANCE)


def test_a_gate_that_the_kernel_does_not_know_is_the_familys_own():
    experts = make_experts(act_fn=torch.tanh)
    assert known_gate(experts) is None
    assert_equals_own(experts, *rows_of(5))
    other = make_experts()
    type(other)._apply_gate = lambda self, both: both[..., :F] - both[..., F:]
    assert known_gate(other) is None
    assert_equals_own(other, *rows_of(5))


def test_gradients_come_from_grouped_mm():
    experts = make_experts(bias=True)
    rows_RD, index_RK, weights_RK = rows_of(4)
    gradients = []
    for compute in (FusedExperts(experts), lambda *rows: grouped(experts, *rows)):
        row_leaf_RD = rows_RD.clone().requires_grad_()
        out_RD = compute(row_leaf_RD, index_RK, weights_RK)
        leaves = [row_leaf_RD, *experts.parameters()]
        gradients.append(torch.autograd.grad(out_RD.square().sum(), leaves))
    for got, want in zip(*gradients, strict=True):
        assert want.any()
        torch.testing.assert_close(got, want)


def test_why_experts_cannot_be_fused(monkeypatch):
    experts = make_experts()
    assert can_fuse(experts) is None
    assert "torch.float64 weights" in can_fuse(make_experts().double())
    assert "experts are on meta" in can_fuse(make_experts().to("meta"))
    if IS_INTERPRETED:
        assert "interpreter" in can_fuse(make_experts().bfloat16())

    class Quantised(torch.Tensor):
        pass

    odd = make_experts()
    odd.down_proj = nn.Parameter(odd.down_proj.detach().as_subclass(Quantised))
    assert "Quantised" in can_fuse(odd)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "experts are on cpu" in can_fuse(experts.cpu())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=r"pip install .moe-lightning.triton.*experts_backend=grouped_mm"
    ):
        FusedExperts(experts)
