"""Interleaver: the parts of a batch take turns on the home device.

    part A:  dense ─ rows leave │ (away)        │ dense ─ rows leave │ (away) ...
    part B:                     │ dense ─ rows leave │ (away)        │ dense ...

While the rows of one part are with their experts, another part's dense layers are computed. Each
part runs the unmodified model in a thread of its own; only the thread that has the baton computes,
and it hands it over when it has to wait. Who waits longest gets it next.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from moe_lightning.dispatch.thread_modes import ThreadModes, use_threads

T = TypeVar("T")


class Interleaver:
    """Runs the parts of a batch in turns.

    Args:
        min_tokens: Batches of fewer tokens are not worth splitting: their experts would be computed
            for fewer rows at a time.
        num_parts: Into how many parts larger batches are split.
    """

    def __init__(self, *, min_tokens: int, num_parts: int = 2) -> None:
        self.min_tokens = min_tokens
        self.num_parts = num_parts
        self._baton = _Baton()
        self._is_stopping = False
        self._mine = threading.local()
        self._pool = ThreadPoolExecutor(max(1, num_parts - 1), thread_name_prefix="part")

    def run(self, parts: Sequence[Callable[[], T]]) -> list[T]:
        """Run all parts.

        Args:
            parts: What to compute; the first one is computed by this thread. No more than
                ``num_parts``.

        Returns:
            What they returned.
        """
        modes, num_threads = ThreadModes(), torch.get_num_threads()

        def elsewhere(part: Callable[[], T]) -> T:
            if torch.get_num_threads() != num_threads:
                use_threads(num_threads)
            with modes.applied():
                return self._with_baton(part)

        assert len(parts) <= self.num_parts, "each part needs a thread"
        self._is_stopping = False
        futures = [self._pool.submit(elsewhere, part) for part in parts[1:]]
        try:
            return [self._with_baton(parts[0]), *(future.result() for future in futures)]
        except BaseException:
            self._is_stopping = True
            for future in futures:  # nothing runs on behind the caller's back
                if not future.cancel():
                    future.exception()
            raise

    def _with_baton(self, part: Callable[[], T]) -> T:
        with self._baton:
            self._mine.has_baton = True
            try:
                return part()
            finally:
                self._mine.has_baton = False

    @contextmanager
    def away(self) -> Iterator[None]:
        """Let other parts compute during the block, which only waits."""
        if not getattr(self._mine, "has_baton", False):
            yield
            return
        self._baton.release()
        try:
            yield
        finally:
            self._baton.acquire()
        if self._is_stopping:
            raise RuntimeError("another part of the batch has failed")


class _Baton:
    """A lock that is given to who waits longest, so that parts stay in their order."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._is_taken = False
        self._waiting: deque[threading.Lock] = deque()

    def acquire(self) -> None:
        with self._mutex:
            if not self._is_taken:
                self._is_taken = True
                return
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        interrupt = None
        has_turn = False
        while not has_turn:  # whoever is next in the queue must take it
            try:
                has_turn = turn.acquire()
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def release(self) -> None:
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._is_taken = False

    def __enter__(self) -> None:
        try:
            self.acquire()
        except KeyboardInterrupt:
            self.release()
            raise

    def __exit__(self, *_: object) -> None:
        self.release()
