"""What dispatchers write down while somebody looks, and nothing while nobody does.

Callbacks subscribe to a RoutingLog; each MoE layer's pass then gives them one LayerTrace. Tensors
in a trace stay on their device: reading them (a host synchronisation on CUDA) is the reader's
choice, once per interval.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Part = Literal["dispatch", "compute", "combine", "wait"]


@dataclass(slots=True)
class Span:
    """One part of a layer's pass on one slot.

    Attributes:
        part: Which of the four parts.
        slot: Device or worker that did it.
        start_s: Start on the monotonic clock.
        end_s: End on the monotonic clock. On CUDA this is when the work was queued, not when it
            ended.
        num_bytes: Bytes moved to or from the slot.
    """

    part: Part
    slot: str
    start_s: float
    end_s: float
    num_bytes: int


@dataclass(slots=True)
class LayerTrace:
    """One pass of one MoE layer.

    Attributes:
        layer: Decoder layer.
        num_experts: Logical experts of the layer.
        index_TK: Routed experts of the rows, padding excluded.
        weights_TK: Their router weights.
        spans: What was done where, and for how long.
    """

    layer: int
    num_experts: int
    index_TK: Tensor
    weights_TK: Tensor
    spans: list[Span] = field(default_factory=list)

    @contextmanager
    def span(self, part: Part, slot: str) -> Iterator[Span]:
        """Time a block as one part of the pass."""
        span = Span(part, slot, time.perf_counter(), 0.0, 0)
        yield span
        span.end_s = time.perf_counter()
        self.spans.append(span)


def maybe_span(
    trace: LayerTrace | None, part: Part, slot: str
) -> AbstractContextManager[Span | None]:
    """A span of the trace, or nothing while nobody looks."""
    return nullcontext() if trace is None else trace.span(part, slot)


TraceReader = Callable[[LayerTrace], None]


class RoutingLog:
    """Hands each layer's trace to whoever subscribed."""

    def __init__(self) -> None:
        self._readers: list[TraceReader] = []
        self._is_paused = False

    @property
    def is_read(self) -> bool:
        """Whether anybody subscribed; dispatchers skip all bookkeeping otherwise."""
        return bool(self._readers) and not self._is_paused

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing during the block: its rows are nobody's."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def subscribe(self, reader: TraceReader) -> None:
        """Call ``reader`` with every trace from now on."""
        self._readers.append(reader)

    def unsubscribe(self, reader: TraceReader) -> None:
        """Stop calling ``reader``."""
        self._readers.remove(reader)

    def publish(self, trace: LayerTrace) -> None:
        """Give the trace to every reader, in the order of subscription."""
        for reader in self._readers:
            reader(trace)
