"""Ranks that are killed or stopped: the others name them, and end with exit code 6."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 60
BEGUN = {"predict": r"Predicting: [1-9]\d*/", "fit": "config.yaml"}
NUM_RESULTS = {"predict": 300, "fit": 6}  # rows, and lines of losses
OPTIONS = (
    *("--data.max_batch_tokens", "150", "--trainer.accelerator", "cpu", "--trainer.devices", "2"),
    *("--trainer.strategy", "moe_fsdp", "--trainer.strategy.ep_size", "2"),
)
NAMED = (
    rf"error: rank 1 on host {re.escape(socket.gethostname())} \(process (\d+)\) does not answer"
)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        from chaos_ranks import Scene

        scene = Scene(tmp_path_factory.mktemp("scene"), num_ranks=2)
        yield scene
        scene.nursery.close()


@pytest.mark.parametrize(
    ("verb", "victim", "how"),
    [
        ("predict", 0, signal.SIGSTOP),
        pytest.param("fit", 1, signal.SIGKILL, marks=pytest.mark.wide),
    ],
)
def test_the_other_rank_names_the_lost_one_and_the_same_command_gives_what_it_should(
    scene, tmp_path, verb, victim, how
) -> None:
    from chaos_ranks import verdict

    wanted, _ = scene.run(verb, f"undisturbed-{verb}", tmp_path / "undisturbed")
    assert len(wanted) == NUM_RESULTS[verb]
    children = scene.start(verb, f"disturbed-{verb}", tmp_path / "out")
    wait_for(
        BEGUN[verb],
        lambda: children[0].said() + str([*(tmp_path / "out").glob("config.yaml")]),
        is_running=lambda: children[0].is_there,
    )
    begin_s = time.monotonic()
    children[victim].send(how)
    assert verdict(children[1 - victim], begin_s, victim) is None, children[1 - victim].said()
    assert children[1 - victim].code == 6
    children[victim].end()
    found, _ = scene.run(verb, f"again-{verb}", tmp_path / "out")
    assert found == wanted


def wait_for(pattern, said, *, is_running):
    """Wait until a run says something."""
    end_s = time.monotonic() + TIMEOUT_S
    while not re.search(pattern, said()):
        assert is_running(), said()
        assert time.monotonic() < end_s, said()
        time.sleep(0.05)


def start(command, tiny, directory):
    """A run of two ranks that takes long, in a session of its own; its log."""
    rows = [{"id": str(n), "prompt": f"row {n}"} for n in range(20000)]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    log = directory / "log"
    arguments = (
        *("predict", "--model.checkpoint", str(tiny), *OPTIONS),
        *("--data.input", str(directory / "rows.jsonl"), "--output_dir", str(directory / "out")),
    )
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "-m", "moe_lightning", *arguments],
            stdout=file,
            stderr=file,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    return process, log


def children_of(pid):
    """The processes that a process has started, the oldest first."""
    return sorted(
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    )


def end(*pids):
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def is_gone(pid):
    """Whether a process has ended, be it unburied."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.wide
def test_lightnings_own_launcher_ends_with_6_and_leaves_nothing(tiny, tmp_path) -> None:
    process, log = start([sys.executable], tiny, tmp_path)
    children = []
    try:
        wait_for(BEGUN["predict"], log.read_text, is_running=lambda: process.poll() is None)
        (victim,) = children = children_of(process.pid)
        os.kill(victim, signal.SIGKILL)
        assert process.wait(TIMEOUT_S) == 6, log.read_text()
        (named,) = re.findall(NAMED, log.read_text())
        assert int(named) == victim
        assert is_gone(victim)
    finally:
        end(process.pid, *children)
        process.wait()


def test_torchrun_ends_with_1_and_its_survivor_names_the_lost_rank(tiny, tmp_path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    process, log = start([*torchrun, "--nproc-per-node", "2"], tiny, tmp_path)
    children = []
    try:
        wait_for(BEGUN["predict"], log.read_text, is_running=lambda: process.poll() is None)
        _, victim = children = children_of(process.pid)[-2:]
        os.kill(victim, signal.SIGKILL)
        assert process.wait(TIMEOUT_S) == 1, log.read_text()  # torchrun's own, whatever ranks say
        (named,) = re.findall(NAMED, log.read_text())
        assert int(named) == victim
        assert re.search(r"exitcode  : 6 \(pid", log.read_text())
        assert all(is_gone(child) for child in children)
    finally:
        end(process.pid, *children)
        process.wait()
