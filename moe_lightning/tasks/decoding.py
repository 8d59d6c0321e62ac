"""The decode loop: finished rows leave the batch, waiting rows take their places.

transformers' ``generate`` computes a batch until its last row is done, and concatenates the KV
cache at every step. Here the batch stays full: with answers of mixed lengths most of the steps of
``generate`` are spent on rows that have nothing left to say (scripts/bench_predict.py measures
both). Greedy answers are the same.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from moe_lightning.data.batching import split_by_length
from moe_lightning.modeling.cache import ColumnCache, keep_rows
from moe_lightning.modeling.runner import ModelRunner
from moe_lightning.tasks.sampling import Sampling, choose_tokens, penalise_repetition
from moe_lightning.tasks.task import FORWARD_TOKENS, Progress

PREFILL_SHARE = 8  # rows are taken in once 1/8 of the places is free, to share a forward


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to continue.

    Attributes:
        token_ids: The prompt; not empty.
        max_new_tokens: Most tokens to generate; 0 is legal.
        sampling: How tokens are chosen.
        stop: Strings that end the text.
    """

    token_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()


@dataclass(slots=True)
class Answer:
    """What was generated for a request.

    Attributes:
        token_ids: New tokens, the end-of-sequence token included.
        finish_reason: ``stop`` (end of sequence or a stop string), ``length``, or ``not_finite``
            (NaN logits).
        stop_string: The string that ended the text, if one did.
    """

    token_ids: list[int] = field(default_factory=list)
    finish_reason: Literal["stop", "length", "not_finite"] = "length"
    stop_string: str | None = None


@dataclass(slots=True)
class _Active:
    """A row in a place of the batch."""

    number: int
    request: Request
    answer: Answer

    @property
    def length(self) -> int:
        """Tokens in the cache: all but the newest one."""
        return len(self.request.token_ids) + len(self.answer.token_ids) - 1


def decode(
    runner: ModelRunner,
    requests: Sequence[Request],
    *,
    budget_tokens: int,
    eos_ids: frozenset[int],
    progress: Progress,
) -> list[Answer]:
    """Continue all prompts.

    Args:
        runner: The model.
        requests: The prompts.
        budget_tokens: Tokens (prompt and answer, padding included) that the batch may hold at once.
        eos_ids: Tokens that end a text.
        progress: Called with (rows, prompt tokens, new tokens, padding tokens) as they are done.

    Returns:
        One answer per request, in their order.
    """
    loop = _DecodeLoop(runner, requests, budget_tokens, eos_ids, progress)
    loop.run()
    return loop.answers


class _DecodeLoop:
    def __init__(
        self,
        runner: ModelRunner,
        requests: Sequence[Request],
        budget_tokens: int,
        eos_ids: frozenset[int],
        progress: Progress,
    ) -> None:
        self.runner = runner
        self.eos_ids = eos_ids
        self.progress = progress
        self.answers = [Answer() for _ in requests]
        rows = [
            _Active(n, r, a) for n, (r, a) in enumerate(zip(requests, self.answers, strict=True))
        ]
        # Longest answers first: the batch empties evenly at the end.
        rows.sort(
            key=lambda row: (-row.request.max_new_tokens, -len(row.request.token_ids), row.number)
        )
        self.waiting = deque(row for row in rows if row.request.max_new_tokens > 0)
        self.active: list[_Active] = []
        longest = max((len(r.token_ids) + r.max_new_tokens for r in requests), default=1)
        self.max_rows = max(1, min(len(self.waiting), budget_tokens // longest))
        self.budget_tokens = budget_tokens
        config = runner.model.config.get_text_config(decoder=True)
        # Whatever the model makes for itself, where it keeps more than keys and values.
        self.cache: Any = None
        self.columns: ColumnCache | None = None
        if ColumnCache.supports(config):
            self.cache = self.columns = ColumnCache(
                config, max_rows=self.max_rows, max_tokens=longest
            )

    def run(self) -> None:
        # Prompts that leave no room for a new token are done already.
        self.progress(len(self.answers) - len(self.waiting), 0, 0, 0)
        while self.waiting or self.active:
            if self.waiting and self._may_admit():
                self._admit()
            if self.active:
                self._step()

    def _may_admit(self) -> bool:
        num_free = self.max_rows - len(self.active)
        if self.columns is None:
            return not self.active
        return num_free >= min(len(self.waiting), max(1, self.max_rows // PREFILL_SHARE))

    def _admit(self) -> None:
        """Compute the prompts of as many waiting rows as there are free places."""
        num_free = self.max_rows - len(self.active)
        rows = [self.waiting.popleft() for _ in range(min(num_free, len(self.waiting)))]
        if self.columns is None and not self.runner.takes_left_padding():
            width = len(rows[0].request.token_ids)
            others = [row for row in rows if len(row.request.token_ids) != width]
            self.waiting.extendleft(reversed(others))
            rows = [row for row in rows if len(row.request.token_ids) == width]
        finished: list[int] = []
        for group in self._prefill_groups(rows):
            first = len(self.active)
            tokens, is_finite = self._prefill(group)
            self.active += group
            num_prompt = sum(len(row.request.token_ids) for row in group)
            width = max(len(row.request.token_ids) for row in group)
            self.progress(0, num_prompt, len(group), width * len(group) - num_prompt)
            finished += [first + i for i in self._append(group, tokens, is_finite)]
        self._retire(finished)

    def _prefill_groups(self, rows: list[_Active]) -> Iterator[list[_Active]]:
        """Rows of similar length together, longest first, within the budget."""
        if self.columns is None:
            # Other caches hold one batch at a time, so all its rows are computed together.
            yield rows
            return
        for group in split_by_length(
            [len(row.request.token_ids) for row in rows],
            forward_tokens=FORWARD_TOKENS,
            budget_tokens=self.budget_tokens,
        ):
            yield [rows[position] for position in group]

    def _prefill(self, group: list[_Active]) -> tuple[list[int], list[bool]]:
        batch = self.runner.pad([row.request.token_ids for row in group], side="left")
        if self.columns is not None:
            first = len(self.active)
            places = torch.arange(first, first + len(group), device=self.runner.device)
            longest = max((row.length for row in self.active), default=0)
            self.columns.begin_prefill(places, batch.input_ids_BS.shape[1], longest)
        else:
            self.cache = None
        with self.runner.padding.over(batch.host_mask_BS):
            output = self.runner.forward(
                input_ids=batch.input_ids_BS,
                attention_mask=batch.mask_BS,
                position_ids=batch.position_ids_BS,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self.cache = output.past_key_values
        if self.columns is not None:
            self.columns.end_prefill()
        return self._choose(output.logits[:, -1], group)

    def _step(self) -> None:
        """One new token for every active row."""
        lengths = [row.length for row in self.active]
        longest = max(lengths)
        if self.columns is not None:
            self.columns.begin_step(longest)
        device = self.runner.device
        lengths_N = torch.tensor(lengths, device=device)
        newest_N1 = torch.tensor([[row.answer.token_ids[-1]] for row in self.active], device=device)
        # All rows end in the newest column; a row of n tokens begins n columns before it.
        window = self._window(longest)
        age_S = torch.arange(window, -1, -1, device=device)
        mask_NS = (age_S <= lengths_N[:, None]).to(torch.int64) if min(lengths) < window else None
        logits_N1V = self.runner.forward(
            input_ids=newest_N1,
            attention_mask=mask_NS,
            position_ids=lengths_N[:, None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        if self.columns is not None:
            self.columns.end_step()
        tokens, is_finite = self._choose(logits_N1V[:, -1], self.active)
        self.progress(0, 0, len(self.active), 0)
        self._retire(self._append(self.active, tokens, is_finite))

    def _window(self, longest: int) -> int:
        """Columns of the past that the cache shows to the next step."""
        return longest if self.columns is not None else int(self.cache.get_seq_length())

    def _choose(self, logits_NV: Tensor, rows: Sequence[_Active]) -> tuple[list[int], list[bool]]:
        sampling = [row.request.sampling for row in rows]
        if any(how.repetition_penalty != 1.0 for how in sampling):
            history = [[*row.request.token_ids, *row.answer.token_ids] for row in rows]
            logits_NV = penalise_repetition(logits_NV, sampling, history)
        tokens_N, is_finite_N = choose_tokens(
            logits_NV, sampling, [len(r.answer.token_ids) for r in rows]
        )
        # The one host synchronisation of a step: which rows go on depends on it.
        tokens, is_finite = torch.stack((tokens_N, is_finite_N.to(tokens_N.dtype))).tolist()
        return tokens, [bool(flag) for flag in is_finite]

    def _append(
        self, rows: Sequence[_Active], tokens: Sequence[int], is_finite: Sequence[bool]
    ) -> list[int]:
        """Add each row's new token; returns the positions of the rows that are finished by it."""
        finished = []
        for position, (row, token, ok) in enumerate(zip(rows, tokens, is_finite, strict=True)):
            answer = row.answer
            answer.token_ids.append(token)
            if not ok:
                answer.finish_reason = "not_finite"
            elif token in self.eos_ids or self._is_stopped(row):
                answer.finish_reason = "stop"
            elif len(answer.token_ids) < row.request.max_new_tokens:
                continue
            finished.append(position)
        return finished

    def _is_stopped(self, row: _Active) -> bool:
        if not row.request.stop:
            return False
        # A token is at least a byte, so a string just completed lies within its number of bytes of
        # the end.
        reach = max(len(text.encode()) for text in row.request.stop) + 8
        tail = self.runner.tokenizer.decode(row.answer.token_ids[-reach:], skip_special_tokens=True)
        found = [text for text in row.request.stop if text in tail]
        if found:
            row.answer.stop_string = min(found, key=tail.find)
        return bool(found)

    def _retire(self, finished: Sequence[int]) -> None:
        """Take finished rows out of the batch and close the gaps."""
        if not finished:
            return
        self.progress(len(finished), 0, 0, 0)
        if self.columns is None:
            gone = set(finished)
            kept = [place for place in range(len(self.active)) if place not in gone]
            self.active = [self.active[place] for place in kept]
            if kept:
                keep_rows(self.cache, torch.tensor(kept, device=self.runner.device))
            return
        for place in sorted(finished, reverse=True):
            row, last = self.active[place], len(self.active) - 1
            if place != last:
                self.columns.move_row(last, place)
                self.active[place] = self.active[last]
            self.active.pop()
            if row.answer.finish_reason == "not_finite":
                self.columns.clear_row(last)
