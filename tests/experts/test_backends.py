"""Both backends compute what the family's own code computes, forward and backward."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.integrations.moe import use_experts_implementation

from moe_lightning.errors import UsageError
from moe_lightning.experts import ExpertShard, choose_backend
from moe_lightning.experts.backends import grouped, reference
from moe_lightning.experts.permute import sort_by_expert, weighted_combine
from moe_lightning.modeling.seam import find_moe_layers

E, D, F = 6, 16, 24
CONFIG = SimpleNamespace(_experts_implementation="eager")
CPU = torch.device("cpu")
# fp32 sums in another order; values and gradients are of order 1 to 10.
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def make_experts(
    *, gate: bool, bias: bool, transposed: bool, norm: bool = False, width: int = F
) -> nn.Module:
    """Experts of a made-up family, whose own forward is the obvious loop."""

    class MadeUpExperts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts = E
            self.act_fn = torch.nn.functional.silu if gate else torch.nn.functional.relu
            generator = torch.Generator().manual_seed(0)

            def parameter(*shape):
                return nn.Parameter(torch.randn(shape, generator=generator) * shape[-1] ** -0.5)

            self.up_name = "gate_up_proj" if gate else "up_proj"
            up = (2 * width if gate else width, D)
            for name, (rows, columns) in {self.up_name: up, "down_proj": (D, width)}.items():
                shape = (E, columns, rows) if transposed else (E, rows, columns)
                setattr(self, name, parameter(*shape))
                if bias:
                    setattr(self, f"{name}_bias", parameter(E, rows))
            if norm:
                self.post_expert_norm = nn.RMSNorm(D)

        def forward(self, hidden_TD, index_TK, weights_TK):
            out = [torch.zeros(D, dtype=hidden_TD.dtype) for _ in hidden_TD]
            for t, experts in enumerate(index_TK.tolist()):
                for k, e in enumerate(experts):
                    row = self.linear(self.up_name, e, hidden_TD[t])
                    row = self.act_fn(row[:width]) * row[width:] if gate else self.act_fn(row)
                    row = self.linear("down_proj", e, row)
                    if norm:
                        row = self.post_expert_norm(row)
                    out[t] = out[t] + weights_TK[t, k] * row
            return torch.stack(out) if out else hidden_TD

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
    return decorated(CONFIG)


def rows_of(num_tokens, top_k=2, *, num_experts=E, width=D, seed=0):
    """Rows, and distinct experts for each; expert 0 never has any."""
    generator = torch.Generator().manual_seed(seed)
    hidden_TD = torch.randn(num_tokens, width, generator=generator)
    scores_TE = torch.rand(num_tokens, num_experts - 1, generator=generator)
    weights_TK, index_TK = scores_TE.topk(top_k, dim=1)
    return hidden_TD, index_TK + 1, weights_TK


def forward_and_gradients(backend, experts, hidden_TD, index_TK, weights_TK):
    inputs = [hidden_TD.clone().requires_grad_(), weights_TK.clone().requires_grad_()]
    out_TD = backend(experts, inputs[0], index_TK, inputs[1])
    upstream_TD = torch.randn(out_TD.shape, generator=torch.Generator().manual_seed(7))
    sources = inputs + list(experts.parameters())
    return [out_TD, *torch.autograd.grad(out_TD, sources, upstream_TD)]


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gate", [False, True])
def test_every_layout_equals_the_obvious_loop(gate, bias, transposed, norm):
    experts = make_experts(gate=gate, bias=bias, transposed=transposed, norm=norm)
    own_forward = type(experts).forward  # "eager": the decorator calls the loop above
    rows = rows_of(11)
    want = forward_and_gradients(own_forward, experts, *rows)
    assert_same(forward_and_gradients(reference, experts, *rows), want)
    assert_same(forward_and_gradients(grouped, experts, *rows), want)


def test_every_family_equals_its_own_eager_code(
    family, backend, family_checkpoint, plain_transformers
):
    layer = find_moe_layers(plain_transformers(family_checkpoint(family)).model)[-1]
    rows = rows_of(23, num_experts=8, width=32)
    want = forward_and_gradients(type(layer.experts).forward, layer.experts, *rows)
    compute = choose_backend(backend, device=CPU)
    assert_same(forward_and_gradients(compute, layer.experts, *rows), want)


def test_gradients_of_experts_without_rows_are_zero(backend):
    experts = make_experts(gate=True, bias=True, transposed=False)
    _, _, _, *gradients = forward_and_gradients(
        choose_backend(backend, device=CPU), experts, *rows_of(5)
    )
    assert len(gradients) == 4
    for gradient in gradients:
        assert not gradient[0].any()
        assert gradient[1:].any()


@pytest.mark.parametrize("top_k", [1, E - 1])
def test_one_and_nearly_all_experts_a_row(top_k):
    experts = make_experts(gate=True, bias=False, transposed=False)
    rows = rows_of(7, top_k)
    assert_same(
        forward_and_gradients(grouped, experts, *rows),
        forward_and_gradients(reference, experts, *rows),
    )


def test_all_rows_to_one_expert():
    experts = make_experts(gate=True, bias=True, transposed=True)
    hidden_TD, index_TK, weights_TK = rows_of(9, 1)
    rows = hidden_TD, torch.full_like(index_TK, E - 1), weights_TK
    assert_same(
        forward_and_gradients(grouped, experts, *rows),
        forward_and_gradients(reference, experts, *rows),
    )


def test_an_expanded_upstream_gradient_is_fine():
    """``out.sum()`` sends back one number, expanded to all rows."""
    experts = make_experts(gate=True, bias=False, transposed=False)
    gradients = []
    for compute in (reference, grouped):
        hidden_TD, index_TK, weights_TK = rows_of(6)
        hidden_TD.requires_grad_()
        compute(experts, hidden_TD, index_TK, weights_TK).sum().backward()
        gradients.append(hidden_TD.grad)
    torch.testing.assert_close(gradients[1], gradients[0], **TOLERANCE)


def test_no_rows(family, backend, family_checkpoint, loaded_runner):
    experts = find_moe_layers(loaded_runner(family_checkpoint(family)).model)[-1].experts
    compute = choose_backend(backend, device=CPU)
    with torch.inference_mode():
        out_TD = compute(experts, *rows_of(0, num_experts=8, width=32))
    assert out_TD.shape == (0, 32)
    assert out_TD.dtype == torch.float32


def test_half_precision_keeps_its_dtype_and_stays_close(backend):
    experts = make_experts(gate=True, bias=False, transposed=False).to(torch.bfloat16)
    hidden_TD, index_TK, weights_TK = rows_of(9)
    compute = choose_backend(backend, device=CPU)
    with torch.inference_mode():
        got_TD = compute(experts, hidden_TD.bfloat16(), index_TK, weights_TK.bfloat16())
        want_TD = reference(
            experts.float(), hidden_TD.bfloat16().float(), index_TK, weights_TK.bfloat16().float()
        )
    assert got_TD.dtype == torch.bfloat16
    # Four roundings to 8 bits of mantissa on values of order 1.
    torch.testing.assert_close(got_TD.float(), want_TD, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 10), (torch.bfloat16, 12)])
def test_widths_that_grouped_mm_refuses(dtype, width):
    """torch's grouped_mm wants rows of a multiple of 16 bytes; checkpoints need not."""
    experts = make_experts(gate=True, bias=False, transposed=False, width=width).to(dtype)
    hidden_TD, index_TK, weights_TK = rows_of(9)
    rows = hidden_TD.to(dtype), index_TK, weights_TK.to(dtype)
    with torch.inference_mode():
        torch.testing.assert_close(
            grouped(experts, *rows), reference(experts, *rows), atol=3e-2, rtol=3e-2
        )


def test_grouped_answer_does_not_depend_on_the_order_of_rows():
    experts = make_experts(gate=True, bias=True, transposed=False)
    hidden_TD, index_TK, weights_TK = rows_of(12)
    flip = torch.arange(11, -1, -1)
    with torch.inference_mode():
        there = grouped(experts, hidden_TD, index_TK, weights_TK)
        back = grouped(experts, hidden_TD[flip], index_TK[flip], weights_TK[flip])
    torch.testing.assert_close(back[flip], there, **TOLERANCE)


def test_sort_by_expert_by_hand():
    order_N, expert_N, ends_E = sort_by_expert(torch.tensor([[2, 0], [0, 3], [2, 3]]), 5)
    assert order_N.tolist() == [1, 2, 0, 4, 3, 5]
    assert expert_N.tolist() == [0, 0, 2, 2, 3, 3]
    assert ends_E.tolist() == [2, 2, 4, 6, 6]
    assert ends_E.dtype == torch.int32


def test_weighted_combine_by_hand():
    # Sorted rows 0..3 belong to (token, k) pairs 1, 2, 0, 3.
    rows_ND = torch.tensor([[10.0], [20.0], [30.0], [40.0]])
    weights_TK = torch.tensor([[1.0, 2.0], [3.0, 0.5]])
    out_TD = weighted_combine(rows_ND, weights_TK, torch.tensor([1, 2, 0, 3]))
    assert out_TD.tolist() == [[30.0 + 2 * 10.0], [3 * 20.0 + 0.5 * 40.0]]


def test_shard_computes_with_its_backend_and_counts_bytes():
    experts = make_experts(gate=False, bias=True, transposed=False)
    shard = ExpertShard(experts, layer=3, expert_ids=range(E), backend=grouped)
    rows = rows_of(4)
    torch.testing.assert_close(shard.compute(*rows), reference(experts, *rows), **TOLERANCE)
    assert shard.num_bytes == 4 * E * (F * D + F + D * F + D)
    assert shard.device == CPU
    assert shard.expert_ids == (0, 1, 2, 3, 4, 5)


def test_unknown_backend_lists_the_known_ones():
    with pytest.raises(UsageError, match=r"experts_backend='triton'.*reference.*grouped_mm"):
        choose_backend("triton", device=CPU)


def test_auto_is_grouped_on_a_cpu():
    assert choose_backend("auto", device=CPU) is grouped
