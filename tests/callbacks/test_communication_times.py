"""Times of passes added up: by hand, of one process and of ranks."""

import json

import pytest
import torch

from moe_lightning.callbacks.chrome_trace import TraceEvents, write_trace
from moe_lightning.callbacks.communication_picture import draw_communication
from moe_lightning.callbacks.communication_summary import NUMBERS, CommunicationSummary
from moe_lightning.callbacks.communication_times import CommunicationTimes, LayerTimes
from moe_lightning.dispatch import LayerTrace
from moe_lightning.dispatch.timeline import Timeline

INDEX_TK = torch.tensor([[0, 1]])


class Clock(Timeline):
    """A clock that the test turns."""

    def __init__(self):
        super().__init__()
        self.now_s = 100.0

    def mark(self, device):
        return self.now_s


def make_trace(clock, laps, *, layer=3, slots=("home", "away", "late"), beside=(), home=0):
    """A pass of laps (part, slot, seconds, bytes, handed over)."""
    trace = LayerTrace(layer, 2, INDEX_TK, INDEX_TK.float(), slots=slots, home=home, timeline=clock)
    for part, slot, seconds, num_bytes, handed_over_s in laps:
        clock.now_s += seconds
        trace.lap(part, slot, num_bytes=num_bytes, handed_over_s=handed_over_s)
    for slot, end_s, duration_s in beside:
        trace.was_beside("compute", slot, end_s=100 + end_s, duration_s=duration_s)
    clock.now_s += 0.001  # after the last lap
    trace.end()
    return trace


LAPS = (
    ("dispatch", 1, 1.0, 100, 0.0),
    ("dispatch", 2, 2.0, 50, 0.0),
    ("compute", 0, 4.0, 0, 0.0),
    ("wait", 1, 0.5, 0, 0.0),
    ("combine", 1, 0.25, 10, 0.0),
    ("wait", 2, 8.0, 0, 3.0),
    ("combine", 2, 0.25, 5, 0.0),
)


def summary_of(*traces, wall_s=20.0, link=None):
    times = CommunicationTimes()
    for trace in traces:
        times.add(trace)
    times.read()
    return CommunicationSummary.of_process(times, wall_s=wall_s, link_bytes_per_s=link)


def test_a_pass_by_hand():
    trace = make_trace(Clock(), LAPS, beside=[(1, 7.5, 6.0), (2, 15.0, 11.0)])
    summary = summary_of(trace, link=100.0)
    layer = summary.layers[3]
    times = layer.times
    assert (times.dispatch_s, times.compute_s, times.wait_s, times.combine_s) == (3, 4, 5.5, 0.5)
    assert times.total_s == pytest.approx(13.001)
    assert layer.exposed_s == 9
    assert layer.overlapped_s == 17 - 5.5, "of 17 s of others' work, 5.5 were waited for"
    assert layer.compute_s_by_slot == [4, 6, 11]
    assert layer.wait_s_by_slot == [0, 0.5, 5]
    assert summary.waited_for() == {"slot": "late", "wait_s": 5.0, "share": round(5 / 5.5, 4)}
    assert summary.links == [[0, 100, 50], [10, 0, 0], [5, 0, 0]]
    # On its way to and from slot 1: dispatch and combine, 1.25 s; slot 2: 2.25 s.
    rates = summary.rates()
    assert rates[0] == pytest.approx([0, 80, 50 / 2.25], abs=0.1)
    content = json.loads(summary.to_json())
    assert content["link_fraction"][0][1] == pytest.approx(0.8)
    assert content["layers"]["3"]["exposed_s"] == 9
    assert "most waited for: late (91 %)" in summary.verdict()


def test_passes_and_layers_add_up():
    clock = Clock()
    traces = [make_trace(clock, LAPS, layer=layer) for layer in (5, 3, 3)]
    summary = summary_of(*traces)
    assert list(summary.layers) == [3, 5]
    assert [each.times.num_passes for each in summary.layers.values()] == [2, 1]
    assert summary.total.compute_s == 12
    assert summary.links[0] == [0, 300, 150]


def test_in_a_long_batch_only_passes_of_long_ago_are_read(monkeypatch):
    """Reading one that a GPU has not come to would wait for the GPU."""
    from moe_lightning.callbacks import communication_times

    monkeypatch.setattr(communication_times, "MAX_PENDING", 4)
    times, clock = CommunicationTimes(), Clock()
    for layer in range(5):
        times.add(make_trace(clock, LAPS, layer=layer))
    assert sorted(times.layers) == [0, 1]
    times.read()
    assert sorted(times.layers) == [0, 1, 2, 3, 4]
    assert {each.num_passes for each in times.layers.values()} == {1}


def test_what_workers_say_was_under_way_counts():
    trace = make_trace(Clock(), LAPS)
    trace.was_under_way(1, 2.0)
    assert summary_of(trace).rates()[0][1] == 50


def test_nothing_at_all_is_said_to_be_nothing():
    summary = summary_of()
    assert summary.waited_for() is None
    assert summary.verdict() == "no MoE layer was computed"
    assert json.loads(summary.to_json())["layers"] == {}


def ranks(*, waits, num_passes=(10, 10, 10)):
    numbers_WLN = torch.zeros(3, 1, len(NUMBERS), dtype=torch.float64)
    for rank, (wait_s, passes) in enumerate(zip(waits, num_passes, strict=True)):
        times = LayerTimes(passes, 8.0, 1.0, 4.0, 1.0, wait_s)
        numbers_WLN[rank, 0] = torch.tensor([getattr(times, name) for name in NUMBERS])
    links_WWW = torch.zeros(3, 3, 3)
    links_WWW[0, 0, 1] = links_WWW[1, 1, 0] = 40
    return CommunicationSummary.of_ranks(
        numbers_WLN,
        links_WWW,
        torch.tensor([2.0, 4.0, 0.0]),
        [7],
        wall_s=10.0,
        link_bytes_per_s=None,
        sharding=None,
    )


def test_the_rank_that_waits_least_is_waited_for():
    summary = ranks(waits=(5.0, 1.0, 6.0))
    assert summary.layers[7].times.wait_s == 4
    assert summary.waited_for() == {"slot": "rank 1", "wait_s": 3.0, "share": 0.75}
    assert summary.links == [[0, 40, 0], [40, 0, 0], [0, 0, 0]]
    assert summary.rates()[0][1] == pytest.approx(40 / 3, abs=0.1)


def test_ranks_that_wait_alike_wait_for_nobody():
    summary = ranks(waits=(2.0, 2.0, 2.0))
    assert summary.waited_for() is None
    assert "waited for" not in summary.verdict()


def test_ranks_without_passes_do_not_count():
    summary = ranks(waits=(2.0, 0.0, 4.0), num_passes=(10, 0, 10))
    assert summary.layers[7].times.wait_s == 3
    assert summary.waited_for()["slot"] == "rank 0"


def test_a_trace_for_perfetto(tmp_path):
    events = TraceEvents(rank=2)
    clock = Clock()
    events.add(make_trace(clock, LAPS, beside=[(1, 7.5, 6.0)]))
    write_trace(tmp_path / "trace.json", events.events)
    written = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    tracks = {e["tid"]: e["args"]["name"] for e in written if e["name"] == "thread_name"}
    assert sorted(tracks.values()) == ["away", "home"]
    assert {e["pid"] for e in written} == {2}
    spans = [e for e in written if e["ph"] == "X"]
    first, *_, last = spans
    assert (first["name"], first["ts"], first["dur"]) == ("dispatch away", 0.0, 1e6)
    assert first["args"] == {"layer": 3, "bytes": 100}
    assert tracks[first["tid"]] == "home"
    assert (last["name"], tracks[last["tid"]], last["dur"]) == ("compute", "away", 6e6)


def test_a_trace_is_bounded(monkeypatch):
    from moe_lightning.callbacks import chrome_trace

    monkeypatch.setattr(chrome_trace, "MAX_EVENTS", 20)
    events, clock = TraceEvents(rank=0), Clock()
    for _ in range(10):
        events.add(make_trace(clock, LAPS))
    assert events.is_full
    assert len(events.events) < 20 + 10


@pytest.mark.parametrize(("num_layers", "num_slots"), [(3, 2), (60, 16), (4, 1)])
def test_pictures(num_layers, num_slots, tmp_path):
    clock, times = Clock(), CommunicationTimes()
    slots = tuple(f"{n}:cuda:{n}" for n in range(num_slots))
    for layer in range(num_layers):
        laps = [("compute", 0, 1e-4 * (layer + 1), 0, 0.0)]
        laps += [("wait", slot, 1e-5 * slot, 0, 0.0) for slot in range(1, num_slots)]
        times.add(make_trace(clock, laps, layer=layer, slots=slots))
    times.read()
    summary = CommunicationSummary.of_process(times, wall_s=1.0, link_bytes_per_s=None)
    path = tmp_path / "picture.png"
    draw_communication(path, summary)
    assert path.read_bytes().startswith(b"\x89PNG")
