"""Interleaver: two halves of a batch take turns on the home device.

    half A:  dense ─ rows leave │ (away)        │ dense ─ rows leave │ (away) ...
    half B:                     │ dense ─ rows leave │ (away)        │ dense ...

While the rows of one half are with their experts, the other half's dense layers are computed. Each
half runs the unmodified model in a thread of its own; only the thread that has the baton computes,
and it hands it over when it has to wait.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from moe_lightning.dispatch.thread_modes import ThreadModes, use_threads

T = TypeVar("T")


class Interleaver:
    """Runs two halves of a batch in turns.

    Args:
        min_tokens: Batches of fewer tokens are not worth splitting: their experts would be computed
            for half as many rows at a time.
    """

    def __init__(self, *, min_tokens: int) -> None:
        self.min_tokens = min_tokens
        self._baton = threading.Lock()
        self._mine = threading.local()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="second half")

    def run(self, first: Callable[[], T], second: Callable[[], T]) -> tuple[T, T]:
        """Run both halves.

        Args:
            first: The half that this thread computes.
            second: The half that the other thread computes.

        Returns:
            What they returned.
        """
        modes, num_threads = ThreadModes(), torch.get_num_threads()

        def other() -> T:
            if torch.get_num_threads() != num_threads:
                use_threads(num_threads)
            with modes.applied():
                return self._with_baton(second)

        future = self._pool.submit(other)
        try:
            one = self._with_baton(first)
        except BaseException:
            future.exception()  # let it end, so that nothing runs on behind the caller's back
            raise
        return one, future.result()

    def _with_baton(self, half: Callable[[], T]) -> T:
        with self._baton:
            self._mine.has_baton = True
            try:
                return half()
            finally:
                self._mine.has_baton = False

    @contextmanager
    def away(self) -> Iterator[None]:
        """Let the other half compute during the block, which only waits."""
        if not getattr(self._mine, "has_baton", False):
            yield
            return
        self._baton.release()
        try:
            yield
        finally:
            self._baton.acquire()
