"""Score: the log-probability of a row's tokens."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from moe_lightning.data.records import Row, RowError
from moe_lightning.modeling.runner import ModelRunner, PaddedBatch
from moe_lightning.tasks.forward_task import ForwardTask
from moe_lightning.tasks.task import not_finite

CHUNK_TOKENS = 256  # logits of this many tokens at a time stay in a CPU's cache and small on a GPU


class Score(ForwardTask):
    """Sum of the natural log-probabilities of every token of a row after its first."""

    @override
    def answer(
        self, runner: ModelRunner, rows: Sequence[Row], batch: PaddedBatch
    ) -> list[dict[str, Any] | RowError]:
        lengths = [len(row.token_ids) for row in rows]
        logprobs = _sum_by_row(_token_logprobs(runner, batch, lengths), lengths)
        return [
            _answer(row, logprob, length)
            for row, logprob, length in zip(rows, logprobs, lengths, strict=True)
        ]


def _answer(row: Row, logprob: float, num_tokens: int) -> dict[str, Any] | RowError:
    if not math.isfinite(logprob):
        return not_finite(row, "log-probabilities")
    mean = logprob / (num_tokens - 1) if num_tokens > 1 else 0.0
    # A perplexity beyond floating point is reported as the largest number, not as an error.
    perplexity = math.exp(min(-mean, 709.0))
    return {"id": row.id, "logprob": logprob, "num_tokens": num_tokens, "perplexity": perplexity}


def _token_logprobs(runner: ModelRunner, batch: PaddedBatch, lengths: Sequence[int]) -> Tensor:
    """fp32 log-probability of all tokens but each row's first, ``[sum(length - 1)]``."""
    width = batch.input_ids_BS.shape[1]
    # Flat positions of the tokens that predict another one.
    source_N = torch.cat([torch.arange(n - 1) + row * width for row, n in enumerate(lengths)]).to(
        runner.device
    )
    target_N = batch.input_ids_BS.reshape(-1)[source_N + 1]
    if runner.has_plain_head():
        hidden_ND = runner.last_hidden_state(batch).flatten(0, 1)[source_N]
        chunks = _chunks(hidden_ND, target_N)
        return torch.cat([_logprob(runner.head(hidden), target) for hidden, target in chunks])
    logits_NV = runner.logits(batch).flatten(0, 1)
    return torch.cat([_logprob(logits_NV[s], target) for s, target in _chunks(source_N, target_N)])


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(torch.split(tensor, CHUNK_TOKENS) for tensor in tensors), strict=True)


def _logprob(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    logits_NV = logits_NV.float()
    return logits_NV.gather(1, target_N[:, None]).squeeze(1) - logits_NV.logsumexp(1)


def _sum_by_row(logprobs_N: Tensor, lengths: Sequence[int]) -> list[float]:
    pieces = torch.split(logprobs_N.double().cpu(), [n - 1 for n in lengths])
    return [float(piece.sum()) for piece in pieces]
