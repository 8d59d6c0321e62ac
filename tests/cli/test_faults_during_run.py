"""What goes wrong once a run has begun: rows that raise, memory, disk, Ctrl-C, kill."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_lightning
from moe_lightning.cli import main as cli_main
from moe_lightning.jobs.file_operations import FileOperations
from moe_lightning.tasks import Embed, Generate, Score
from moe_lightning.tasks import generate as generate_file

ROWS = [{"id": name, "prompt": f"the row {name}"} for name in ("a", "b", "bad", "c", "d")]


@pytest.fixture
def predict_rows(predict, write_rows):
    write_rows("in.jsonl", ROWS)
    return lambda *arguments: predict("--data.input", "in.jsonl", *arguments)


@pytest.fixture
def continue_rows(run, tiny, write_rows):
    """The same command again and again: the job goes on."""
    write_rows("in.jsonl", ROWS)
    own = ("--model.checkpoint", tiny, "--data.input", "in.jsonl", "--output_dir", "out")
    return lambda *arguments: run("predict", *own, *arguments)


@pytest.mark.parametrize("task", [Generate, Score, Embed])
@pytest.mark.parametrize("budget", [16384, 1], ids=["one batch", "a batch a row"])
def test_a_row_that_makes_the_model_raise_costs_one_row(
    predict_rows, read_rows, monkeypatch, task, budget
) -> None:
    name = task.__name__
    options = ("--model.task", name, "--data.max_batch_tokens", budget)
    assert predict_rows(*options).code == 0
    wanted = [row for row in read_rows("out/predictions.jsonl") if row["id"] != "bad"]
    run = task.run

    def run_or_raise(self: Any, runner: Any, rows: Sequence[Any], **options: Any) -> Any:
        if any(row.id == "bad" for row in rows):
            raise RuntimeError("index 99 is out of bounds")
        return run(self, runner, rows, **options)

    monkeypatch.setattr(task, "run", run_or_raise)
    finished = predict_rows(*options)
    assert finished.code == 3, finished.err
    assert "Traceback" not in finished.err
    answers = read_rows("out/predictions.jsonl")
    assert [row["id"] for row in answers] == ["a", "b", "c", "d"]
    if task is Generate:
        assert answers == wanted
    (error,) = read_rows("out/errors.jsonl")
    assert list(error) == ["id", "line", "offset", "stage", "error"]
    assert (error["id"], error["line"], error["stage"]) == ("bad", 3, "compute")
    assert "RuntimeError: index 99 is out of bounds" in error["error"]
    report = json.loads(Path("out/run.json").read_text())
    assert (report["num_rows"], report["num_predictions"], report["num_errors"]) == (5, 4, 1)
    assert report["exit_reason"] == "finished"


def test_rows_computed_twice_because_of_a_bad_one_are_counted_once(
    predict_rows, read_rows, monkeypatch
) -> None:
    """The answer of ``bad`` fails at the very end, when its batch has been decoded."""
    to_row = generate_file._to_row

    def to_row_or_raise(row: Any, *rest: Any) -> Any:
        if row.id == "bad":
            raise ValueError("cannot be decoded")
        return to_row(row, *rest)

    monkeypatch.setattr(generate_file, "_to_row", to_row_or_raise)
    assert predict_rows("--model.task.max_new_tokens", 4).code == 3
    report = json.loads(Path("out/run.json").read_text())
    assert (report["num_rows"], report["num_predictions"], report["num_errors"]) == (5, 4, 1)
    assert len(read_rows("out/predictions.jsonl")) == 4


def test_when_every_row_raises_the_job_still_ends_with_3(
    predict_rows, read_rows, monkeypatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no row can be computed")

    monkeypatch.setattr(Score, "run", fail)
    assert predict_rows("--model.task", "Score").code == 3
    assert Path("out/predictions.jsonl").read_bytes() == b""
    assert [row["id"] for row in read_rows("out/errors.jsonl")] == [row["id"] for row in ROWS]


FAULTS = {
    "out of memory": torch.OutOfMemoryError("tried to allocate 20.00 GiB"),
    "host memory": MemoryError("no memory"),
}


@pytest.fixture
def faulty(monkeypatch):
    """Make Score fail at the row ``c``, until ``mend`` is called."""

    def faulty(fault: Exception):
        run = Score.run

        def run_or_raise(self: Any, runner: Any, rows: Sequence[Any], **options: Any) -> Any:
            if any(row.id == "c" for row in rows):
                raise fault
            return run(self, runner, rows, **options)

        monkeypatch.setattr(Score, "run", run_or_raise)
        return lambda: monkeypatch.setattr(Score, "run", run)

    return faulty


@pytest.mark.parametrize("name", FAULTS)
def test_memory_that_runs_out_keeps_what_is_done_and_says_how_to_continue(
    continue_rows, read_rows, faulty, name
) -> None:
    fault = FAULTS[name]
    mend = faulty(fault)
    options = ("--model.task", "Score", "--data.max_batch_tokens", 1)
    finished = continue_rows(*options)
    assert finished.code == 1
    assert "Traceback" not in finished.err
    for word in (type(fault).__name__, str(fault), "1 rows", "GB", "--data.max_forward_tokens"):
        assert word in finished.err, finished.err
    report = json.loads(Path("out/run.json").read_text())
    assert str(fault) in report["exit_reason"]
    assert not Path("out/predictions.jsonl").exists()
    mend()
    again = continue_rows(*options, "--data.max_forward_tokens", 1)
    assert again.code == 0, again.err
    assert [row["id"] for row in read_rows("out/predictions.jsonl")] == [r["id"] for r in ROWS]
    report = json.loads(Path("out/run.json").read_text())
    assert (report["num_rows"], report["num_done_before"]) == (5, 3)  # the longest row came first


@pytest.fixture
def disk(monkeypatch):
    """A disk with room for so many parts, as far as writing them goes."""

    def disk(num_parts: int):
        room = [num_parts]
        create = FileOperations.create

        def create_or_fail(self: Any, path: Path) -> int:
            if path.name.endswith(".tmp") or ".part." in path.name:
                if room[0] == 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
                room[0] -= 1
            return create(self, path)

        monkeypatch.setattr(FileOperations, "create", create_or_fail)
        return room

    return disk


def test_a_full_disk_is_waited_for_then_the_run_ends_resumably(
    continue_rows, read_rows, disk
) -> None:
    room = disk(2)
    options = ("--model.task", "Score", "--data.max_batch_tokens", 1)
    finished = continue_rows(*options, "--writer.full_disk_wait_s", 0.3)
    assert finished.code == 5, finished.err
    assert "Traceback" not in finished.err
    assert "the disk is full. Waiting" in finished.err
    assert "same command continues" in finished.err
    assert not list(Path("out/job/tmp").iterdir())
    assert len(list(Path("out").glob("job/*/parts/*"))) == 2
    room[0] = 99
    assert continue_rows(*options).code == 0
    assert [row["id"] for row in read_rows("out/predictions.jsonl")] == [r["id"] for r in ROWS]
    assert json.loads(Path("out/run.json").read_text())["num_done_before"] == 2


def test_a_disk_that_has_room_again_in_time_costs_nothing(continue_rows, disk) -> None:
    room = disk(2)
    threading.Timer(1.0, lambda: room.__setitem__(0, 99)).start()
    options = ("--model.task", "Score", "--data.max_batch_tokens", 1)
    finished = continue_rows(*options)
    assert finished.code == 0, finished.err
    assert "there is space again" in finished.err


def test_ctrl_c_while_the_verb_is_imported_is_exit_code_5(run, monkeypatch) -> None:
    """Importing torch takes seconds, and is when a typo in the command is noticed."""

    def interrupt(name: str) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_main, "import_module", interrupt)
    try:
        finished = run("predict")
    except KeyboardInterrupt:
        pytest.fail("Ctrl-C during the import ends in a traceback")
    assert finished.code == 5
    assert "interrupted" in finished.err


def start(*arguments: object) -> subprocess.Popen[bytes]:
    """A process of its own; what it says goes to the file ``stderr``."""
    root = str(Path(moe_lightning.__file__).parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    with open("stderr", "wb") as stderr:
        return subprocess.Popen(
            [sys.executable, "-m", "moe_lightning", *map(str, arguments)],
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )


def stop_once_there_is(
    pattern: str, process: subprocess.Popen[bytes], stop: signal.Signals
) -> tuple[int, str]:
    """Wait for a file, send a signal, and return the exit code and what the process said."""
    try:
        deadline_s = time.monotonic() + 60
        while not list(Path().glob(pattern)):
            assert process.poll() is None, Path("stderr").read_text()
            assert time.monotonic() < deadline_s, "the run did not begin"
            time.sleep(0.05)
        process.send_signal(stop)
        return process.wait(timeout=30), Path("stderr").read_text()
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "kill"])
def test_an_interrupted_run_ends_within_seconds_with_exit_code_5(
    work, tiny, write_rows, stop
) -> None:
    write_rows("in.jsonl", [{"id": n, "prompt": f"row {n}"} for n in range(5000)])
    process = start(
        *("predict", "--model.checkpoint", tiny, "--data.input", "in.jsonl"),
        *("--output_dir", "out", "--data.max_batch_tokens", 256),
        *("--model.task.max_new_tokens", 100, "--model.task.ignore_eos", "true"),
    )
    # By then one batch is done and the next has begun.
    code, said = stop_once_there_is("out/job/*/parts/*.part", process, stop)
    assert code == 5, said[-2000:]
    assert "Traceback" not in said
    assert "rows are done, and the same command continues" in said
    report = json.loads(Path("out/run.json").read_text())
    assert report["exit_reason"] == "interrupted"
    ledger = [json.loads(line.split("\t")[0]) for line in read_logs(Path("out"))]
    # What was in flight is finished, and its part committed.
    assert report["num_predictions"] == sum(entry["num_rows"] for entry in ledger)
    assert len(list(Path("out").glob("job/*/parts/*.part"))) == len(ledger)
    assert {p.name for p in Path("out").iterdir()} == {"config.yaml", "run.json", "job"}


def read_logs(directory: Path) -> list[str]:
    logs = directory.glob("job/*/ledger/*.jsonl")
    return [line for log in logs for line in log.read_text().splitlines()]


def test_a_second_ctrl_c_ends_the_run_at_once(work, tiny, write_rows) -> None:
    write_rows("in.jsonl", [{"id": n, "prompt": f"row {n}"} for n in range(20000)])
    process = start(
        *("predict", "--model.checkpoint", tiny, "--data.input", "in.jsonl"),
        *("--output_dir", "out", "--data.max_batch_tokens", 100000),  # one long batch
        *("--model.task.max_new_tokens", 100, "--model.task.ignore_eos", "true"),
    )
    try:
        deadline_s = time.monotonic() + 60
        while "row/s" not in Path("stderr").read_text() and time.monotonic() < deadline_s:
            time.sleep(0.05)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        time.sleep(1.5)
        assert process.poll() is None, Path("stderr").read_text()
        assert "stopping after the batch in flight" in Path("stderr").read_text()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 5
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in Path("stderr").read_text()


def test_an_interrupted_fit_ends_within_seconds_with_exit_code_5(work, tiny) -> None:
    Path("train.txt").write_text("so long lives this and this gives life to thee\n" * 500)
    process = start(
        *("fit", "--model.checkpoint", tiny, "--data.train", "train.txt", "--output_dir", "out"),
        *("--data.sequence_length", 32, "--trainer.max_steps", 100_000),
        *("--save.every_n_train_steps", 5, "--trainer.enable_progress_bar", "false"),
    )
    code, said = stop_once_there_is("out/checkpoints/last.ckpt", process, signal.SIGINT)
    assert code == 5, said[-2000:]
    assert "Traceback" not in said
    assert "interrupted" in said.lower()
    assert Path("out/checkpoints/last.ckpt").is_file()
