"""Timeline: when things happened, on clocks that can be compared, without waiting for a device.

On the host a mark is the monotonic clock. On a GPU it is an event on the current stream, which is
read once it has passed: the work between two marks is timed, not how long it took to queue it. Each
GPU's events are brought to the host's clock by one event that is waited for when the first mark is
made there.

Nothing here has been run on a GPU yet.
"""

import time
from typing import Any

import torch

Mark = float | torch.Event
"""A moment; what it is in seconds is asked of the timeline that made it."""


class Timeline:
    """Makes marks and reads them."""

    def __init__(self) -> None:
        self._bases: dict[torch.device, tuple[Any, float]] = {}

    def mark(self, device: torch.device) -> Mark:
        """Mark this moment of the device's current stream.

        Args:
            device: Where the work is done.

        Returns:
            The mark; nothing is waited for, but at the first mark of a GPU.
        """
        if device.type != "cuda":
            return time.perf_counter()
        if device not in self._bases:
            base = self._event(device)
            base.synchronize()
            self._bases[device] = base, time.perf_counter()
        mark: Mark = self._event(device)
        return mark

    def seconds(self, mark: Mark, device: torch.device) -> float:
        """Read a mark.

        Args:
            mark: A mark of this timeline.
            device: The device that it was made for.

        Returns:
            Seconds on the host's monotonic clock. An event that has not passed is waited for.
        """
        if isinstance(mark, float):
            return mark
        base, base_s = self._bases[device]
        mark.synchronize()
        return base_s + float(base.elapsed_time(mark)) / 1e3

    def _event(self, device: torch.device) -> Any:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        return event
