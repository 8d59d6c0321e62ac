"""StopRequest: the first Ctrl-C asks a run to end in good order, the second one ends it."""

import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# torchrun passes a terminal's Ctrl-C on to ranks that have had it already.
_REPEAT_S = 1.0


class StopRequest:
    """Notes SIGINT and SIGTERM between `install` and `restore`.

    Args:
        pass_on: Called with a first SIGTERM, which reaches one process only; a terminal's Ctrl-C
            reaches all.

    Attributes:
        is_made: Whether somebody wants the run to end.
    """

    def __init__(self, pass_on: Callable[[int], None] = lambda _: None) -> None:
        self.is_made = False
        self._pass_on = pass_on
        self._made_s = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Note signals from now on; does nothing outside of the main thread."""
        if threading.current_thread() is threading.main_thread() and not self._before:
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}

    def restore(self) -> None:
        """Give signals back to who had them."""
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if not self.is_made:
            self.is_made, self._made_s = True, time.monotonic()
            # A progress bar may be in the middle of the line.
            print(
                "\nstopping after the batch in flight; Ctrl-C again stops at once.",
                file=sys.stderr,
                flush=True,
            )
            if number == signal.SIGTERM:
                self._pass_on(number)
        elif time.monotonic() - self._made_s > _REPEAT_S:
            raise KeyboardInterrupt
