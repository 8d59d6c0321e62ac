"""CommunicationTimes: the parts of every layer's time, added up over a rank's passes.

Traces are kept until the end of a batch and read then: on a GPU their events have passed by that
time, and nothing waits for them.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moe_lightning.dispatch import LayerTrace

PARTS = ("dispatch", "compute", "combine", "wait")
MAX_PENDING = 4096
"""Passes that are kept until they are read."""


@dataclass(slots=True)
class LayerTimes:
    """One layer, over all passes of this rank.

    Attributes:
        num_passes: How many they were.
        total_s: Seconds from beginning to end, less those in which another part of the batch was
            computed; measured apart from the four parts.
        dispatch_s: Seconds in which rows were sent on their way.
        compute_s: Seconds of this device's own experts, and of shared ones meanwhile.
        combine_s: Seconds in which sums were added up.
        wait_s: Seconds in which this device stood still for others.
        others_s: Seconds of work of other slots, as far as they say.
        handed_over_s: Seconds of waits in which another part of the batch was computed.
    """

    num_passes: int = 0
    total_s: float = 0.0
    dispatch_s: float = 0.0
    compute_s: float = 0.0
    combine_s: float = 0.0
    wait_s: float = 0.0
    others_s: float = 0.0
    handed_over_s: float = 0.0


class CommunicationTimes:
    """Times of one rank.

    Args:
        on_trace: Called with each trace that is read; None if nobody wants them.

    Attributes:
        layers: By layer.
        slots: Names of all slots that were seen, in their order.
        compute_s: Seconds of experts by layer and slot.
        wait_s: Seconds that this device waited for a slot, by layer and slot.
        links: Bytes by the two slots.
        under_way_s: Seconds in which rows or sums of a slot were on their way.
    """

    def __init__(self, on_trace: Callable[[LayerTrace], None] | None = None) -> None:
        self.layers: dict[int, LayerTimes] = defaultdict(LayerTimes)
        self.slots: list[str] = []
        self.compute_s: dict[tuple[int, str], float] = defaultdict(float)
        self.wait_s: dict[tuple[int, str], float] = defaultdict(float)
        self.links: dict[tuple[str, str], int] = defaultdict(int)
        self.under_way_s: dict[str, float] = defaultdict(float)
        self.on_trace = on_trace
        self._pending: list[LayerTrace] = []
        self._lock = threading.Lock()  # the parts of a batch may be in several threads

    def add(self, trace: LayerTrace) -> None:
        """Keep one pass of a layer."""
        with self._lock:
            self._pending.append(trace)
            if len(self._pending) >= MAX_PENDING:
                self._read(keep=MAX_PENDING // 2)  # a GPU may not have come to the latest

    def read(self) -> None:
        """Read what is kept."""
        with self._lock:
            self._read()

    def _read(self, *, keep: int = 0) -> None:
        end = len(self._pending) - keep
        passed, self._pending = self._pending[:end], self._pending[end:]
        for trace in passed:
            self._add_up(trace)
            if self.on_trace is not None:
                self.on_trace(trace)

    def _add_up(self, trace: LayerTrace) -> None:
        if trace.slots != tuple(self.slots):
            self.slots += [name for name in trace.slots if name not in self.slots]
        times, layer = self.layers[trace.layer], trace.layer
        times.num_passes += 1
        home, handed_over_s = trace.slots[trace.home], 0.0
        on_the_way_s: dict[str, float] = {}
        for span in trace.spans:
            seconds, part, slot = span.duration_s, span.part, span.slot
            if part == "compute":
                self.compute_s[layer, slot] += seconds
            if not span.is_home:
                times.others_s += seconds
                continue
            handed_over_s += span.handed_over_s
            if part == "compute":
                times.compute_s += seconds
            elif part == "wait":
                times.wait_s += seconds
                self.wait_s[layer, slot] += seconds
            elif part == "dispatch":
                times.dispatch_s += seconds
            else:
                times.combine_s += seconds
            if part in ("dispatch", "combine") or (part == "wait" and slot == home):
                on_the_way_s[slot] = on_the_way_s.get(slot, 0.0) + seconds
        times.handed_over_s += handed_over_s
        times.total_s += trace.end_s - trace.begin_s - handed_over_s
        for (source, target), num_bytes in trace.links.items():
            self.links[trace.slots[source], trace.slots[target]] += num_bytes
        if trace.links:
            said = {trace.slots[slot]: s for slot, s in trace.under_way_s.items()}
            for slot, seconds in (said or on_the_way_s).items():
                self.under_way_s[slot] += seconds


def matrix_of(links: dict[tuple[str, str], int], slots: Sequence[str]) -> list[list[int]]:
    """Bytes from each slot (a row) to each (a column)."""
    return [[links.get((source, target), 0) for target in slots] for source in slots]
