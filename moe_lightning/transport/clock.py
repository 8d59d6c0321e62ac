"""Time as a thread lives through it, for deadlines that its own sleep must not break."""

import time


class AwakeClock:
    """Seconds a listening thread was awake: a gap in its rounds counts as one round at most.

    A process that was suspended, or whose interpreter was held by something else, hears everybody
    late. By this clock, nobody else is blamed for that.

    Args:
        round_s: The longest that a round of the thread's loop takes when nothing is in its way.
    """

    def __init__(self, round_s: float) -> None:
        self.now_s = 0.0
        self._round_s = round_s
        self._last = time.monotonic()

    def tick(self) -> None:
        """Begin a round."""
        now = time.monotonic()
        self.now_s += min(now - self._last, self._round_s)
        self._last = now
