"""A slow link between two network namespaces of this machine: a delay, and a rate each way.

    python scripts/link.py --delay_ms 1 --rate_gbit 1        # builds one, measures it, removes it

    with Link(delay_ms=1.0, rate_gbit=1.0) as link:
        worker = link.popen_in("b", ["python", "-m", "moe_lightning", "worker", ...])
        link.run_in("a", ["python", "-m", "moe_lightning", "predict", ...])

    ┌ namespace a ─┐        ┌─ link_shuttle.py ─┐        ┌ namespace b ─┐
    │ 10.77.0.1    │──TUN──▶│ queue, delay,rate │──TUN──▶│    10.77.0.2 │
    └──────────────┘◀───────│                   │◀───────└──────────────┘

It needs root and Linux, but no netem, which some kernels lack. Packets are large, so that a Python
process can carry a gigabit per second. A connection's first messages therefore don't grow step by
step as they do with small packets: it is a link of exactly this delay and rate, no worse.
"""

import fcntl
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal

from jsonargparse import CLI
from link_shuttle import remove_namespace

End = Literal["a", "b"]
ADDRESSES: dict[End, str] = {"a": "10.77.0.1", "b": "10.77.0.2"}
DEVICE = "link0"
TUN = Path("/dev/net/tun")
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
SHUTTLE, PROBE = (Path(__file__).with_name(f"link_{name}.py") for name in ("shuttle", "probe"))
PROBE_PORT = 7777
Command = Callable[[Sequence[object]], list[str]]
numbers = count()


class Link:
    """Two network namespaces with nothing but each other. Everything in them ends with the link.

    Args:
        delay_ms: Time that a packet is on its way, in milliseconds; the round trip takes twice as
            long.
        rate_gbit: Gigabits per second, each way.
        queue_ms: Packets that would wait longer than this to leave are dropped, as a switch does.
        mtu: Bytes of the largest packet.
    """

    def __init__(
        self,
        *,
        delay_ms: float = 1.0,
        rate_gbit: float = 1.0,
        queue_ms: float = 50.0,
        mtu: int = 65000,
    ) -> None:
        self.delay_ms, self.rate_gbit, self.queue_ms, self.mtu = delay_ms, rate_gbit, queue_ms, mtu
        name = f"moe-link-{os.getpid()}-{next(numbers)}"
        self.namespaces: dict[End, str] = {end: f"{name}-{end}" for end in ADDRESSES}
        self._shuttle: subprocess.Popen[str] | None = None

    @staticmethod
    def available() -> str | None:
        """Why there can be no link here, or None if there can."""
        if sys.platform != "linux":
            return "network namespaces are a thing of Linux"
        if os.geteuid() != 0:
            return "network namespaces need root"
        if not TUN.exists():
            return f"there is no {TUN}"
        try:
            Link._ip("-V")
            with Link():
                pass
        except (OSError, subprocess.CalledProcessError) as error:
            return f"a network namespace cannot be made: {getattr(error, 'stderr', '') or error}"
        return None

    @staticmethod
    def address(end: End) -> str:
        """The address of one end."""
        return ADDRESSES[end]

    def __enter__(self) -> "Link":
        _remove_stale()
        opened: list[int] = []
        try:
            for end in ADDRESSES:
                opened.append(self._make_end(end))
            self._start_shuttle(opened)
        except BaseException:
            self.__exit__()
            raise
        finally:
            for tun in opened:  # the shuttle has them
                os.close(tun)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> dict[str, Any]:
        """Kill what runs at either end, and remove the link.

        Returns:
            What the shuttle says of its time: the share of a core that it took, and packets, bytes,
            drops and mean lateness of each way.
        """
        report: dict[str, Any] = {}
        if self._shuttle is not None:
            out, _ = self._shuttle.communicate()  # the end of its input is its end
            report = json.loads(out) if out else {}
            self._shuttle = None
        for name in self.namespaces.values():
            remove_namespace(name)
        return report

    def command(self, end: End, argv: Sequence[object]) -> list[str]:
        """The command line that runs a command at one end."""
        return ["ip", "netns", "exec", self.namespaces[end], *map(str, argv)]

    def popen_in(self, end: End, argv: Sequence[object], **options: Any) -> subprocess.Popen[Any]:
        """Start a process at one end; it has the pid that Popen says."""
        return subprocess.Popen(self.command(end, argv), **options)

    def run_in(
        self, end: End, argv: Sequence[object], **options: Any
    ) -> subprocess.CompletedProcess[Any]:
        """Run a command at one end."""
        return subprocess.run(self.command(end, argv), **options)

    def set_down(self, end: End = "b") -> None:
        """Pull the plug: nothing leaves that end or arrives there, and nobody is told."""
        self._ip("-n", self.namespaces[end], "link", "set", DEVICE, "down")

    def set_up(self, end: End = "b") -> None:
        """Plug it in again."""
        self._ip("-n", self.namespaces[end], "link", "set", DEVICE, "up")

    def _make_end(self, end: End) -> int:
        name = self.namespaces[end]
        self._ip("netns", "add", name)
        tun = os.open(TUN, os.O_RDWR | os.O_CLOEXEC)
        try:
            # The kernel numbers it; the name it gets in its namespace is for all links the same.
            request = struct.pack("16sH22x", b"moetun%d", IFF_TUN | IFF_NO_PI)
            made = fcntl.ioctl(tun, TUNSETIFF, request)[:16].rstrip(b"\0").decode()
            self._ip("link", "set", made, "netns", name, "name", DEVICE)
            for setting in (
                f"link set {DEVICE} mtu {self.mtu} addrgenmode none",
                f"addr add {ADDRESSES[end]}/24 dev {DEVICE}",
                f"link set {DEVICE} up",
                "link set lo up",
            ):
                self._ip("-n", name, *setting.split())
        except BaseException:
            os.close(tun)
            raise
        return tun

    def _start_shuttle(self, ends: Sequence[int]) -> None:
        settings = {
            "--delay_s": self.delay_ms / 1e3,
            "--bytes_per_s": self.rate_gbit * 1e9 / 8,
            "--queue_s": self.queue_ms / 1e3,
        }
        options = [str(part) for setting in settings.items() for part in setting]
        options += ["--ends", *map(str, ends), "--namespaces", *self.namespaces.values()]
        self._shuttle = subprocess.Popen(
            [sys.executable, "-I", SHUTTLE, *options],
            pass_fds=ends,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the parent, whose end it then sees
        )

    @staticmethod
    def _ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def _remove_stale() -> None:
    """Remove the namespaces of processes that were killed together with their shuttles."""
    for path in Path("/run/netns").glob("moe-link-*"):
        if not Path("/proc", path.name.split("-")[2]).exists():
            remove_namespace(path.name)


def probe(link: Link, *, seconds: float) -> dict[str, float]:
    """Measure a link with plain TCP (see :func:`probe_between`)."""
    return probe_between(
        partial(link.command, "a"),
        partial(link.command, "b"),
        address=link.address("b"),
        port=PROBE_PORT,
        seconds=seconds,
    )


def probe_between(
    asking: Command, serving: Command, *, address: str, port: int, seconds: float
) -> dict[str, float]:
    """Measure what there is between two places with plain TCP.

    Args:
        asking: Makes the command line that runs a command at one end.
        serving: The same for the other end.
        address: An address of the other end.
        port: A port that is free there.
        seconds: How long each stream lasts.

    Returns:
        Round trips in milliseconds and rates in gigabits per second, as link_probe.py names them.
    """
    python = [sys.executable, "-I", PROBE, "--address", address, "--port", port]
    server = subprocess.Popen(serving([*python, "--serve"]))
    try:
        argv = asking([*python, "--seconds", seconds])
        done = subprocess.run(argv, capture_output=True, text=True, check=True)
    finally:
        server.kill()
        server.wait()
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main(
    delay_ms: float = 1.0, rate_gbit: float = 1.0, mtu: int = 65000, seconds: float = 2.0
) -> None:
    """Build a link, measure it, and remove it.

    Args:
        delay_ms: Milliseconds each way.
        rate_gbit: Gigabits per second each way.
        mtu: Bytes of the largest packet.
        seconds: How long each stream lasts.
    """
    if (reason := Link.available()) is not None:
        sys.exit(f"error: no link can be made: {reason}.")
    link = Link(delay_ms=delay_ms, rate_gbit=rate_gbit, mtu=mtu)
    with link:
        found = probe(link, seconds=seconds)
        shuttle = link.close()
    print(f"asked for: round trip {2 * delay_ms:g} ms, {rate_gbit:g} Gbit/s each way")
    for name, value in found.items():
        print(f"  {name:<22}{value:8.3f}")
    print(f"  share of a core that the shuttle took: {shuttle['cpu']:.0%}")
    for way in ("there", "back"):
        told = shuttle[way]
        print(
            f"  {way:<6}{told['packets']:>8,} packets, {told['bytes'] / 1e6:,.0f} MB, "
            f"{told['dropped']} dropped, {told['late_us']:.0f} us late on average"
        )


if __name__ == "__main__":
    CLI(main, as_positional=False)
