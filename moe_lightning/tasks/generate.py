"""Generate: continue a row's prompt."""

from collections.abc import Sequence
from typing import Any, ClassVar

from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from moe_lightning.data.records import Row, RowError
from moe_lightning.errors import UsageError
from moe_lightning.modeling.runner import ModelRunner
from moe_lightning.tasks.decoding import Answer, Request, decode
from moe_lightning.tasks.sampling import Sampling, row_seed
from moe_lightning.tasks.task import Progress, Task, not_finite


class Generate(Task):
    """Continue every row's prompt.

    A row's own ``max_new_tokens``, ``temperature``, ``top_p``, ``seed`` and ``stop`` come before
    these options.

    Args:
        max_new_tokens: Most tokens to generate for a row.
        temperature: Divides the logits before sampling. 0 means greedy: the most likely token every
            time.
        top_k: Sample from this many of the most likely tokens only. 0 means all.
        top_p: Sample from the most likely tokens that together have at least this probability. 1
            means all.
        seed: Seed of the sampling. Each row draws from its own seed, made from this one and the
            row's id, so its text does not depend on the batch it is in.
        stop: Strings that end a row's text when they appear in it. The text is cut before the
            string.
        repetition_penalty: Makes tokens that a row has already, in its prompt too, less likely; 1
            changes nothing. The default is what the checkpoint's generation_config.json says.
        ignore_eos: Whether to go on after an end-of-sequence token (for benchmarks).
        rows_factor: How many times the token budget a planned batch holds. Rows that finish are
            replaced from the rest of their batch, so a larger number keeps the device fuller, and
            loses more work when a run is interrupted.
    """

    add_generation_prompt: ClassVar[bool] = True

    def __init__(
        self,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: list[str] | None = None,
        repetition_penalty: float | None = None,
        ignore_eos: bool = False,
        rows_factor: int = 8,
    ) -> None:
        _require(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "at least 1")
        _require(temperature >= 0, "temperature", temperature, "0 (greedy) or more")
        _require(top_k >= 0, "top_k", top_k, "0 (all tokens) or more")
        _require(0 < top_p <= 1, "top_p", top_p, "in (0, 1]")
        penalty = 1.0 if repetition_penalty is None else repetition_penalty
        _require(penalty > 0, "repetition_penalty", penalty, "more than 0 (1 changes nothing)")
        _require(rows_factor >= 1, "rows_factor", rows_factor, "at least 1")
        _require(all(stop or []), "stop", stop, "strings of at least one character")
        self.default_max_new_tokens = max_new_tokens
        self.rows_factor = rows_factor
        self.sampling = Sampling(temperature, top_k, top_p, seed)
        self.repetition_penalty = repetition_penalty
        self.stop = tuple(stop or ())
        self.ignore_eos = ignore_eos

    @override
    def run(
        self, runner: ModelRunner, rows: Sequence[Row], *, budget_tokens: int, progress: Progress
    ) -> list[dict[str, Any] | RowError]:
        _warn_of_ignored_settings(runner)
        requests = [self._request(row, runner) for row in rows]
        answers = decode(
            runner,
            requests,
            budget_tokens=budget_tokens,
            eos_ids=frozenset() if self.ignore_eos else _eos_ids(runner),
            progress=progress,
        )
        return [_to_row(row, answer, runner) for row, answer in zip(rows, answers, strict=True)]

    def _request(self, row: Row, runner: ModelRunner) -> Request:
        own, default = row.options, self.sampling
        wanted = self.default_max_new_tokens if own.max_new_tokens is None else own.max_new_tokens
        positions = getattr(runner.model.config.get_text_config(), "max_position_embeddings", None)
        room = wanted if positions is None else positions - len(row.token_ids)
        sampling = Sampling(
            temperature=default.temperature if own.temperature is None else own.temperature,
            top_k=default.top_k,
            top_p=default.top_p if own.top_p is None else own.top_p,
            seed=row_seed(default.seed, row.id) if own.seed is None else own.seed,
            repetition_penalty=self._repetition_penalty(runner),
        )
        return Request(
            tuple(row.token_ids), max(0, min(wanted, room)), sampling, own.stop or self.stop
        )

    def _repetition_penalty(self, runner: ModelRunner) -> float:
        if self.repetition_penalty is not None:
            return self.repetition_penalty
        return float(runner.model.generation_config.repetition_penalty or 1.0)


def _require(is_met: bool, option: str, value: object, what: str) -> None:
    if not is_met:
        raise UsageError(f"model.task.{option}={value!r}: it must be {what}.")


# Settings of generation_config.json that change transformers' greedy text and are not applied here.
_IGNORED_SETTINGS = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "encoder_repetition_penalty",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "min_length",
    "min_new_tokens",
    "no_repeat_ngram_size",
    "sequence_bias",
    "suppress_tokens",
)


def _warn_of_ignored_settings(runner: ModelRunner) -> None:
    settings = runner.model.generation_config
    ignored = [name for name in _IGNORED_SETTINGS if getattr(settings, name, None)]
    if ignored:
        rank_zero_warn(
            f"generation_config.json sets {', '.join(ignored)}, which Generate does not apply: "
            "texts can differ from those of transformers."
        )


def _eos_ids(runner: ModelRunner) -> frozenset[int]:
    """The ids that end a text: those of transformers' generate (generation_config.json)."""
    eos = runner.model.generation_config.eos_token_id
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)


def _to_row(row: Row, answer: Answer, runner: ModelRunner) -> dict[str, Any] | RowError:
    if answer.finish_reason == "not_finite":
        return not_finite(row, "logits")
    text = runner.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
    if answer.stop_string is not None:
        text = text[: text.find(answer.stop_string)]
    return {
        "id": row.id,
        "text": text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "num_prompt_tokens": len(row.token_ids),
        "num_tokens": len(answer.token_ids),
    }
