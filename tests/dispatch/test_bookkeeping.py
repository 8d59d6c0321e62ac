"""Traces: laps without a gap, links, and nothing at all while nobody looks."""

import time
from itertools import pairwise

import pytest
import torch

from moe_lightning.dispatch import RoutingLog

CPU = torch.device("cpu")
INDEX_TK = torch.tensor([[0, 1]])
WEIGHTS_TK = torch.ones(1, 2)


def open_trace(log, slots=("home", "away"), home=0):
    return log.open(3, 2, INDEX_TK, WEIGHTS_TK, slots=slots, home=home)


def test_laps_cover_a_pass_without_a_gap():
    log, traces = RoutingLog(), []
    log.subscribe(traces.append)
    trace = open_trace(log)
    for part, seconds in (("dispatch", 0.02), ("compute", 0.01), ("wait", 0.03), ("combine", 0)):
        time.sleep(seconds)
        trace.lap(part, 1)
    log.close(trace)
    spans = traces[0].spans
    assert [span.part for span in spans] == ["dispatch", "compute", "wait", "combine"]
    assert all(a.end_s == b.start_s for a, b in pairwise(spans))
    assert spans[2].duration_s == pytest.approx(0.03, abs=0.02)
    assert {span.slot for span in spans} == {"away"}


def test_time_that_was_handed_over_is_not_the_passes():
    log = RoutingLog()
    log.subscribe(lambda trace: None)
    trace = open_trace(log)
    time.sleep(0.05)
    trace.lap("wait", 1, handed_over_s=0.04)
    (span,) = trace.spans
    assert span.duration_s == pytest.approx(span.end_s - span.start_s - 0.04)


def test_bytes_go_to_a_slot_and_come_back():
    log = RoutingLog()
    log.subscribe(lambda trace: None)
    trace = open_trace(log, slots=("worker", "master"), home=1)
    trace.lap("dispatch", 0, num_bytes=10)
    trace.lap("dispatch", 0, num_bytes=5)
    trace.lap("combine", 0, num_bytes=7)
    trace.lap("dispatch", 1, num_bytes=99)  # to home itself: nothing moves
    assert trace.links == {(1, 0): 15, (0, 1): 7}


def test_what_others_do_stands_beside_the_laps():
    log = RoutingLog()
    log.subscribe(lambda trace: None)
    trace = open_trace(log)
    with trace.beside("compute", 1, CPU):
        time.sleep(0.01)
    trace.was_beside("compute", 1, end_s=8.0, duration_s=2.0)
    trace.lap("wait", 1)
    lap, first, second = trace.spans
    assert (lap.is_home, first.is_home, second.is_home) == (True, False, False)
    assert lap.start_s <= first.start_s <= first.end_s <= lap.end_s
    assert (second.start_s, second.end_s) == (6.0, 8.0)


def test_whoever_wants_no_times_costs_none():
    log, traces = RoutingLog(), []
    log.subscribe(traces.append, wants_times=False)
    trace = open_trace(log)
    trace.lap("dispatch", 1, num_bytes=3)
    log.close(trace)
    assert traces[0].spans == []
    assert traces[0].links == {(0, 1): 3}


def test_nothing_is_kept_while_nobody_looks():
    log = RoutingLog()
    trace = open_trace(log)
    trace.goes_to(INDEX_TK)
    trace.lap("dispatch", 1, num_bytes=3)
    trace.was_under_way(1, 0.1)
    log.close(trace)
    assert (trace.spans, trace.links, trace.slot_TK, trace.under_way_s) == ([], {}, None, {})


def test_pauses_may_be_nested():
    log, traces = RoutingLog(), []
    log.subscribe(traces.append)
    with log.paused():
        with log.paused():
            pass
        assert not log.is_read
    assert log.is_read
    log.unsubscribe(traces.append)
    assert not log.is_read


class Event:
    """What a GPU's event does, on a clock that the test turns."""

    now_ms = 0.0
    synchronised = 0

    def __init__(self, enable_timing=False):
        assert enable_timing, "without, nothing is timed"
        self.at_ms = None

    def record(self, stream):
        self.at_ms = Event.now_ms

    def synchronize(self):
        Event.synchronised += 1

    def elapsed_time(self, later):
        return later.at_ms - self.at_ms


def test_marks_of_a_gpu_are_events_that_are_read_later(monkeypatch):
    from moe_lightning.dispatch.timeline import Timeline

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    timeline, device = Timeline(), torch.device("cuda", 0)
    start = timeline.mark(device)
    Event.now_ms = 250.0
    end = timeline.mark(device)
    assert Event.synchronised == 1, "once for the device, when its first mark is made"
    seconds = timeline.seconds(end, device) - timeline.seconds(start, device)
    assert seconds == pytest.approx(0.25)
    assert abs(timeline.seconds(start, device) - time.perf_counter()) < 5, "on the host's clock"
