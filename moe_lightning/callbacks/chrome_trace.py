"""``communication_trace.json``: passes of some batches in Chrome's trace-event format.

It opens in Perfetto (https://ui.perfetto.dev) and in chrome://tracing. Every rank is a process, and
in it each slot a track; the parts of a batch that take turns have a track each. Clocks of different
hosts are brought together at each rank's first pass.
"""

import json
from pathlib import Path
from typing import Any

from moe_lightning.dispatch import LayerTrace
from moe_lightning.files import write_atomically

MAX_EVENTS = 50_000

Event = dict[str, Any]


class TraceEvents:
    """The events of one rank.

    Args:
        rank: Its number.
    """

    def __init__(self, rank: int) -> None:
        self.events: list[Event] = []
        self._rank = rank
        self._tracks: dict[tuple[str, int], int] = {}
        self._zero_s: float | None = None

    @property
    def is_full(self) -> bool:
        """Whether no more is taken."""
        return len(self.events) >= MAX_EVENTS

    def add(self, trace: LayerTrace) -> None:
        """Add a pass."""
        if self.is_full:
            return
        if self._zero_s is None:
            self._zero_s = trace.begin_s
            args = {"name": f"rank {self._rank}"}
            self.events.append({"ph": "M", "name": "process_name", "pid": self._rank, "args": args})
        home = trace.slots[trace.home]
        for span in trace.spans:
            who = home if span.is_home else span.slot
            name = span.part if span.slot == who else f"{span.part} {span.slot}"
            self.events.append(
                {
                    "ph": "X",
                    "name": name,
                    "cat": "moe",
                    "pid": self._rank,
                    "tid": self._track(who, trace.thread if span.is_home else 0),
                    "ts": round(1e6 * (span.start_s - self._zero_s), 3),
                    "dur": round(1e6 * (span.end_s - span.start_s), 3),
                    "args": {"layer": trace.layer, "bytes": span.num_bytes},
                }
            )

    def _track(self, slot: str, thread: int) -> int:
        key = (slot, thread)
        if key not in self._tracks:
            self._tracks[key] = len(self._tracks)
            same = sum(other == slot for other, _ in self._tracks)
            name = slot if same == 1 else f"{slot}, part {same}"
            self.events.append(
                {
                    "ph": "M",
                    "name": "thread_name",
                    "pid": self._rank,
                    "tid": self._tracks[key],
                    "args": {"name": name},
                }
            )
        return self._tracks[key]


def write_trace(path: Path, events: list[Event]) -> None:
    """Write events.

    Args:
        path: The file; its directory exists.
        events: Those of all ranks.
    """
    lines = ",\n".join(json.dumps(event) for event in events)
    write_atomically(path, f'{{"displayTimeUnit": "ms", "traceEvents": [\n{lines}\n]}}\n')
