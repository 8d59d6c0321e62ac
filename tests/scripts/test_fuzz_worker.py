"""A live worker survives a short run of the fuzzer, and the fuzzer finds workers that are wrong."""

import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
KINDS = {
    "a damaged message",
    "noise",
    "another protocol",
    "a bad greeting",
    "a bad handshake",
    "a bad handshake of CURVE",
    "bad frames",
    "a claim of length",
    "bad commands",
    "too many frames",
    "a message without end",
}


@pytest.fixture(scope="module")
def fuzzer() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "scripts"))
    import fuzz_worker

    yield fuzz_worker
    sys.path.remove(str(ROOT / "scripts"))


@pytest.mark.parametrize("keys", ["true", "false"])
def test_a_live_worker_survives(keys: str) -> None:
    seed = random.randrange(2**32)
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "scripts" / "fuzz_worker.py"),
            *("--throws", "500", "--seed", str(seed), "--keys", keys),
        ],
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"seed {seed}, {'with' if keys == 'true' else 'without'} keys\n" in done.stdout
    counts = {
        text: int(count.replace(",", ""))
        for count, text in re.findall(r"^ *([\d,]+)  ([a-zA-Z ]+)", done.stdout, re.MULTILINE)
    }
    assert counts.keys() >= KINDS
    assert sum(counts[kind] for kind in KINDS) == 500
    refused, read = re.search(r"refused ([\d,]+) and read ([\d,]+)", done.stdout).groups()
    assert int(refused.replace(",", "")) > 50
    answers = counts["genuine answers"]
    assert answers >= 200
    assert int(read.replace(",", "")) >= answers


@pytest.mark.parametrize(
    ("handler", "reason"),
    [
        ("dies", r"ended with exit code 3"),
        ("hangs", r"a genuine master got no answer"),
        ("keeps", r"grown by \d+ MB, of 200 MB"),
        ("mixes", r"a genuine master got a wrong answer"),
    ],
)
def test_wrong_workers_are_found(
    handler: str,
    reason: str,
    fuzzer: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(fuzzer, "MAX_ANSWER_S", 2.0)
    assert fuzzer.fuzz(throws=3000, seed=1, keys=True, handler=handler) == 1
    assert re.search(reason, capsys.readouterr().out)


def test_a_stranger_who_gets_in_is_found(
    fuzzer: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # As if the worker's keys kept nobody out: it has none, and only the fuzzer believes it has.
    worker = fuzzer.Worker
    monkeypatch.setattr(fuzzer, "Worker", lambda handler, keys, log: worker(handler, "", log))
    monkeypatch.setattr(fuzzer.Keys, "load", lambda directory, role: None)
    assert fuzzer.fuzz(throws=300, seed=1, keys=True) == 1
    assert "no stranger's may be" in capsys.readouterr().out


def test_the_same_seed_throws_the_same(fuzzer: ModuleType) -> None:
    def thrown(seed: int) -> list[list[bytes]]:
        peers = fuzzer.BadPeers(random.Random(seed))
        return [peers.conversation(kind) for _ in range(5) for kind in peers.kinds]

    assert thrown(7) == thrown(7)
    assert thrown(7) != thrown(8)


def test_what_is_not_bad_is_read(fuzzer: ModuleType, tmp_path: Path) -> None:
    """The good parts of a conversation are good: its bad parts reach what they aim at."""
    worker = fuzzer.Worker("refuses", "", tmp_path / "log")
    thrower = fuzzer.Thrower(worker, None, seed=1)
    frames = [bytes(frame) for frame in fuzzer.Control(7, 1, "hello", {"a": 1}).frames()]
    for payload in (frames, frames[:1]):
        thrower._send("requests", [fuzzer.greeting(), fuzzer.ready(), fuzzer.message(payload)])
    time.sleep(0.5)
    thrower.end()
    assert worker.end() == {"read": 1, "refused": 1}
