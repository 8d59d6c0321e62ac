"""The parts of a batch take turns: whose turn it is, failures, and an interrupt at any moment."""

import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from moe_lightning.dispatch import Interleaver

LONG_ENOUGH_S = 20


def interleaver(num_parts=3):
    return Interleaver(min_tokens=1, num_parts=num_parts)


def steps(turns, name, events, num_steps=3):
    """A part that notes when it computes, and is away after each step."""

    def part():
        for step in range(num_steps):
            events.append((name, step))
            with turns.away():
                pass
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
            while len(turns._mine.baton._waiting) <= place and time.monotonic() < deadline_s:
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


# Interrupts. Python raises KeyboardInterrupt in the main thread, which runs these tests.


@pytest.fixture
def interrupt():
    """Send the main thread a signal that is a KeyboardInterrupt there."""

    def raise_interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, raise_interrupt)
    main = threading.main_thread().ident
    yield lambda: signal.pthread_kill(main, signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)


def wait_until(is_so):
    deadline_s = time.monotonic() + LONG_ENOUGH_S
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(1e-3)


def test_an_interrupt_while_waiting_for_the_baton_does_not_lose_it(interrupt):
    turns, may_come_back, seen = interleaver(2), threading.Event(), []

    def first():  # in the main thread
        with turns.away():
            assert may_come_back.wait(LONG_ENOUGH_S)
        seen.append("interrupted too late")

    def second():
        may_come_back.set()
        wait_until(lambda: turns._mine.baton._waiting)
        interrupt()
        time.sleep(0.05)
        seen.append("the other part has not been disturbed")
        with turns.away():
            pass
        seen.append("interrupted too late")

    with pytest.raises(KeyboardInterrupt):
        turns.run([first, second])
    assert seen == ["the other part has not been disturbed"]
    assert turns.run([lambda: 1, lambda: 2]) == [1, 2]


def test_an_interrupt_while_away(interrupt):
    turns = interleaver(2)

    def first():
        with turns.away():
            threading.Timer(0.02, interrupt).start()
            time.sleep(LONG_ENOUGH_S)

    def second():
        for _ in range(100):
            with turns.away():
                time.sleep(1e-3)

    with pytest.raises(KeyboardInterrupt):
        turns.run([first, second])
    assert turns.run([lambda: 1, lambda: 2]) == [1, 2]


def test_interrupts_at_any_moment_neither_hang_nor_spoil_the_next_batch(interrupt):
    turns, draw = interleaver(3), random.Random(5)
    num_interrupted = 0

    def part():
        for _ in range(40):
            with turns.away():
                pass
        return True

    for _ in range(300):
        timer = threading.Timer(draw.uniform(0, 3e-3), interrupt)
        try:
            timer.start()
            assert turns.run([part] * 3) == [True] * 3
            timer.join()
            time.sleep(1e-3)
        except KeyboardInterrupt:
            num_interrupted += 1
        timer.join()
        assert turns.run([lambda: 1, lambda: 2, lambda: 3]) == [1, 2, 3]
    assert num_interrupted > 50, "else this says little"


# What a wait costs.


def test_a_wait_is_told_how_long_of_it_another_part_was_computed():
    turns = interleaver(2)
    absences, has_left, computes = {}, threading.Event(), threading.Event()

    def first():
        with turns.away() as absences["first"]:
            has_left.set()
            computes.wait(LONG_ENOUGH_S)

    def second():
        with turns.away():
            has_left.wait(LONG_ENOUGH_S)
        computes.set()
        time.sleep(0.2)  # has the baton

    turns.run([first, second])
    # The first comes back at once and waits for the second.
    assert 0.15 < absences["first"].handed_over_s < LONG_ENOUGH_S


def test_nobody_computes_while_all_wait():
    turns = interleaver(2)
    absences, starts = {}, {}

    both = threading.Barrier(2)

    def part(name, seconds):
        def wait():
            with turns.away():
                both.wait(LONG_ENOUGH_S)  # both threads are there
            starts[name] = time.perf_counter()
            with turns.away() as absences[name]:
                time.sleep(seconds)
            starts[f"{name} is back"] = time.perf_counter()

        return wait

    turns.run([part("first", 0.3), part("second", 0.1)])
    stood_still_s = sum(
        starts[f"{name} is back"] - starts[name] - absences[name].handed_over_s
        for name in ("first", "second")
    )
    # Both were away for 0.1 s, and the first for 0.2 s more: each moment counts once.
    assert stood_still_s == pytest.approx(0.3, abs=0.08)


def test_a_wait_alone_hands_nothing_over():
    with interleaver().away() as absence:
        time.sleep(0.01)
    assert absence.handed_over_s == 0
