"""What was dropped, for the log: an attacker must not be able to fill the disk with it."""

import logging
import time


class DropLog:
    """Logs the first event of a kind at once, and then at most one line per interval and kind.

    Args:
        logger: Where the lines go.
        level: How bad the events are.
        interval_s: Shortest time between two lines of a kind.
    """

    def __init__(
        self, logger: logging.Logger, *, level: int = logging.WARNING, interval_s: float = 5.0
    ) -> None:
        self._logger = logger
        self._level = level
        self._interval_s = interval_s
        self._next_line: dict[str, float] = {}
        self._num_silent: dict[str, int] = {}

    def __call__(self, kind: str, detail: str = "") -> None:
        """Log an event.

        Args:
            kind: What happened; one of a few texts, since each is remembered.
            detail: More about this one.
        """
        now = time.monotonic()
        if now < self._next_line.get(kind, 0.0):
            self._num_silent[kind] = self._num_silent.get(kind, 0) + 1
            return
        self._next_line[kind] = now + self._interval_s
        num_silent = self._num_silent.pop(kind, 0)
        text = f"{kind}: {detail}" if detail else kind
        more = f" (and {num_silent} more before)" if num_silent else ""
        self._logger.log(self._level, "%s%s", text, more)
