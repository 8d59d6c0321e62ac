"""The parts of a batch take turns: whose turn it is, failures, and an interrupt at any moment."""

import ctypes
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from moe_lightning.dispatch import Interleaver

LONG_ENOUGH_S = 20


def interleaver(num_parts=3):
    return Interleaver(min_tokens=1, num_parts=num_parts)


def steps(turns, name, events, num_steps=3, wait=None):
    """A part that notes when it computes, and is away after each step."""

    def part():
        for step in range(num_steps):
            events.append((name, step))
            with turns.away():
                if wait is not None:
                    wait(step)
        return name

    return part


# Turns.


@pytest.mark.parametrize("num_parts", [1, 2, 3, 5])
def test_results_come_in_the_order_of_the_parts(num_parts):
    turns, events = interleaver(num_parts), []
    for _ in range(3):
        got = turns.run([steps(turns, name, events) for name in range(num_parts)])
        assert got == list(range(num_parts))


def test_fewer_parts_than_there_may_be():
    turns, events = interleaver(4), []
    assert turns.run([steps(turns, "a", events), steps(turns, "b", events)]) == ["a", "b"]


def test_only_one_part_computes_at_a_time():
    turns = interleaver(4)
    inside, most = [0], [0]

    def part():
        for _ in range(20):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(1e-4)
            inside[0] -= 1
            with turns.away():
                time.sleep(1e-4)

    turns.run([part] * 4)
    assert most == [1]


def test_while_one_part_is_away_another_computes():
    turns, barrier = interleaver(3), threading.Barrier(3)

    def part():
        with turns.away():
            barrier.wait(LONG_ENOUGH_S)  # only if all three are away at once
        return True

    assert turns.run([part] * 3) == [True] * 3


def test_whoever_waits_longest_is_next():
    """Three parts that come back in a known order, while a fourth one has the baton."""
    turns, order = interleaver(4), []
    is_away = [threading.Event() for _ in range(3)]
    may_come_back = [threading.Event() for _ in range(3)]

    def number_waiting():
        return len(turns._baton._waiting)

    def waiter(n):
        with turns.away():
            is_away[n].set()
            assert may_come_back[n].wait(LONG_ENOUGH_S)
        order.append(n)

    def holder():
        for n in range(3):
            with turns.away():
                assert is_away[n].wait(LONG_ENOUGH_S)
        for place, n in enumerate((2, 0, 1)):
            may_come_back[n].set()
            deadline_s = time.monotonic() + LONG_ENOUGH_S
            while number_waiting() <= place and time.monotonic() < deadline_s:
                time.sleep(1e-3)
        order.append("holder")

    turns.run([holder, *(lambda n=n: waiter(n) for n in range(3))])
    assert order == ["holder", 2, 0, 1]


def test_nobody_takes_the_baton_before_who_already_waits():
    """Who gives it back and wants it again at once is behind everybody else."""
    turns, events = interleaver(3), []
    turns.run([steps(turns, name, events, num_steps=50) for name in "abc"])
    # From when the last part has begun until the first has ended, all have their turns.
    begun = max(events.index((name, 0)) for name in "abc")
    ended = min(events.index((name, 49)) for name in "abc")
    between = [name for name, _ in events[begun:ended]]
    for three in zip(between, between[1:], between[2:], strict=False):
        assert len(set(three)) == 3, between


def test_away_means_nothing_to_who_has_no_baton():
    turns = interleaver()
    with turns.away(), turns.away():
        pass
    assert turns.run([lambda: 1]) == [1]


def test_parts_have_the_modes_and_threads_of_their_caller():
    turns = interleaver(2)

    def modes():
        return (
            torch.is_inference_mode_enabled(),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_num_threads(),
        )

    with torch.inference_mode():
        assert turns.run([modes] * 2) == [modes()] * 2
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert turns.run([modes] * 2) == [modes()] * 2


# Failures.


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_failure_of_one_part_stops_the_others_and_is_what_the_caller_sees(failing):
    turns, events, has_failed = interleaver(3), [], threading.Event()
    all_away = threading.Barrier(3)

    def fail():
        with turns.away():
            all_away.wait(LONG_ENOUGH_S)
        has_failed.set()
        raise ValueError("this part fails")

    def go_on():
        with turns.away():
            all_away.wait(LONG_ENOUGH_S)
            assert has_failed.wait(LONG_ENOUGH_S)
        while True:
            events.append(1)
            with turns.away():
                time.sleep(1e-3)

    parts = [fail if n == failing else go_on for n in range(3)]
    with ThreadPoolExecutor(1) as caller:  # so that a test that hangs fails
        call = caller.submit(turns.run, parts)
        with pytest.raises(ValueError, match="this part fails"):
            call.result(LONG_ENOUGH_S)
    num_events = len(events)
    time.sleep(0.05)
    assert len(events) == num_events, "nothing runs on behind the caller's back"
    assert turns.run([lambda: 1, lambda: 2, lambda: 3]) == [1, 2, 3], "the next batch is computed"


def test_a_part_that_has_not_begun_is_not_begun_after_a_failure():
    turns, begun = interleaver(3), []

    def fail():
        raise ValueError("at once")

    with pytest.raises(ValueError, match="at once"):
        turns.run([fail, lambda: begun.append(1), lambda: begun.append(2)])
    time.sleep(0.05)
    seen = list(begun)
    assert turns.run([lambda: 1, lambda: 2]) == [1, 2]
    assert begun == seen


def test_a_failure_while_away_gives_the_baton_back():
    turns = interleaver(2)

    def fail():
        with turns.away():
            raise ValueError("lost on the way")

    def other():
        with turns.away():
            time.sleep(0.01)

    with pytest.raises(ValueError, match="lost on the way"):
        turns.run([other, fail])
    assert turns.run([lambda: 1, lambda: 2]) == [1, 2]


# Interrupts. Python raises KeyboardInterrupt in the main thread, whatever it waits for; here it is
# raised in a thread of the test's, at a moment that the test knows.


def interrupt(thread):
    raised = ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident), ctypes.py_object(KeyboardInterrupt)
    )
    assert raised == 1


class _InterruptedLock:
    """A lock whose first ``acquire`` is interrupted."""

    def __init__(self, lock, interruptions):
        self._lock = lock
        self._interruptions = interruptions

    def acquire(self):
        if self._interruptions:
            self._interruptions.pop()
            raise KeyboardInterrupt
        return self._lock.acquire()

    def release(self):
        self._lock.release()


def test_an_interrupt_while_waiting_for_the_baton_does_not_lose_it(monkeypatch):
    turns, interruptions, made = interleaver(2), [], []
    real = threading.Lock

    def lock():
        # The first acquire of a turn's lock takes it; the second one waits.
        made.append(_InterruptedLock(real(), []))
        return made[-1]

    is_away, is_back = threading.Event(), threading.Event()

    def interrupted():
        with turns.away():
            is_away.set()
            assert is_back.wait(LONG_ENOUGH_S)
        pytest.fail("it was interrupted")

    def other():
        with turns.away():
            assert is_away.wait(LONG_ENOUGH_S)
        monkeypatch.setattr("moe_lightning.dispatch.interleave.threading.Lock", lock)
        is_back.set()
        deadline_s = time.monotonic() + LONG_ENOUGH_S
        while not turns._baton._waiting and time.monotonic() < deadline_s:
            time.sleep(1e-3)
        (waiting,) = turns._baton._waiting
        assert waiting in made
        made[0]._interruptions = interruptions
        monkeypatch.undo()
        return "done"

    interruptions.append(1)
    del interrupted, other
    assert turns.run([lambda: 1, lambda: 2]) == [1, 2]
