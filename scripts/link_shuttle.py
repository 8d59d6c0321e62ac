"""The process between the two ends of a Link: carries packets across, late and at a limited rate.

    TUN of a ── read ──▶ queue: due = when sent + delay ── write ──▶ TUN of b      and back

Started by link.py, which gives it both TUN devices as open files. It imports nothing but the
standard library, does two system calls a packet, and ends when its parent does (its stdin closes).
"""

import argparse
import gc
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field

SPIN_S = 20e-6  # sleeping is late by about as much on a virtual machine
LARGEST_PACKET = 65535


@dataclass(slots=True)
class Direction:
    """One way across: packets leave one after the other, and arrive a delay later.

    Attributes:
        source: The TUN device to read from.
        target: The TUN device to write to.
        s_per_byte: Time that a byte takes to leave.
        delay_s: Time from leaving to arriving.
        longest_queue_s: Packets that would have to wait longer to leave are dropped.
        free_s: When the last packet has left.
        flying: Packets on the way, and when they are due.
    """

    source: int
    target: int
    s_per_byte: float
    delay_s: float
    longest_queue_s: float
    free_s: float = 0.0
    flying: deque[tuple[float, bytes]] = field(default_factory=deque)
    num_packets: int = 0
    num_bytes: int = 0
    num_dropped: int = 0
    sum_late_s: float = 0.0

    def take(self, now_s: float) -> None:
        """Read one packet."""
        try:
            packet = os.read(self.source, LARGEST_PACKET)
        except OSError:  # nothing there, or that end is down
            return
        if self.free_s - now_s > self.longest_queue_s:
            self.num_dropped += 1
            return
        self.free_s = max(now_s, self.free_s) + len(packet) * self.s_per_byte
        self.flying.append((self.free_s + self.delay_s, packet))

    def deliver(self, now_s: float) -> None:
        """Write the packets that are due."""
        while self.flying and self.flying[0][0] <= now_s:
            due_s, packet = self.flying.popleft()
            try:
                os.write(self.target, packet)
            except OSError:  # that end is down
                self.num_dropped += 1
                continue
            self.num_packets += 1
            self.num_bytes += len(packet)
            self.sum_late_s += now_s - due_s

    def report(self) -> dict[str, float]:
        """What went across."""
        return {
            "packets": self.num_packets,
            "bytes": self.num_bytes,
            "dropped": self.num_dropped,
            "late_us": 1e6 * self.sum_late_s / max(1, self.num_packets),
        }


def carry(there: Direction, back: Direction) -> None:
    """Carry packets until the parent is gone."""
    directions = {there.source: there, back.source: back}
    sources = [*directions, 0]
    clock = time.monotonic
    while True:
        dues_s = [each.flying[0][0] for each in (there, back) if each.flying]
        wait_s = max(0.0, min(dues_s) - clock() - SPIN_S) if dues_s else None
        readable, _, _ = select.select(sources, [], [], wait_s)
        if 0 in readable and not os.read(0, 1):
            return
        for source in readable:
            if source:
                directions[source].take(clock())
        for each in (there, back):
            each.deliver(clock())


def remove_namespace(name: str) -> None:
    """Kill everything that runs in a network namespace, and remove it."""
    listed = subprocess.run(
        ["ip", "netns", "pids", name], capture_output=True, text=True, check=False
    )
    for pid in map(int, listed.stdout.split()):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def main() -> None:
    """Carry packets, then remove the namespaces and say what was carried."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ends", type=int, nargs=2, help="Open TUN devices.")
    parser.add_argument("--delay_s", type=float, help="One way.")
    parser.add_argument("--bytes_per_s", type=float, help="Each way.")
    parser.add_argument("--queue_s", type=float, help="Longest wait to leave.")
    parser.add_argument("--namespaces", nargs="*", help="Removed in the end.")
    options = parser.parse_args()
    a, b = options.ends
    settings = (1 / options.bytes_per_s, options.delay_s, options.queue_s)
    there, back = Direction(a, b, *settings), Direction(b, a, *settings)
    for end in options.ends:
        os.set_blocking(end, False)
    gc.disable()  # nothing here has cycles
    with suppress(OSError):  # else it would wait for its turn behind those that it serves
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
    started_s = time.monotonic()
    try:
        carry(there, back)
    finally:
        for name in options.namespaces:
            remove_namespace(name)
    cpu = sum(os.times()[:2]) / (time.monotonic() - started_s)
    with suppress(OSError):  # nobody may be there to read it
        json.dump({"cpu": cpu, "there": there.report(), "back": back.report()}, sys.stdout)


if __name__ == "__main__":
    main()
