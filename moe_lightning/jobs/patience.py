"""Patience: a full disk is waited for."""

import sys
import time
from collections.abc import Callable
from typing import TypeVar

from moe_lightning.errors import StoppedError
from moe_lightning.files import is_disk_full

T = TypeVar("T")


class Patience:
    """Does something again while the disk is full, for a while.

    Args:
        wait_s: Seconds to wait for space in all.
        every_s: Seconds between tries.
        is_stopped: Asked while it waits; if true, it waits no longer.
        say: Tells the user.
    """

    def __init__(
        self,
        wait_s: float = 90.0,
        every_s: float = 5.0,
        *,
        is_stopped: Callable[[], bool] = lambda: False,
        say: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.wait_s = wait_s
        self.every_s = every_s
        self._is_stopped = is_stopped
        self._say = say or _to_stderr
        self._clock = clock
        self._sleep = sleep

    def __call__(self, act: Callable[[], T], where: str) -> T:
        """Do it.

        Args:
            act: What writes; what it has left half done it removes itself.
            where: The place, for messages.

        Returns:
            What it returns.

        Raises:
            StoppedError: If the disk stays full, or fails in another way.
        """
        end_s = self._clock() + self.wait_s
        has_said = False
        while True:
            try:
                result = act()
            except OSError as error:
                if not is_disk_full(error):
                    raise StoppedError(
                        f"{where}: writing failed ({error.strerror or error}). What was committed "
                        "before is safe; the same command continues."
                    ) from error
                if self._clock() >= end_s or self._is_stopped():
                    raise StoppedError(
                        f"{where}: the disk is full. What was committed before is safe; make room, "
                        "and the same command continues."
                    ) from error
                if not has_said:
                    self._say(
                        f"{where}: the disk is full. Waiting for space, up to {self.wait_s:.0f} s; "
                        "what was done before is safe."
                    )
                    has_said = True
                self._sleep_until(min(end_s, self._clock() + self.every_s))
            else:
                if has_said:
                    self._say(f"{where}: there is space again.")
                return result

    def _sleep_until(self, end_s: float) -> None:
        while not self._is_stopped() and (rest_s := end_s - self._clock()) > 0:
            self._sleep(min(rest_s, 0.2))


def _to_stderr(text: str) -> None:
    # A progress bar may be in the middle of the line.
    print(f"\n{text}", file=sys.stderr, flush=True)
