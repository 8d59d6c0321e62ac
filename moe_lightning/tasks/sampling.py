"""Choosing the next token: greedy, or sampled with a seed per row.

A row's random numbers depend on its seed and on how many tokens it has, not on the rows beside it:
the answer is the same in every batch, on every rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one row's tokens are chosen.

    Attributes:
        temperature: Divides the logits; 0 is greedy.
        top_k: Keep this many of the most likely tokens; 0 keeps all.
        top_p: Keep the most likely tokens that together have at least this probability; 1 keeps
            all.
        seed: Seed of the row's random numbers.
        repetition_penalty: Makes tokens that the row has already less likely (Keskar et al. 2019);
            1 changes nothing.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    repetition_penalty: float = 1.0


def row_seed(run_seed: int, row_id: str | int) -> int:
    """A row's seed when it gives none: a hash of the run's seed and the row's id."""
    return int.from_bytes(sha256(f"{run_seed}\0{row_id!r}".encode()).digest()[:8], "little")


def uniform(seed: int, step: int) -> float:
    """The ``step``-th random number of a seed, in [0, 1); counter-based, so stateless."""
    bits = np.random.Philox(key=seed % 2**64, counter=step).random_raw()
    return float(bits >> 11) * 2.0**-53


def choose_tokens(
    logits_NV: Tensor, sampling: Sequence[Sampling], steps: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The next token of every row.

    Args:
        logits_NV: Logits of the last position, any float dtype.
        sampling: How each row's token is chosen.
        steps: How many tokens each row has chosen so far.

    Returns:
        Token ids ``[N]``, and whether each row's best logit is finite ``[N]`` (false: the row is
        lost).
    """
    logits_NV = logits_NV.float()
    best_N, tokens_N = logits_NV.max(dim=1)
    sampled = [row for row, how in enumerate(sampling) if how.temperature > 0]
    if sampled:
        rows = torch.tensor(sampled, device=logits_NV.device)
        chosen = _sample(
            logits_NV[rows], [sampling[r] for r in sampled], [steps[r] for r in sampled]
        )
        tokens_N = tokens_N.index_copy(0, rows, chosen)
    return tokens_N, best_N.isfinite()


def penalise_repetition(
    logits_NV: Tensor, sampling: Sequence[Sampling], tokens: Sequence[Sequence[int]]
) -> Tensor:
    """Apply each row's repetition penalty, as transformers does, to all tokens of the row.

    Args:
        logits_NV: Logits of the last position, any float dtype.
        sampling: How each row's token is chosen.
        tokens: The tokens of each row, its prompt included.

    Returns:
        The changed logits, fp32.
    """
    width = max(map(len, tokens))
    # A row's last token fills it up: the penalty of a token does not depend on how often it stands.
    index_NS = torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in tokens])
    index_NS = index_NS.to(logits_NV.device)
    penalty_N1 = torch.tensor([[how.repetition_penalty] for how in sampling]).to(logits_NV.device)
    logits_NV = logits_NV.float()
    seen_NS = logits_NV.gather(1, index_NS)
    seen_NS = torch.where(seen_NS < 0, seen_NS * penalty_N1, seen_NS / penalty_N1)
    return logits_NV.scatter(1, index_NS, seen_NS)


def _sample(logits_NV: Tensor, sampling: Sequence[Sampling], steps: Sequence[int]) -> Tensor:
    """Inverse-CDF sampling after top-k and top-p (nucleus, Holtzman et al. 2020)."""
    device, vocabulary = logits_NV.device, logits_NV.shape[1]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)[:, None]

    sorted_NV, order_NV = (
        logits_NV.double().nan_to_num(nan=0.0).sort(dim=1, descending=True, stable=True)
    )
    probabilities_NV = (sorted_NV / column([how.temperature for how in sampling])).softmax(dim=1)
    rank_V = torch.arange(vocabulary, device=device)
    top_k_N1 = column([how.top_k or vocabulary for how in sampling])
    probabilities_NV = probabilities_NV.masked_fill(rank_V >= top_k_N1, 0.0)
    probabilities_NV = probabilities_NV / probabilities_NV.sum(1, keepdim=True)
    # A token stays while those before it have less than top_p together, so the first always stays.
    before_NV = probabilities_NV.cumsum(1) - probabilities_NV
    is_cut_NV = (before_NV >= column([how.top_p for how in sampling])) & (rank_V > 0)
    cumulative_NV = probabilities_NV.masked_fill(is_cut_NV, 0.0).cumsum(1)
    draws_N1 = column([uniform(how.seed, step) for how, step in zip(sampling, steps, strict=True)])
    place_N1 = torch.searchsorted(cumulative_NV, draws_N1 * cumulative_NV[:, -1:], right=True)
    return order_NV.gather(1, place_N1.clamp_(max=vocabulary - 1)).squeeze(1)
