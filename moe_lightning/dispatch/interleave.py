"""Interleaver: the parts of a batch take turns on the home device.

    part A:  dense ─ rows leave │ (away)        │ dense ─ rows leave │ (away) ...
    part B:                     │ dense ─ rows leave │ (away)        │ dense ...

While the rows of one part are with their experts, another part's dense layers are computed. Each
part runs the unmodified model in a thread of its own; only the thread that has the baton computes,
and it hands it over when it has to wait. Who waits longest gets it next.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from moe_lightning.dispatch.thread_modes import ThreadModes, use_threads

T = TypeVar("T")
LOOK_AGAIN_S = 0.1


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
        self._mine = threading.local()
        self._pool = ThreadPoolExecutor(max(1, num_parts - 1), thread_name_prefix="part")

    def run(self, parts: Sequence[Callable[[], T]]) -> list[T]:
        """Run all parts.

        Args:
            parts: What to compute; the first one is computed by this thread. No more than
                ``num_parts``.

        Returns:
            What they returned.

        Raises:
            BaseException: What the first part to fail raised; the others stop at their next turn.
        """
        assert len(parts) <= self.num_parts, "each part needs a thread"
        modes, num_threads, baton = ThreadModes(), torch.get_num_threads(), _Baton()

        def elsewhere(part: Callable[[], T]) -> T:
            if torch.get_num_threads() != num_threads:
                use_threads(num_threads)
            with modes.applied():
                return self._compute(part, baton)

        futures: list[Future[T]] = []
        try:
            for part in parts[1:]:
                futures.append(self._pool.submit(elsewhere, part))
            return [self._compute(parts[0], baton), *(future.result() for future in futures)]
        except BaseException as error:
            baton.drop(error)
            for future in futures:  # nothing runs on behind the caller's back
                if not future.cancel():
                    future.exception()
            if isinstance(error, _StoppedError) and baton.failure is not None:
                raise baton.failure from None
            raise

    def _compute(self, part: Callable[[], T], baton: "_Baton") -> T:
        with baton:
            self._mine.baton = baton
            try:
                return part()
            except BaseException as error:
                baton.drop(error)
                raise
            finally:
                self._mine.baton = None

    @contextmanager
    def away(self) -> Iterator["Absence"]:
        """Let other parts compute during the block, which only waits."""
        absence = Absence()
        baton: _Baton | None = getattr(self._mine, "baton", None)
        if baton is None:
            yield absence
            return
        left_s = time.perf_counter()
        baton.release()
        try:
            yield absence
        finally:
            idle_s = baton.acquire()
            absence.handed_over_s = max(0.0, time.perf_counter() - left_s - idle_s)


@dataclass(slots=True)
class Absence:
    """A wait of one part.

    Attributes:
        handed_over_s: After the wait, how long of it another part was computed.
    """

    handed_over_s: float = 0.0


@contextmanager
def stay() -> Iterator[Absence]:
    """A wait in which nobody else computes."""
    yield Absence()


class _StoppedError(RuntimeError):
    """Another part of the batch has failed."""


class _Baton:
    """A lock that is given to who waits longest, so that parts stay in their order.

    Once a part has failed it is dropped, and whoever comes for it is stopped. That needs nobody to
    hand it on: an interrupt may come at any moment, and then nobody does.
    """

    def __init__(self) -> None:
        self.failure: BaseException | None = None
        self._mutex = threading.Lock()
        self._is_taken = False
        self._idle_since_s: float | None = None
        self._waiting: deque[threading.Lock] = deque()

    def acquire(self) -> float:
        """Take it.

        Returns:
            Seconds, until just now, in which nobody had it.
        """
        idle_s = 0.0
        with self._mutex:
            turn = threading.Lock()
            if self._is_taken:
                turn.acquire()
                self._waiting.append(turn)
            elif self._idle_since_s is not None:
                idle_s = time.perf_counter() - self._idle_since_s
            self._is_taken = True
        while self.failure is None and not turn.acquire(timeout=LOOK_AGAIN_S):
            pass
        if self.failure is not None:
            raise _StoppedError("another part of the batch has failed")
        return idle_s

    def release(self) -> None:
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._is_taken = False
                self._idle_since_s = time.perf_counter()

    def drop(self, failure: BaseException) -> None:
        with self._mutex:
            self.failure = self.failure or failure

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()
