"""Slots on the CPU: worker threads, at work at the same time, each with its own settings."""

import gc
import threading
import weakref

import pytest
import torch

from moe_lightning.dispatch.slots import HomeSlot, ThreadSlot, make_slots

CPU = torch.device("cpu")
ROWS = (
    torch.arange(6.0).view(3, 2),
    torch.tensor([[0], [1], [0]]),
    torch.tensor([[1.0], [2], [3]]),
)
LONG_ENOUGH_S = 20


@pytest.fixture
def make_slot():
    """Slots that are closed after the test, and the process's threads as they were."""
    num_threads, slots = torch.get_num_threads(), []

    def make(name="1:cpu", *, num_threads=1):
        slots.append(ThreadSlot(name, device=CPU, home=CPU, num_threads=num_threads))
        return slots[-1]

    yield make
    for slot in slots:
        slot.close()
    torch.set_num_threads(num_threads)


def weighted(rows_RD, index_RK, weights_RK):
    return rows_RD * weights_RK


@pytest.mark.parametrize("kind", [HomeSlot, ThreadSlot])
def test_a_share_is_computed_from_what_was_given(kind):
    options = {"num_threads": 1} if kind is ThreadSlot else {}
    slot = kind("slot", device=CPU, home=CPU, **options)
    seen = []

    def compute(*tensors):
        seen.append(tensors)
        return weighted(*tensors)

    out_RD = slot.start(compute, *ROWS)()
    assert out_RD.tolist() == [[0, 1], [4, 6], [12, 15]]
    assert len(seen) == 1
    # Experts on the host are computed where the rows are: nothing is copied.
    assert [t.data_ptr() for t in seen[0]] == [t.data_ptr() for t in ROWS]
    slot.close()


def test_the_home_slot_computes_when_it_is_asked_for_the_result_in_the_thread_that_asks():
    threads = []

    def compute(*tensors):
        threads.append(threading.current_thread())
        return tensors[0]

    finish = HomeSlot("0:cpu", device=CPU, home=CPU).start(compute, *ROWS)
    assert threads == []
    finish()
    assert threads == [threading.current_thread()]


def test_two_slots_are_at_work_at_the_same_time(make_slot):
    barrier = threading.Barrier(2)

    def compute(*tensors):
        barrier.wait(LONG_ENOUGH_S)  # nobody passes before both are here
        return tensors[0]

    finishes = [make_slot(f"{n}:cpu").start(compute, *ROWS) for n in (1, 2)]
    for finish in finishes:
        assert torch.equal(finish(), ROWS[0])


def test_start_does_not_wait(make_slot):
    may_go = threading.Event()

    def compute(*tensors):
        assert may_go.wait(LONG_ENOUGH_S)
        return tensors[0]

    finish = make_slot().start(compute, *ROWS)
    may_go.set()
    assert torch.equal(finish(), ROWS[0])


def test_shares_of_one_slot_are_computed_one_after_the_other_by_one_thread(make_slot):
    order, threads = [], set()

    def compute(number):
        def compute(*tensors):
            order.append(number)
            threads.add(threading.get_ident())
            return tensors[0] + number

        return compute

    slot = make_slot()
    finishes = [slot.start(compute(number), *ROWS) for number in range(5)]
    for number, finish in reversed(list(enumerate(finishes))):
        assert torch.equal(finish(), ROWS[0] + number)
    assert order == [0, 1, 2, 3, 4]
    assert len(threads) == 1
    assert threading.get_ident() not in threads


@pytest.mark.parametrize("is_inference", [True, False])
def test_a_worker_is_in_the_inference_mode_of_its_caller_and_never_records_gradients(
    make_slot, is_inference
):
    modes = []

    def compute(*tensors):
        modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        return tensors[0] * 2

    slot = make_slot()
    with torch.inference_mode(is_inference):
        out_RD = slot.start(compute, *ROWS)()
    assert modes == [(is_inference, False)]
    assert out_RD.is_inference() == is_inference
    # The same thread again, under the other mode: nothing is left behind.
    with torch.inference_mode(not is_inference):
        slot.start(compute, *ROWS)()
    assert modes[1] == (not is_inference, False)


def test_an_exception_reaches_the_caller_and_the_slot_works_on(make_slot):
    def fail(*_):
        raise ValueError("a bad expert")

    slot = make_slot()
    failed, good = slot.start(fail, *ROWS), slot.start(weighted, *ROWS)
    with pytest.raises(ValueError, match="a bad expert"):
        failed()
    assert good().tolist() == [[0, 1], [4, 6], [12, 15]]
    assert torch.equal(slot.start(weighted, *ROWS)(), good())


def test_each_slot_has_its_own_number_of_threads(make_slot):
    torch.set_num_threads(1)
    counts, barrier = {}, threading.Barrier(2)

    def compute(name):
        def compute(*tensors):
            barrier.wait(LONG_ENOUGH_S)
            counts.setdefault(name, []).append(torch.get_num_threads())
            return tensors[0]

        return compute

    slots = {"one": make_slot("one", num_threads=2), "two": make_slot("two", num_threads=3)}
    for _ in range(2):
        for finish in [slot.start(compute(name), *ROWS) for name, slot in slots.items()]:
            finish()
    assert counts == {"one": [2, 2], "two": [3, 3]}
    assert torch.get_num_threads() == 1, "the caller's own"


def test_a_closed_slot_has_given_up_its_thread(make_slot):
    slot = make_slot("closed")
    slot.start(weighted, *ROWS)()
    assert any(t.name.startswith("closed") for t in threading.enumerate())
    slot.close()
    assert not any(t.name.startswith("closed") for t in threading.enumerate())


def test_a_slot_that_nobody_needs_any_more_gives_up_its_thread():
    slot = ThreadSlot("forgotten", device=CPU, home=CPU, num_threads=1)
    slot.start(weighted, *ROWS)()
    (thread,) = [t for t in threading.enumerate() if t.name.startswith("forgotten")]
    gone = weakref.ref(slot)
    del slot
    gc.collect()
    assert gone() is None
    thread.join(LONG_ENOUGH_S)
    assert not thread.is_alive()


def test_the_first_slot_is_home_and_every_name_is_another():
    slots = make_slots([CPU, CPU, CPU], num_threads=1)
    assert [type(slot) for slot in slots] == [HomeSlot, ThreadSlot, ThreadSlot]
    assert [slot.name for slot in slots] == ["0:cpu", "1:cpu", "2:cpu"]
    assert {(slot.device, slot.home) for slot in slots} == {(CPU, CPU)}
    for slot in slots:
        slot.close()
