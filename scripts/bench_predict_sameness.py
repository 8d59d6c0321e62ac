"""How alike the answers of plain transformers and of another contestant are."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_predict_contestants import PLAIN_BATCH_ROWS, PlainLoop
from bench_predict_workload import Workload
from torch import Tensor

from moe_lightning.modeling.runner import ModelRunner, PaddedBatch

TIE = 1e-3  # greedy answers may part where the two best logits are as close as this


@dataclass(frozen=True)
class ScoreSameness:
    """Two files of scores.

    Attributes:
        max_logprob_difference: Largest difference of a row's log-probability.
        plain_perplexity: exp of the mean negative log-probability of all tokens, by transformers.
        perplexity: The same, by the other side.
        max_token_difference: Largest difference of a token's log-probability; None: not looked at,
            since the backend is exact.
        mean_token_difference: The mean of these differences.
    """

    max_logprob_difference: float
    plain_perplexity: float
    perplexity: float
    max_token_difference: float | None = None
    mean_token_difference: float | None = None


@dataclass(frozen=True)
class GenerateSameness:
    """Two files of greedy answers.

    Attributes:
        same_tokens_share: Share of the positions that have the same token.
        same_rows_share: Share of the rows that are the same.
        num_ties: Rows that part where transformers' two best logits are equal but for rounding;
            None: not looked at, since the backend rounds weights.
        num_unexplained: Rows that part elsewhere.
    """

    same_tokens_share: float
    same_rows_share: float
    num_ties: int | None = None
    num_unexplained: int | None = None


def compare_scores(
    workload: Workload, plain_out: Path, out: Path, token_differences_N: Tensor | None
) -> ScoreSameness:
    """Compare two files of scores.

    Args:
        workload: The rows.
        plain_out: The answers of transformers.
        out: The answers of the other side.
        token_differences_N: For backends that round, |difference| of every token.

    Returns:
        How alike they are.
    """
    theirs, ours = _read_both(plain_out, out, "logprob")
    num_targets = sum(n - 1 for n in workload.num_prompt_tokens)
    largest = mean = None
    if token_differences_N is not None:
        largest, mean = float(token_differences_N.max()), float(token_differences_N.mean())
    return ScoreSameness(
        max_logprob_difference=max(abs(a - ours[row]) for row, a in theirs.items()),
        plain_perplexity=math.exp(-sum(theirs.values()) / num_targets),
        perplexity=math.exp(-sum(ours.values()) / num_targets),
        max_token_difference=largest,
        mean_token_difference=mean,
    )


def compare_texts(
    plain: PlainLoop, workload: Workload, plain_out: Path, out: Path, *, is_exact: bool
) -> GenerateSameness:
    """Compare two files of greedy answers.

    Args:
        plain: The model, to look at the logits where answers part.
        workload: The rows.
        plain_out: The answers of transformers.
        out: The answers of the other side.
        is_exact: Whether answers may part at a tie only.

    Returns:
        How alike they are.
    """
    theirs, ours = _read_both(plain_out, out, "token_ids")
    num_same_tokens = num_same_rows = num_ties = num_unexplained = 0
    for row, ids in theirs.items():
        wanted = workload.max_new_tokens[row]
        assert len(ids) == len(ours[row]) == wanted, (
            f"row {row}: {len(ids)} and {len(ours[row])} new tokens instead of {wanted}"
        )
        equal = [a == b for a, b in zip(ids, ours[row], strict=True)]
        num_same_tokens += sum(equal)
        num_same_rows += all(equal)
        if is_exact and not all(equal):
            before = [*workload.token_ids[row], *ids[: equal.index(False)]]
            is_tie = _top_two_gap(plain, before) < TIE
            num_ties += is_tie
            num_unexplained += not is_tie
    return GenerateSameness(
        same_tokens_share=num_same_tokens / sum(workload.max_new_tokens),
        same_rows_share=num_same_rows / len(theirs),
        num_ties=num_ties if is_exact else None,
        num_unexplained=num_unexplained if is_exact else None,
    )


def token_logprobs(
    rows: Sequence[Sequence[int]], runner: ModelRunner, logits: Callable[[PaddedBatch], Tensor]
) -> Tensor:
    """Log-probability of every token but each row's first.

    Args:
        rows: Token ids of each row.
        runner: Pads the rows, in the same batches for all models.
        logits: Gives the logits of a batch.

    Returns:
        ``[sum(length - 1)]``, row after row.
    """
    pieces = []
    with torch.inference_mode():
        for start in range(0, len(rows), PLAIN_BATCH_ROWS):
            members = rows[start : start + PLAIN_BATCH_ROWS]
            batch = runner.pad(members, side="right")
            logprobs_BSV = logits(batch)[:, :-1].log_softmax(dim=-1)
            logprobs_BS = logprobs_BSV.gather(-1, batch.input_ids_BS[:, 1:, None]).squeeze(-1)
            pieces += [
                of_row[: len(ids) - 1] for of_row, ids in zip(logprobs_BS, members, strict=True)
            ]
    return torch.cat(pieces)


def _read_both(plain_out: Path, out: Path, key: str) -> tuple[dict[int, Any], dict[int, Any]]:
    theirs, ours = (
        {answer["id"]: answer[key] for answer in map(json.loads, path.read_text().splitlines())}
        for path in (plain_out, out)
    )
    assert theirs.keys() == ours.keys(), "the two sides answered different rows"
    return theirs, ours


def _top_two_gap(plain: PlainLoop, token_ids: Sequence[int]) -> float:
    """Difference of the two best next-token logits."""
    with torch.inference_mode():
        logits_V = plain.model(torch.tensor([list(token_ids)])).logits[0, -1]
    best, second = logits_V.topk(2).values.tolist()
    return float(best - second)
