"""The verb ``worker``: its options, its keys, what it refuses, and how it leaves."""

import signal
import socket
import stat
from pathlib import Path

import psutil
import pytest
from worker_processes import workers

from moe_lightning.cli import worker as verb
from moe_lightning.cli.main import VERBS
from moe_lightning.workers.worker import WorkerOptions


@pytest.fixture
def options_of(run, monkeypatch):
    """What a command line asks a worker for: ``options_of("--threads", 2)``."""
    asked = []

    def serve(options, *, on_listening):
        asked.append(options)
        return 0

    monkeypatch.setattr(verb, "serve_experts", serve)

    def options_of(*arguments):
        finished = run("worker", *arguments)
        assert finished.code == 0, finished.err
        return asked.pop()

    return options_of


def test_without_options_it_serves_the_demo_to_this_machine_only(options_of) -> None:
    assert options_of() == WorkerOptions()
    assert WorkerOptions().listen == "tcp://127.0.0.1:0"


EVERY_OPTION = WorkerOptions(
    checkpoint="some dir",
    listen="tcp://127.0.0.1:7000",
    keys="the keys",
    device="cuda:1",
    memory_gb=1.5,
    threads=3,
    experts_backend="cpu_half",
    insecure_network=True,
    ends_with_master=True,
    parent_pipe=True,
)


def test_options_of_a_worker_that_a_master_starts_come_through(options_of) -> None:
    # [-m, moe_lightning, worker, ...]
    assert options_of(*EVERY_OPTION.to_arguments()[3:]) == EVERY_OPTION


def test_dashes_and_underscores_are_the_same(options_of) -> None:
    dashes = ("--memory-gb", 2, "--experts-backend", "cpu_int8", "--insecure-network")
    assert options_of(*dashes) == WorkerOptions(
        memory_gb=2.0, experts_backend="cpu_int8", insecure_network=True
    )
    assert not options_of("--insecure_network", "false").insecure_network


def test_options_that_are_not_for_users_are_not_shown(run) -> None:
    finished = run("worker", "--help")
    assert finished.code == 0
    for option in ("--listen", "--model.checkpoint", "--keys", "--new-keys", "--memory_gb"):
        assert option in finished.out
    for hidden in ("ends_with_master", "parent_pipe"):
        assert hidden not in finished.out
    assert "worker" in VERBS


# Keys.


def test_new_keys_are_made_and_what_to_do_with_them_is_said(run) -> None:
    finished = run("worker", "--new-keys", "my keys", "--model.checkpoint", "m")
    assert (finished.code, finished.err) == (0, "")
    files = {file.name: stat.S_IMODE(file.stat().st_mode) for file in Path("my keys").iterdir()}
    assert set(files) == {"master.key", "master.key_secret", "worker.key", "worker.key_secret"}
    assert files["master.key_secret"] == files["worker.key_secret"] == 0o600
    assert stat.S_IMODE(Path("my keys").stat().st_mode) == 0o700
    for words in ("scp -rp 'my keys'", "worker --listen tcp://", "--trainer.strategy.keys"):
        assert words in finished.out
    assert "--model.checkpoint m" in finished.out


def test_keys_are_never_overwritten(run) -> None:
    run("worker", "--new_keys", "keys")
    before = Path("keys/master.key_secret").read_bytes()
    finished = run("worker", "--new_keys", "keys")
    check(finished, 2, "keys", "never overwritten")
    assert Path("keys/master.key_secret").read_bytes() == before


# Refusals.


def check(finished, code, *words):
    """An exit code, and one message with these words in few lines."""
    assert finished.code == code, finished.err
    assert finished.err.startswith("error: "), finished.err
    assert finished.err.count("error: ") == 1
    assert len(finished.err.splitlines()) <= 5, finished.err
    for word in words:
        assert word in finished.err, finished.err
    assert "<class" not in finished.err


WRONG = {
    "another machine without keys": (["--listen", "tcp://192.0.2.11:0"], 2, ["--new-keys"]),
    "all interfaces without keys": (["--listen", "tcp://*:0"], 2, ["--new-keys", "tcp://*:0"]),
    "a public address in the open": (
        ["--listen", "tcp://8.8.8.8:0", "--insecure-network"],
        2,
        ["8.8.8.8", "private"],
    ),
    "no address": (["--listen", "over there"], 2, ["--listen", "over there", "tcp://HOST:PORT"]),
    "keys that are not there": (
        ["--listen", "tcp://127.0.0.1:0", "--keys", "nowhere"],
        2,
        ["nowhere", "--new-keys"],
    ),
    "no memory": (["--memory_gb", 0], 2, ["memory_gb=0"]),
    "no number": (["--memory_gb", "much"], 2, ["memory_gb", "much"]),
    "no threads": (["--threads", 0], 2, ["threads=0", "at least 1"]),
    "no device": (["--device", "banana"], 2, ["--device", "'banana'", "cpu"]),
    "no backend": (["--experts_backend", "magic"], 2, ["experts_backend", "magic"]),
    "no option": (["--lisen", "tcp://127.0.0.1:0"], 2, ["--lisen"]),
    "no checkpoint": (["--model.checkpoint", "./nope"], 4, ["nope"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_it_cannot_do_is_said(run, name) -> None:
    arguments, code, words = WRONG[name]
    check(run("worker", *arguments), code, *words)


def test_a_port_that_is_taken_is_named(run, tiny) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        finished = run("worker", "--listen", address, "--model.checkpoint", tiny)
    check(finished, 2, address, "port")


def test_the_port_for_signs_of_life_may_be_taken_too(run, tiny) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        address = f"tcp://127.0.0.1:{port - 1}"
        finished = run("worker", "--listen", address, "--model.checkpoint", tiny)
    check(finished, 2, str(port))


# Real processes.


def test_it_says_where_it_listens_and_leaves_with_0(tiny) -> None:
    options = ("--model.checkpoint", tiny, "--memory_gb", 0.5)
    with workers(options, [*options, "--ends_with_master", "true"]) as (first, second):
        for worker in (first, second):
            address = worker.address()
            assert address.startswith("tcp://127.0.0.1:")
            assert worker.said() == f"listening on {address}, offering cpu, 0.5 GB\n"
            hosts = {
                connection.laddr.ip
                for connection in psutil.Process(worker.process.pid).net_connections()
                if connection.status == psutil.CONN_LISTEN
            }
            assert hosts == {"127.0.0.1"}
        assert first.end(signal.SIGTERM) == 0
        assert second.end(signal.SIGINT) == 0
        assert first.said().count("\n") == second.said().count("\n") == 1
