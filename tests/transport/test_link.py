"""The emulated link has the delay and the rate it was asked for, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sampling import sampled

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
NAMESPACES = Path("/run/netns")
KILLED = """
import subprocess, sys, time
sys.path.insert(0, {scripts!r})
from link import Link
link = Link()
link.__enter__()
inside = link.popen_in("b", ["sleep", "60"])
print(inside.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture
def link_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(SCRIPTS)
    import link

    if (reason := link.Link.available()) is not None:
        pytest.skip(f"no emulated link can be made here: {reason}")
    return link


def namespaces_of(pid: int) -> list[str]:
    return sorted(path.name for path in NAMESPACES.glob(f"moe-link-{pid}-*"))


def becomes(claim: Callable[[], bool], *, within_s: float) -> bool:
    end_s = time.monotonic() + within_s
    while not claim():
        if time.monotonic() > end_s:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize(("delay_ms", "rate_gbit"), sampled([(1.0, 1.0), (5.0, 0.3)], (1.0, 1.0)))
def test_delay_and_rate_are_those_asked_for(
    link_module: Any, delay_ms: float, rate_gbit: float
) -> None:
    with link_module.Link(delay_ms=delay_ms, rate_gbit=rate_gbit) as link:
        found = link_module.probe(link, seconds=1.0)
        shuttle = link.close()
    # Two processes wake up for each byte, which takes them about 0.1 ms on any link.
    assert 2 * delay_ms <= found["round_trip_ms"] <= 1.1 * 2 * delay_ms + 0.15
    # Both ways at once, acknowledgements wait behind the other stream's packets, and five processes
    # share the cores.
    for way, least in (
        ("there", 0.9),
        ("back", 0.9),
        ("there_of_both", 0.7),
        ("back_of_both", 0.7),
    ):
        # Above: what a lost packet has held back is read all at once.
        assert least * rate_gbit <= found[f"{way}_gbit"] <= 1.1 * rate_gbit, way
    assert shuttle["cpu"] < 0.5


def test_an_idle_link_takes_no_time_up_or_down(link_module: Any) -> None:
    with link_module.Link() as link:
        time.sleep(0.5)
        link.set_down()
        time.sleep(1)
        shuttle = link.close()
    assert shuttle["cpu"] < 0.15  # starting Python is most of it


def test_a_connection_outlives_two_seconds_of_an_unplugged_link(link_module: Any) -> None:
    code = "import socket; s = socket.create_server(('10.77.0.2', 5000)); print(1, flush=True)\n"
    code += "c = s.accept()[0]\nwhile x := c.recv(9): c.sendall(x)"
    ask = "import socket, sys; c = socket.create_connection(('10.77.0.2', 5000))\n"
    ask += "for line in sys.stdin:\n c.sendall(line.encode()); print(c.recv(9).decode(), end='')"
    ask += "; sys.stdout.flush()"
    with link_module.Link() as link:
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        server = link.popen_in("b", [sys.executable, "-c", code], **pipes)
        assert server.stdout.readline() == "1\n"
        client = link.popen_in("a", [sys.executable, "-c", ask], **pipes)
        with client, server:
            client.stdin.write("one\n")
            client.stdin.flush()
            assert client.stdout.readline() == "one\n"
            link.set_down()
            client.stdin.write("two\n")
            client.stdin.flush()
            time.sleep(2)
            link.set_up()
            assert client.stdout.readline() == "two\n"
            client.kill()
            server.kill()


def test_the_link_ends_what_runs_at_its_ends(link_module: Any) -> None:
    with link_module.Link() as link:
        shell = link.popen_in("a", ["sh", "-c", "sleep 60 & echo $!; wait"], stdout=subprocess.PIPE)
        inner = int(shell.stdout.readline())
        assert namespaces_of(os.getpid())
    assert shell.wait(5) == -signal.SIGKILL
    shell.stdout.close()
    assert becomes(lambda: not Path("/proc", str(inner)).exists(), within_s=5)
    assert not namespaces_of(os.getpid())


@pytest.mark.parametrize("kills_shuttle_too", [False, True])
def test_a_killed_owner_leaves_nothing(link_module: Any, kills_shuttle_too: bool) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", KILLED.format(scripts=str(SCRIPTS))],
        stdout=subprocess.PIPE,
        text=True,
    )
    inside = int(owner.stdout.readline())
    assert len(namespaces_of(owner.pid)) == 2
    if kills_shuttle_too:
        children = Path(f"/proc/{owner.pid}/task/{owner.pid}/children").read_text().split()
        shuttles = [pid for pid in map(int, children) if pid != inside]
        for pid in [owner.pid, *shuttles]:
            os.kill(pid, signal.SIGKILL)
        owner.wait()
        assert len(namespaces_of(owner.pid)) == 2
        with link_module.Link():  # the next one tidies up
            pass
    else:
        owner.kill()
        owner.wait()
    owner.stdout.close()
    assert becomes(lambda: not namespaces_of(owner.pid), within_s=10)
    assert becomes(lambda: not Path("/proc", str(inside)).exists(), within_s=10)


def test_two_links_do_not_meet(link_module: Any) -> None:
    with link_module.Link() as one, link_module.Link(delay_ms=5) as other:
        trips = [link_module.probe(each, seconds=0.1)["round_trip_ms"] for each in (one, other)]
    assert trips == [pytest.approx(2, rel=0.2), pytest.approx(10, rel=0.1)]


def test_the_script_measures_itself(link_module: Any) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "link.py"), "--rate_gbit", "0.5", "--seconds", "0.3"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "round trip 2 ms, 0.5 Gbit/s each way" in done.stdout
    assert "share of a core" in done.stdout
