"""Tally: what a run has done so far, for progress bars and summaries."""

import time
from collections.abc import Callable


class Tally:
    """Counts of one run on this rank.

    Attributes:
        num_rows: Rows answered.
        num_errors: Rows that could not be computed.
        num_batches: Planned batches done.
        num_prompt_tokens: Tokens of prompts computed.
        num_new_tokens: Tokens generated.
        num_padding_tokens: Padding tokens computed beside prompts.
        num_rows_elsewhere: Rows that other ranks answered meanwhile.
    """

    def __init__(self) -> None:
        self._listeners: list[Callable[[], None]] = []
        self.reset()

    def reset(self) -> None:
        """Begin at zero, and start the clock."""
        self.num_rows = self.num_errors = self.num_batches = 0
        self.num_prompt_tokens = self.num_new_tokens = self.num_padding_tokens = 0
        self.num_rows_elsewhere = 0
        self._started_s = time.monotonic()

    def listen(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` whenever a count changes."""
        self._listeners.append(listener)

    def add(self, rows: int, prompt_tokens: int, new_tokens: int, padding_tokens: int) -> None:
        """Count work as it is done; the signature is that of ``tasks.task.Progress``."""
        self.num_rows += rows
        self.num_prompt_tokens += prompt_tokens
        self.num_new_tokens += new_tokens
        self.num_padding_tokens += padding_tokens
        for listener in self._listeners:
            listener()

    def add_elsewhere(self, rows: int) -> None:
        """Count rows of other ranks."""
        self.num_rows_elsewhere += rows

    def end_batch(self, *, num_errors: int) -> None:
        """Count a finished batch and the rows of it that failed."""
        self.num_batches += 1
        self.num_errors += num_errors

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start, on the monotonic clock."""
        return time.monotonic() - self._started_s

    @property
    def tokens_per_s(self) -> float:
        """Prompt and new tokens per second."""
        return (self.num_prompt_tokens + self.num_new_tokens) / max(self.elapsed_s, 1e-9)

    @property
    def padding_share(self) -> float:
        """Padding tokens among all that prompts took."""
        return self.num_padding_tokens / max(self.num_prompt_tokens + self.num_padding_tokens, 1)
