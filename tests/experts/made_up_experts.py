"""Experts of made-up families, in every layout that the contract knows, and rows for them."""

import copy
from types import SimpleNamespace

import torch
from torch import nn
from transformers.integrations.moe import use_experts_implementation

from moe_lightning.experts import make_backend

E, D, F = 6, 16, 24
CONFIG = SimpleNamespace(_experts_implementation="eager")
# fp32 sums in another order; values and gradients are of order 1 to 10.
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}

TRAINING = ("reference", "grouped_mm")
EXACT = (*TRAINING, "cpu_packed")
# Relative errors, at least and at most: at least, as it must be that backend that has computed.
# float16 rounds a weight to 11 bits, at most 2^-12 of its size off on average: 2e-4 a projection.
# int8 rounds weights and rows to steps of 1/127 of the largest of a channel or row: on Gaussian
# numbers 1e-2 for the short sums here, up to 3e-2 for wide ones.
ERRORS = {"cpu_half": (1e-5, 1e-3), "cpu_int8": (1e-3, 4e-2)}
ALL = (*EXACT, *ERRORS)


def make_experts(
    *,
    gate: bool = True,
    bias: bool = False,
    transposed: bool = False,
    norm: bool = False,
    hidden: int = D,
    width: int = F,
    num_experts: int = E,
) -> nn.Module:
    """Experts of a made-up family, whose own forward is the obvious loop."""

    class MadeUpExperts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts = num_experts
            self.act_fn = torch.nn.functional.silu if gate else torch.nn.functional.relu
            generator = torch.Generator().manual_seed(0)

            def parameter(*shape):
                return nn.Parameter(torch.randn(shape, generator=generator) * shape[-1] ** -0.5)

            self.up_name = "gate_up_proj" if gate else "up_proj"
            up = (2 * width if gate else width, hidden)
            for name, (rows, columns) in {self.up_name: up, "down_proj": (hidden, width)}.items():
                shape = (columns, rows) if transposed else (rows, columns)
                setattr(self, name, parameter(num_experts, *shape))
                if bias:
                    setattr(self, f"{name}_bias", parameter(num_experts, rows))
            if norm:
                self.post_expert_norm = nn.RMSNorm(hidden)

        def forward(self, hidden_TD, index_TK, weights_TK):
            out = [torch.zeros_like(row) for row in hidden_TD]
            for t, experts in enumerate(index_TK.tolist()):
                for k, e in enumerate(experts):
                    if e == num_experts:
                        continue
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


def rows_of(num_rows, top_k=2, *, num_experts=E, hidden=D, seed=0):
    """Rows, and distinct experts for each; expert 0 never has any."""
    generator = torch.Generator().manual_seed(seed)
    rows_RD = torch.randn(num_rows, hidden, generator=generator)
    scores_RE = torch.rand(num_rows, num_experts - 1, generator=generator)
    weights_RK, index_RK = scores_RE.topk(top_k, dim=1)
    return rows_RD, index_RK + 1, weights_RK


def own(experts, rows_RD, index_RK, weights_RK):
    """What the family's own code computes."""
    with torch.no_grad():
        return type(experts).forward(experts, rows_RD, index_RK, weights_RK)  # "eager"


def relative_error(got, want):
    """Of the whole tensor, by the Frobenius norm."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def computed(name, experts, *rows):
    """What a backend computes in inference; the experts stay as they are."""
    compute = make_backend(name, copy.deepcopy(experts))
    with torch.inference_mode():
        return compute(*rows)


def assert_close(name, got, want):
    """As close as the backend promises."""
    assert got.dtype == want.dtype
    if name in EXACT:
        torch.testing.assert_close(got, want, **TOLERANCE)
    else:
        least, most = ERRORS[name]
        assert least < relative_error(got, want) < most
