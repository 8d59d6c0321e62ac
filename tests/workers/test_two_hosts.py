"""Master and workers on two hosts: namespaces of this machine with a slow link between them.

namespace a: master (and a worker beside it) ── 10 ms, 0.1 Gbit/s ── namespace b: workers
"""

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from moe_lightning.cli.main import main
from moe_lightning.demo.random_checkpoint import make_checkpoint
from moe_lightning.transport.keys import new_keys

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
MODULE = [sys.executable, "-m", "moe_lightning"]
ENVIRON = os.environ | {"OMP_NUM_THREADS": "1"}
NUM_ROWS, NEW_TOKENS = 24, 80
SOME_BYTES = 400_000  # of some 6 MB: more than the masters' and workers' talk before the first row
RUN_S = 120.0


@pytest.fixture(scope="module")
def link():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        from link import Link
    if (reason := Link.available()) is not None:
        pytest.skip(f"two hosts cannot be had here: {reason}")
    # 160 round trips of 20 ms in every run: time enough to unplug.
    with Link(delay_ms=10, rate_gbit=0.1) as link:
        yield link


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(
        tmp_path_factory.mktemp("checkpoints") / "small",
        family="qwen3_moe",
        hidden_size=192,
        num_layers=2,
        num_experts=6,
        top_k=2,
        expert_size=16,
        num_heads=4,
        num_kv_heads=2,
        vocab_size=512,
        max_positions=128,
    )


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    directory = tmp_path_factory.mktemp("keys") / "keys"
    new_keys(directory)
    return directory


@pytest.fixture(scope="module")
def task(checkpoint, tmp_path_factory):
    """What every master is to do."""
    file = tmp_path_factory.mktemp("rows") / "in.jsonl"
    rows = [{"id": n, "prompt": f"{n} times {n}"} for n in range(NUM_ROWS)]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    options = {
        "--model.checkpoint": checkpoint,
        "--model.task": "Generate",
        "--model.task.max_new_tokens": NEW_TOKENS,
        "--model.task.ignore_eos": "true",
        "--data.input": file,
    }
    return ["predict", *(str(word) for option in options.items() for word in option)]


@pytest.fixture(scope="module")
def expected(task, tmp_path_factory):
    """The rows of one device."""
    directory = tmp_path_factory.mktemp("single")
    assert main([*task, "--output_dir", str(directory)]) == 0
    return rows_in(directory)


def rows_in(directory):
    lines = (Path(directory) / "predictions.jsonl").read_bytes().splitlines()
    return [json.loads(line) for line in lines]


class Process:
    """A command at one end of the link, and what it says."""

    def __init__(self, link, end, argv, log):
        self._log = log
        with log.open("wb") as out:
            self.process = link.popen_in(
                end, [*MODULE, *argv], env=ENVIRON, stdout=out, stderr=out, stdin=subprocess.DEVNULL
            )

    def said(self):
        return self._log.read_text(errors="replace")

    def wait(self):
        """Its exit code."""
        return self.process.wait(RUN_S)

    def wait_until_it_says(self, words):
        """Seconds until it has said something."""
        start_s = time.monotonic()
        while words not in self.said():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() - start_s < RUN_S, self.said()
            time.sleep(0.02)
        return time.monotonic() - start_s


@pytest.fixture
def start(link, tmp_path):
    """Start a command at one end: ``start("b", "worker", ...)``. All end with the test."""
    started = []

    def start(end, *argv):
        process = Process(link, end, list(map(str, argv)), tmp_path / f"{len(started)}.log")
        started.append(process)
        return process

    yield start
    for each in started:
        each.process.kill()
        each.process.wait()


@pytest.fixture
def worker(start, link, checkpoint, keys):
    """Start a worker with keys: ``worker(end, port)``; its address."""

    def worker(end, port):
        address = f"tcp://{link.address(end)}:{port}"
        start(end, "worker", "--listen", address, "--keys", keys, "--model.checkpoint", checkpoint)
        return address

    return worker


@pytest.fixture
def master(start, task, keys, tmp_path):
    """Start a master with keys: ``master(addresses, ...)``; it writes into ``tmp_path / "out"``."""

    def master(addresses, *more):
        strategy = ["--trainer.strategy", "moe_rpc", "--trainer.strategy.keys", keys]
        where = ["--trainer.strategy.workers", f"[{','.join(addresses)}]"]
        return start("a", *task, *strategy, *where, *more, "--output_dir", tmp_path / "out")

    return master


def bytes_sent(link):
    """Bytes that have left the workers' end."""
    shown = subprocess.run(
        ["ip", "-n", link.namespaces["b"], "-s", "-j", "link", "show", "link0"],
        capture_output=True,
        check=True,
    )
    return json.loads(shown.stdout)[0]["stats64"]["tx"]["bytes"]


def wait_for_rows(link, master, before):
    """Wait until rows are being computed across the link."""
    end_s = time.monotonic() + RUN_S
    while bytes_sent(link) - before < SOME_BYTES:
        assert master.process.poll() is None, master.said()
        assert time.monotonic() < end_s, master.said()
        time.sleep(0.02)
    assert master.process.poll() is None, "the run ended before it could be disturbed"


@contextmanager
def unplugged(link):
    link.set_down("b")
    try:
        yield
    finally:
        link.set_up("b")


@pytest.mark.wide
def test_two_seconds_without_a_link_lose_nothing(link, worker, master, expected, tmp_path):
    before = bytes_sent(link)
    run = master([worker("b", 7000), worker("b", 7010)])
    wait_for_rows(link, run, before)
    with unplugged(link):
        time.sleep(2)
        assert run.process.poll() is None, run.said()
    assert run.wait() == 0, run.said()
    assert rows_in(tmp_path / "out") == expected
    assert "is lost" not in run.said()


def test_a_longer_cut_is_noticed_in_time_and_ends_the_run_resumably(
    link, worker, master, expected, tmp_path
):
    timeout_s = 3.0
    address = worker("b", 7020)
    soon = ["--trainer.strategy.timeout_s", timeout_s]
    before = bytes_sent(link)
    run = master([address], *soon)
    wait_for_rows(link, run, before)
    with unplugged(link):
        noticed_s = run.wait_until_it_says("is lost")
        assert run.wait() == 6, run.said()
    assert noticed_s <= timeout_s + 0.5  # of looking
    assert address in run.said()
    assert "Nobody has room to adopt" in run.said()
    # The worker has noticed too, and serves the next master: the same command.
    again = master([address], *soon)
    assert again.wait() == 0, again.said()
    assert rows_in(tmp_path / "out") == expected


def test_experts_behind_a_cut_are_adopted_by_a_worker_on_this_side(
    link, worker, master, expected, tmp_path
):
    far, near = worker("b", 7030), worker("a", 7040)
    before = bytes_sent(link)
    run = master([far, near], "--trainer.strategy.timeout_s", 3)
    wait_for_rows(link, run, before)
    with unplugged(link):
        assert run.wait() == 0, run.said()
    assert rows_in(tmp_path / "out") == expected
    assert f"worker {far} is lost" in run.said()
    assert f"worker {near} adopted" in run.said()


@pytest.mark.wide
def test_tensorpipe_across_hosts(link, start, task, checkpoint, expected, tmp_path):
    ports = (7050, 7060)
    for port in ports:
        listen = ["--listen", f"tcp://{link.address('b')}:{port}"]
        start("b", "worker", *listen, "--insecure-network", "--model.checkpoint", checkpoint)
    addresses = ",".join(f"tcp://{link.address('b')}:{port}" for port in ports)
    strategy = {
        "--trainer.strategy": "moe_rpc",
        "--trainer.strategy.transport": "tensorpipe",
        "--trainer.strategy.insecure_network": "true",
        "--trainer.strategy.workers": f"[{addresses}]",
        "--output_dir": tmp_path / "out",
    }
    run = start("a", *task, *(word for option in strategy.items() for word in option))
    assert run.wait() == 0, run.said()
    assert rows_in(tmp_path / "out") == expected
