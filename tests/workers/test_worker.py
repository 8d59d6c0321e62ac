"""A worker from its options to its exit code: what it refuses, whom it serves, when it leaves."""

import shutil
import time

import pytest
from masters import placed
from worker_threads import ThreadWorker, thread_worker

from moe_lightning.errors import CheckpointError, UsageError
from moe_lightning.workers.worker import LOST_MASTER, WorkerOptions, offer, serve_experts


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threads": 0}, ["threads=0", "at least 1"]),
        ({"memory_gb": 0}, ["memory_gb=0", "more than 0"]),
        ({"memory_gb": -1.5}, ["memory_gb=-1.5"]),
        ({"device": "cuda:9"}, ["--device", "cuda:9"]),
        ({"device": "tpu"}, ["--device", "tpu", "cpu"]),
        ({"listen": "127.0.0.1:7000"}, ["--listen", "tcp://HOST:PORT"]),
        ({"listen": "tcp://0.0.0.0:0"}, ["--listen", "--new-keys"]),
        ({"listen": "tcp://192.168.1.7:0"}, ["--listen", "--new-keys"]),
        ({"listen": "tcp://8.8.8.8:0", "insecure_network": True}, ["--listen", "private"]),
        ({"keys": "nowhere"}, ["nowhere", "--new-keys"]),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_read(options, words, monkeypatch):
    monkeypatch.setattr(
        "moe_lightning.workers.worker.open_checkpoint",
        lambda path: pytest.fail("the checkpoint was opened"),
    )
    with pytest.raises(UsageError) as error:
        serve_experts(WorkerOptions(**options))
    for word in words:
        assert word in str(error.value)


def test_a_checkpoint_that_cannot_be_used_is_refused(tmp_path, checkpoint):
    with pytest.raises(CheckpointError, match="nowhere"):
        serve_experts(WorkerOptions(str(tmp_path / "nowhere")))
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    (copy / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        serve_experts(WorkerOptions(str(copy)))


def test_a_port_that_is_taken_is_refused(checkpoint):
    with thread_worker(checkpoint, listen="tcp://127.0.0.1:0") as worker:
        with pytest.raises(UsageError) as error:
            serve_experts(WorkerOptions(str(checkpoint), listen=worker.address))
        assert worker.address in str(error.value)
        assert "another program listens there" in str(error.value)


def test_what_it_offers_in_words(monkeypatch):
    monkeypatch.setattr("moe_lightning.workers.worker.free_bytes", lambda device: 12.34e9)
    assert offer(WorkerOptions(device="cpu")) == "cpu, 12.3 GB"
    assert offer(WorkerOptions(device="cpu", memory_gb=3)) == "cpu, 3.0 GB"
    assert offer(WorkerOptions(device="cpu", memory_gb=30)) == "cpu, 12.3 GB"


def test_a_hand_started_worker_serves_master_after_master_over_tcp(checkpoint, master, check_sums):
    with thread_worker(checkpoint, listen="tcp://127.0.0.1:0") as worker:
        assert worker.address.startswith("tcp://127.0.0.1:")
        for _ in range(2):
            made = master([worker.address], placed(range(8)))
            check_sums(made)
            made.fleet.close()
        assert worker.end() == 0


def test_a_silent_master_is_given_up_and_the_next_one_is_served(checkpoint, master, check_sums):
    """As when the first one was killed: its workers hear of it only by its silence."""
    with thread_worker(checkpoint, memory_gb=1.0) as worker:
        killed = master([worker.address], placed(range(8)), timeout_s=0.6)
        check_sums(killed)
        killed.fleet.roster.liveness.close()
        made = master([worker.address], placed(range(8)))  # asks until the worker has noticed
        assert made.fleet.roster.offers[0]["free_bytes"] < 10**9, "of what it holds now"
        check_sums(made)


def test_its_memory_is_free_once_the_master_is_silent(checkpoint, master, meet):
    with thread_worker(checkpoint, memory_gb=1.0) as worker:
        killed = master([worker.address], placed(range(8)), timeout_s=0.6)
        assert killed.fleet.roster.offers[0]["free_bytes"] < 10**9
        killed.fleet.roster.liveness.close()
        time.sleep(1.2)
        assert meet([worker.address]).offers[0]["free_bytes"] == 10**9


def test_a_worker_of_one_master_leaves_with_it(checkpoint, master, check_sums):
    worker = ThreadWorker(checkpoint, listen="tcp://127.0.0.1:0", ends_with_master=True)
    made = master([worker.address], placed(range(8)))
    check_sums(made)
    made.fleet.close()
    assert worker.wait() == 0


def test_a_worker_of_one_master_leaves_when_that_is_gone_and_says_so(checkpoint, master):
    worker = ThreadWorker(checkpoint, listen="tcp://127.0.0.1:0", ends_with_master=True)
    killed = master([worker.address], placed(range(8)), timeout_s=0.6)
    killed.fleet.roster.liveness.close()
    start_s = time.monotonic()
    assert worker.wait() == LOST_MASTER == 6
    assert time.monotonic() - start_s < 2


def test_a_worker_leaves_when_it_is_not_wanted_whoever_it_serves(checkpoint, master):
    worker = ThreadWorker(checkpoint, listen="tcp://127.0.0.1:0")
    made = master([worker.address], placed(range(8)))
    assert made.fleet.roster.liveness.lost(0) is None
    start_s = time.monotonic()
    assert worker.end() == 0
    assert time.monotonic() - start_s < 1
