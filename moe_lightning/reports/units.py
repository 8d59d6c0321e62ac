"""Numbers as a person reads them."""

from collections.abc import Sequence


def in_bytes(number: float) -> str:
    """Bytes with a decimal prefix.

    >>> in_bytes(1_234_567)
    '1.23 MB'
    """
    return _scaled(number, 1000, ("B", "kB", "MB", "GB", "TB", "PB"))


def in_rate(bytes_per_s: float | None) -> str:
    """Bytes per second; nothing where it is not known.

    >>> in_rate(2.5e9)
    '2.50 GB/s'
    """
    return "" if not bytes_per_s else f"{in_bytes(bytes_per_s)}/s"


def in_seconds(seconds: float) -> str:
    """Seconds, milliseconds or microseconds, or minutes and hours.

    >>> in_seconds(0.00123), in_seconds(75), in_seconds(7260)
    ('1.23 ms', '1 min 15 s', '2 h 1 min')
    """
    if seconds >= 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"
    if seconds >= 60:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    if seconds >= 1 or seconds == 0:
        return f"{seconds:.3g} s"
    return _scaled(seconds * 1e9, 1000, ("ns", "µs", "ms"))


def in_percent(share: float | None) -> str:
    """A share as a percentage; nothing where it is not known.

    >>> in_percent(0.1234)
    '12.3 %'
    """
    return "" if share is None else f"{100 * share:.1f} %"


def _scaled(number: float, step: int, names: Sequence[str]) -> str:
    for name in names[:-1]:
        if abs(number) < step:
            return f"{number:.3g} {name}" if name in ("B", "ns") else f"{number:.2f} {name}"
        number /= step
    return f"{number:.2f} {names[-1]}"
