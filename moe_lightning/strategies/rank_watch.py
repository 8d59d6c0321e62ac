"""RankWatch: which ranks of a run still live, asked past the process group, which may be broken.

    rank r ──ping each second──▶ its successor        silent for timeout_s: the run ends
    rank r ──ping──▶ all others                       only after a collective has failed
    rank r ──farewell──▶ all others                   when it ends, with the reason

A thread of each rank answers on a datagram socket whatever the thread that computes is doing: one
that waits in a collective holds no lock of the interpreter. There is no meeting point that could go
with rank 0, and no rank hears from more than two others while all is well. A rank that ends because
another one did says so first; to blame are those that neither answer nor said farewell.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from moe_lightning.errors import StoppedError, WorkersLostError
from moe_lightning.strategies.rank_failures import (
    Farewell,
    find_cause,
    is_group_failure,
    is_interrupt,
    shorten,
)
from moe_lightning.strategies.rank_post import RankPost
from moe_lightning.transport.clock import AwakeClock

_BEAT_S = 1.0
_ASK_S = 0.3  # between questions to the same rank in a diagnosis
_ROUND_S = 0.2
_INTERRUPTED = 5  # the command line's exit code


@dataclass(frozen=True, slots=True)
class WatchTimes:
    """How long a watch waits.

    Attributes:
        timeout_s: Silence of a rank that ends the run.
        warn_s: Silence that is worth a line.
        answer_s: Time to answer once a collective has failed.
        grace_s: Time in which the thread that computes should notice by itself that ranks are lost,
            before the watch ends the process.
    """

    timeout_s: float
    warn_s: float = 10.0
    answer_s: float = 5.0
    grace_s: float = 15.0


class RankWatch:
    """Watches over the ranks of a run, from its construction to ``stop``.

    Args:
        post: How the ranks' watches write to each other; closed by ``stop``.
        times: How long it waits.
        before_exit: Called before the watch ends the process, to end what that has started.
    """

    def __init__(
        self,
        post: RankPost,
        times: WatchTimes,
        *,
        before_exit: Callable[[], None] = lambda: None,
    ) -> None:
        self._post = post
        self._times = times
        self._before_exit = before_exit
        self._clock = AwakeClock(5 * _ROUND_S)
        self._num_heard = [0] * len(post.places)
        self._farewells: dict[int, Farewell] = {}
        self._own: Farewell | None = None
        self._cause: BaseException | None = None
        self._deadline_s: float | None = None
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rank-watch", daemon=True)
        self._thread.start()

    @classmethod
    def start(
        cls,
        group: dist.ProcessGroup,
        times: WatchTimes,
        *,
        before_exit: Callable[[], None] = lambda: None,
    ) -> "RankWatch":
        """Begin on all ranks of a run together.

        Args:
            group: All ranks, on a group of the host's.
            times: How long it waits.
            before_exit: As of the class.

        Returns:
            This rank's watch.
        """
        return cls(RankPost.open(group), times, before_exit=before_exit)

    def explain(self, error: BaseException, *, what_failed: str) -> BaseException | None:
        """Find out whether an error of this rank comes from other ranks, and tell them.

        If a rank is silent, that takes as long as it has to answer.

        Args:
            error: What ended this rank's work.
            what_failed: What that was, for the message.

        Returns:
            A WorkersLostError that names the ranks to blame; a KeyboardInterrupt if these were
            interrupted; None if the error is this rank's own.
        """
        if self._own is not None:
            return None
        if type(error) is StoppedError:  # as all ranks have agreed
            self._leave(Farewell("interrupted"))
            return None
        if not (is_group_failure(error) or is_interrupt(error)):
            self._leave(Farewell("failed", f"{type(error).__name__}: {error}"))
            return None
        silent = self._find_silent(waits_for_farewells=is_group_failure(error))
        cause = self._find_cause(silent, what_failed)
        if isinstance(cause, KeyboardInterrupt) or (cause is None and is_interrupt(error)):
            self._leave(Farewell("interrupted"))
            return cause
        if cause is None:
            cause = WorkersLostError(
                f"the ranks lost each other during {what_failed}, but all answer now. One or the "
                f"network was stuck: {shorten(str(error))}. The same command continues."
            )
        self._cause = cause
        self._leave(Farewell("lost", victims=self._victims(silent)))
        # Callbacks and loggers end now; they must not wait for the broken group for ever.
        self._deadline_s = self._clock.now_s + 2 * self._times.grace_s
        return cause

    def stop(self) -> None:
        """End the watch. The others hear that this rank is done, unless it said why it ends."""
        if not self._is_closed.is_set():
            self._leave(Farewell("done"))
            self._is_closed.set()
            self._thread.join()
            self._post.close()

    # The diagnosis, in the thread that computes.

    def _find_silent(self, *, waits_for_farewells: bool) -> list[int]:
        """Ask all ranks; wait until all is clear, or for as long as they have to answer."""
        before = list(self._num_heard)
        end_s = time.monotonic() + self._times.answer_s
        while True:
            silent = [
                r
                for r in self._post.others
                if r not in self._farewells and self._num_heard[r] == before[r]
            ]
            is_known = any(f.how in ("failed", "lost") for f in self._farewells.copy().values())
            is_clear = not silent and not waits_for_farewells
            if is_known or is_clear or time.monotonic() > end_s:
                # What another rank found is as good as what this one would.
                return [] if is_known else silent
            for other in silent:
                self._post.send(other, "ping")
            time.sleep(_ASK_S)

    def _find_cause(self, silent: Collection[int], what_failed: str) -> BaseException | None:
        return find_cause(
            self._post.rank,
            self._post.places,
            farewells=self._farewells.copy(),  # the other thread writes
            silent=silent,
            what_failed=what_failed,
        )

    def _victims(self, silent: Collection[int]) -> tuple[int, ...]:
        known = (v for farewell in self._farewells.copy().values() for v in farewell.victims)
        return tuple(sorted({*silent, *known}))

    def _leave(self, farewell: Farewell) -> None:
        if self._own is None:
            self._own = farewell
            for _ in range(2):  # a datagram may be lost
                for other in self._post.others:
                    self._post.send(other, "farewell", **farewell.to_fields())

    # The thread of the watch.

    def _run(self) -> None:
        successor = _Successor(self._post.rank)
        while not self._is_closed.is_set():
            self._clock.tick()
            for letter in self._post.receive(_ROUND_S):
                self._take(*letter)
            self._watch(successor)
            if self._deadline_s is not None and self._clock.now_s > self._deadline_s:
                self._end_process()

    def _take(self, other: int, what: str, said: Mapping[str, Any]) -> None:
        if what == "farewell":
            farewell = Farewell.from_fields(said)
            if farewell is not None:
                self._farewells.setdefault(other, farewell)
                if farewell.how != "done" and self._own is None and self._deadline_s is None:
                    self._deadline_s = self._clock.now_s + self._times.grace_s
            return
        self._num_heard[other] += 1
        if what == "ping":
            self._answer(other)

    def _answer(self, other: int) -> None:
        if self._own is None:
            self._post.send(other, "pong")
        else:
            self._post.send(other, "farewell", **self._own.to_fields())

    def _watch(self, successor: "_Successor") -> None:
        now_s = self._clock.now_s
        successor.choose(self._farewells, len(self._post.places), now_s)
        if successor.rank == self._post.rank or self._own is not None:
            return
        silence_s = successor.silence_s(self._num_heard[successor.rank], now_s)
        place = self._post.places[successor.rank]
        if now_s >= successor.next_ping_s:
            successor.next_ping_s = now_s + _BEAT_S
            self._post.send(successor.rank, "ping")
        if silence_s > self._times.warn_s and not successor.is_warned:
            successor.is_warned = True
            self._say(
                f"{place} has been silent for {silence_s:.0f} s; after {self._times.timeout_s:.0f} "
                "s the run ends."
            )
        elif silence_s < _BEAT_S and successor.is_warned:
            successor.is_warned = False
            self._say(f"{place} answers again.")
        if silence_s > self._times.timeout_s:
            self._farewells[successor.rank] = Farewell("lost", victims=(successor.rank,))
            self._deadline_s = self._deadline_s or now_s + self._times.grace_s

    def _end_process(self) -> None:
        """End a process whose main thread does not come back: it may hang in the group for ever."""
        cause = self._cause or self._find_cause((), "the run")
        if self._own is None:
            self._leave(Farewell("lost", victims=self._victims(())))
        self._say("interrupted." if isinstance(cause, KeyboardInterrupt) else f"error: {cause}")
        self._before_exit()
        sys.stdout.flush()
        sys.stderr.flush()
        # Only this ends a thread that waits for a GPU or a group.
        os._exit(
            _INTERRUPTED if isinstance(cause, KeyboardInterrupt) else WorkersLostError.exit_code
        )

    def _say(self, text: str) -> None:
        # A progress bar may be in the middle of the line.
        print(f"\nrank {self._post.rank}: {text}", file=sys.stderr, flush=True)


class _Successor:
    """The next rank that has not ended, and how long it has been silent."""

    def __init__(self, rank: int) -> None:
        self.rank = self._own = rank
        self.is_warned = False
        self.next_ping_s = 0.0
        self._num_heard = -1
        self._heard_s = 0.0

    def choose(self, ended: Mapping[int, Farewell], size: int, now_s: float) -> None:
        rank = (self._own + 1) % size
        while rank != self._own and rank in ended:
            rank = (rank + 1) % size
        if rank != self.rank:
            self.rank, self.is_warned, self._num_heard = rank, False, -1
            self._heard_s = self.next_ping_s = now_s

    def silence_s(self, num_heard: int, now_s: float) -> float:
        if num_heard != self._num_heard:
            self._num_heard, self._heard_s = num_heard, now_s
        return now_s - self._heard_s
