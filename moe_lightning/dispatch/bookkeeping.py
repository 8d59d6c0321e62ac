"""What dispatchers write down while somebody looks, and nothing while nobody does.

Callbacks subscribe to a RoutingLog; each MoE layer's pass then gives them one LayerTrace. Its laps
cover the pass on the device of the rows without a gap; what other slots do stands beside them:

    home     │ dispatch ▸ 1 │ ▸ 2 │ compute │ wait for 1 │ combine │ wait for 2 │ combine │
    slot 1                  │ compute                    │
    slot 2                        │ compute                                     │

Tensors and marks in a trace stay on their device: reading them (a host synchronisation on CUDA) is
the reader's choice, once per interval.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moe_lightning.dispatch.timeline import Mark, Timeline

Part = Literal["dispatch", "compute", "combine", "wait"]


@dataclass(slots=True)
class Span:
    """One part of a layer's pass for one slot.

    Attributes:
        part: Which of the four parts.
        slot: Device, worker or rank that did it, or that it was done for.
        start_s: Start on the monotonic clock.
        end_s: End on the monotonic clock.
        num_bytes: Bytes moved to or from the slot.
        is_home: Whether the device of the rows was busy with it; otherwise the slot was, meanwhile.
        handed_over_s: Seconds of a wait in which that device computed another part of the batch.
    """

    part: Part
    slot: str
    start_s: float
    end_s: float
    num_bytes: int = 0
    is_home: bool = True
    handed_over_s: float = 0.0

    @property
    def duration_s(self) -> float:
        """Seconds of the pass itself."""
        return self.end_s - self.start_s - self.handed_over_s


class LayerTrace:
    """One pass of one MoE layer.

    Args:
        layer: Decoder layer.
        num_experts: Logical experts of the layer.
        index_TK: Routed experts of the rows, padding excluded.
        weights_TK: Their router weights.
        slots: Names of all slots of the layer.
        home: Number of the slot that the rows come from.
        timeline: Who marks time; None if nobody wants to know.

    Attributes:
        slot_TK: Number of the slot that computes each pair; None if one slot has all experts.
        links: Bytes that went from one slot to another, by their numbers.
        under_way_s: Seconds that rows to a slot and sums from it were on their way.
        thread: The thread of the pass; the parts of an interleaved batch have one each.
    """

    def __init__(
        self,
        layer: int,
        num_experts: int,
        index_TK: Tensor,
        weights_TK: Tensor,
        *,
        slots: tuple[str, ...],
        home: int = 0,
        timeline: Timeline | None = None,
    ) -> None:
        self.layer = layer
        self.num_experts = num_experts
        self.index_TK = index_TK
        # A trace may outlive the pass, and must not keep its graph.
        self.weights_TK = weights_TK.detach() if weights_TK.requires_grad else weights_TK
        self.slots = slots
        self.home = home
        self.slot_TK: Tensor | None = None
        self.links: dict[tuple[int, int], int] = {}
        self.under_way_s: dict[int, float] = {}
        self.thread = threading.get_ident()
        self._timeline = timeline
        self._device = index_TK.device
        self._begin: Mark = 0.0 if timeline is None else timeline.mark(self._device)
        self._end: Mark = self._begin
        self._laps: list[tuple[Part, int, Mark, int, float]] = []
        self._beside: list[tuple[Part, int, torch.device, Mark, Mark]] = []

    def goes_to(self, slot_TK: Tensor) -> None:
        """Note which slot computes each pair; see ``slot_TK``."""
        self.slot_TK = slot_TK

    def lap(self, part: Part, slot: int, *, num_bytes: int = 0, handed_over_s: float = 0.0) -> None:
        """Say what the device of the rows has done since the last lap.

        Args:
            part: Which part it was.
            slot: The slot that it was done for.
            num_bytes: Bytes that went to the slot (dispatch) or came from it.
            handed_over_s: Seconds in which the device computed another part of the batch.
        """
        if self._timeline is not None:
            mark = self._timeline.mark(self._device)
            self._laps.append((part, slot, mark, num_bytes, handed_over_s))
        if num_bytes and slot != self.home:
            there, back = (self.home, slot), (slot, self.home)
            self.moved(*(there if part == "dispatch" else back), num_bytes)

    def moved(self, source: int, target: int, num_bytes: int) -> None:
        """Count bytes that went from slot to slot."""
        self.links[source, target] = self.links.get((source, target), 0) + num_bytes

    def was_under_way(self, slot: int, seconds: float) -> None:
        """Count seconds in which rows or sums were on their way to or from a slot."""
        self.under_way_s[slot] = self.under_way_s.get(slot, 0.0) + seconds

    @contextmanager
    def beside(self, part: Part, slot: int, device: torch.device) -> Iterator[None]:
        """Time what another slot does meanwhile; for the thread that does it."""
        if self._timeline is None:
            yield
            return
        start = self._timeline.mark(device)
        yield
        self._beside.append((part, slot, device, start, self._timeline.mark(device)))

    def was_beside(self, part: Part, slot: int, *, end_s: float, duration_s: float) -> None:
        """Note what another slot says it did."""
        host = torch.device("cpu")
        self._beside.append((part, slot, host, end_s - duration_s, end_s))

    def end(self) -> None:
        """Say that the pass is over."""
        if self._timeline is not None:
            self._end = self._timeline.mark(self._device)

    @property
    def begin_s(self) -> float:
        """When the pass began, on the monotonic clock."""
        return 0.0 if self._timeline is None else self._timeline.seconds(self._begin, self._device)

    @property
    def end_s(self) -> float:
        """When the pass was over."""
        return 0.0 if self._timeline is None else self._timeline.seconds(self._end, self._device)

    @property
    def spans(self) -> list[Span]:
        """Everything that was timed; the pass must be over. The laps come first, in their order."""
        if self._timeline is None:
            return []
        spans, before_s = [], self._timeline.seconds(self._begin, self._device)
        for part, slot, mark, num_bytes, handed_over_s in self._laps:
            now_s = self._timeline.seconds(mark, self._device)
            name = self.slots[slot]
            spans.append(Span(part, name, before_s, now_s, num_bytes, True, handed_over_s))
            before_s = now_s
        for part, slot, device, start, end in self._beside:
            start_s = self._timeline.seconds(start, device)
            end_s = self._timeline.seconds(end, device)
            spans.append(Span(part, self.slots[slot], start_s, end_s, is_home=False))
        return spans


class _NoTrace(LayerTrace):
    """What dispatchers write into while nobody looks."""

    def __init__(self) -> None:
        nothing = torch.empty(0, 0, dtype=torch.int64)
        super().__init__(-1, 0, nothing, nothing, slots=())

    def goes_to(self, slot_TK: Tensor) -> None:
        pass

    def lap(self, part: Part, slot: int, *, num_bytes: int = 0, handed_over_s: float = 0.0) -> None:
        pass

    def moved(self, source: int, target: int, num_bytes: int) -> None:
        pass

    def was_under_way(self, slot: int, seconds: float) -> None:
        pass

    def was_beside(self, part: Part, slot: int, *, end_s: float, duration_s: float) -> None:
        pass


_NO_TRACE = _NoTrace()

TraceReader = Callable[[LayerTrace], None]


class RoutingLog:
    """Hands each layer's trace to whoever subscribed."""

    def __init__(self) -> None:
        self._readers: list[TraceReader] = []
        self._timed: list[TraceReader] = []
        self._is_paused = False
        self._timeline = Timeline()

    @property
    def is_read(self) -> bool:
        """Whether anybody subscribed; nothing is written down otherwise."""
        return bool(self._readers) and not self._is_paused

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing during the block: its rows are nobody's."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def subscribe(self, reader: TraceReader, *, wants_times: bool = True) -> None:
        """Call ``reader`` with every trace from now on.

        Args:
            reader: Who looks; called in the thread of the pass, right after it.
            wants_times: Whether it looks at spans.
        """
        self._readers.append(reader)
        if wants_times:
            self._timed.append(reader)

    def unsubscribe(self, reader: TraceReader) -> None:
        """Stop calling ``reader``."""
        self._readers.remove(reader)
        if reader in self._timed:
            self._timed.remove(reader)

    def open(
        self,
        layer: int,
        num_experts: int,
        index_TK: Tensor,
        weights_TK: Tensor,
        *,
        slots: tuple[str, ...],
        home: int = 0,
    ) -> LayerTrace:
        """Begin the trace of a pass; the arguments are those of :class:`LayerTrace`."""
        if not self.is_read:
            return _NO_TRACE
        timeline = self._timeline if self._timed else None
        return LayerTrace(
            layer, num_experts, index_TK, weights_TK, slots=slots, home=home, timeline=timeline
        )

    def close(self, trace: LayerTrace) -> None:
        """End a pass: give its trace to every reader, in the order of subscription."""
        if trace is not _NO_TRACE:
            trace.end()
            for reader in tuple(self._readers):
                reader(trace)
