"""predict into a disk that is really full: a tmpfs of 256 KiB, which only root can mount."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import pytest

from moe_lightning.callbacks import throughput
from moe_lightning.cli.main import main
from moe_lightning.jobs import patience

NUM_ROWS = 3000
SMALL, LARGE = "256k", "4m"
KIB = 1024


def mount(*arguments: object) -> None:
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise OSError(done.stderr.strip())


@pytest.fixture
def disk(tmp_path):
    """A directory with 256 KiB."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("a full disk cannot be had here: mounting a tmpfs needs Linux and root")
    directory = tmp_path / "disk"
    directory.mkdir()
    try:
        mount("-t", "tmpfs", "-o", f"size={SMALL}", "tmpfs", directory)
    except OSError as error:
        pytest.skip(f"a full disk cannot be had here: {error}")
    yield directory
    subprocess.run(["umount", "--lazy", directory], check=True)


def make_room(directory: Path) -> None:
    mount("-o", f"remount,size={LARGE}", directory)


def fill(directory: Path, free_kib: int) -> None:
    """Leave so much space."""
    found = os.statvfs(directory)
    rest = found.f_bavail * found.f_frsize - free_kib * KIB
    assert rest >= 0, "it is that full already"
    (directory / "filler").write_bytes(bytes(rest))


@pytest.fixture(scope="module")
def own(tiny, tmp_path_factory):
    """The command, without its output directory. Each of its 27 parts takes 16 KiB."""
    path = tmp_path_factory.mktemp("rows") / "in.jsonl"
    rows = [{"id": f"row-{n:05d}", "prompt": f"the row {n}"} for n in range(NUM_ROWS)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    options = ("--data.input", path, "--data.max_batch_tokens", 1024, "--model.task", "Score")
    return ("predict", "--model.checkpoint", tiny, *options)


@pytest.fixture(scope="module")
def expected(own, tmp_path_factory):
    """What a run on a larger disk gives."""
    directory = tmp_path_factory.mktemp("undisturbed")
    assert main([str(word) for word in (*own, "--output_dir", directory)]) == 0
    return (directory / "predictions.jsonl").read_bytes()


@pytest.fixture
def predict(run, own, disk):
    """The same command again and again, into the small disk."""
    return lambda *arguments: run(*own, "--output_dir", disk, *arguments)


def committed_rows(directory: Path) -> int:
    """Rows that the ledger has, every line and every part of which is whole."""
    num_rows = 0
    for log in directory.glob("job/*/ledger/*.jsonl"):
        content = log.read_bytes()
        assert content.endswith(b"\n") or not content  # never half a line
        for line in content.splitlines():
            text, checksum = line.split(b"\t")
            assert int(checksum, 16) == zlib.crc32(text)
            entry = json.loads(text)
            part = (directory / entry["part"]).read_bytes()
            assert hashlib.sha256(part).hexdigest() == entry["sha256"]
            assert part.count(b"\n") == entry["num_rows"]
            num_rows += entry["num_rows"]
    return num_rows


def temporary_files(directory: Path) -> list[Path]:
    found = [*directory.rglob("job/tmp/*"), *directory.rglob("*.tmp")]
    return [path for path in found if path.is_file()]


def check_stopped(finished, directory: Path) -> None:
    assert finished.code == 5, finished.err
    assert "Traceback" not in finished.err
    assert "disk is full" in finished.err
    assert str(directory) in finished.err
    assert "make room, and the same command continues" in finished.err.lower()
    assert temporary_files(directory) == []


def check_completed(finished, directory: Path, expected: bytes) -> None:
    assert finished.code == 0, finished.err
    assert (directory / "predictions.jsonl").read_bytes() == expected
    names = {path.name for path in directory.iterdir()} - {"filler"}
    assert names == {"predictions.jsonl", "_SUCCESS", "run.json", "config.yaml", "job"}
    report = json.loads((directory / "run.json").read_text())
    assert (report["num_rows"], report["num_predictions"]) == (NUM_ROWS, NUM_ROWS)
    assert report["exit_reason"] == "finished"


def test_a_full_disk_ends_the_run_and_with_more_room_the_same_command_completes_it(
    predict, disk, expected
) -> None:
    finished = predict("--writer.full_disk_wait_s", 2)
    check_stopped(finished, disk)
    assert "Waiting for space, up to 2 s" in finished.err
    num_committed = committed_rows(disk)
    assert 0 < num_committed < NUM_ROWS
    assert json.loads((disk / "run.json").read_text())["exit_reason"] == "interrupted"
    assert not (disk / "_SUCCESS").exists()
    make_room(disk)
    check_completed(predict("--writer.full_disk_wait_s", 2), disk, expected)
    report = json.loads((disk / "run.json").read_text())
    assert report["num_done_before"] == num_committed


def test_room_that_is_made_while_the_run_waits_lets_it_go_on(
    predict, disk, expected, monkeypatch
) -> None:
    is_waiting = threading.Event()
    say = patience._to_stderr

    def say_and_note(text: str) -> None:
        say(text)
        is_waiting.set()

    monkeypatch.setattr(patience, "_to_stderr", say_and_note)
    seen = []

    def make_room_then() -> None:
        if is_waiting.wait(60):
            seen.append(committed_rows(disk))
            make_room(disk)

    helper = threading.Thread(target=make_room_then)
    helper.start()
    finished = predict("--writer.full_disk_wait_s", 60)
    is_waiting.set()
    helper.join()
    check_completed(finished, disk, expected)
    assert 0 < seen[0] < NUM_ROWS
    assert "Waiting for space, up to 60 s" in finished.err
    assert "there is space again" in finished.err
    report = json.loads((disk / "run.json").read_text())
    assert report["num_done_before"] == 0


# Which file is the first that finds no room depends on what is left: of a new job its batches,
# plan, epoch, config.yaml or first part; of one that goes on its epoch, config.yaml, next part, or
# the line of the ledger after that.
@pytest.mark.parametrize("free_kib", [0, 20, 24, 28, 32])
def test_whichever_file_of_a_new_job_finds_the_disk_full_the_run_ends_with_5(
    predict, disk, expected, free_kib
) -> None:
    fill(disk, free_kib)
    check_stopped(predict("--writer.full_disk_wait_s", 0), disk)
    assert committed_rows(disk) == 0
    make_room(disk)
    check_completed(predict(), disk, expected)


@pytest.mark.parametrize("free_kib", [0, 4, 8, 12, 24])
def test_whichever_file_of_a_job_that_goes_on_finds_the_disk_full_the_run_ends_with_5(
    predict, disk, expected, free_kib
) -> None:
    assert predict("--trainer.limit_predict_batches", 5).code == 0
    num_committed = committed_rows(disk)
    assert 0 < num_committed < NUM_ROWS
    fill(disk, free_kib)
    check_stopped(predict("--writer.full_disk_wait_s", 0), disk)
    assert committed_rows(disk) == num_committed
    make_room(disk)
    check_completed(predict(), disk, expected)
    report = json.loads((disk / "run.json").read_text())
    assert report["num_done_before"] == num_committed


def test_attempts_to_begin_on_a_full_disk_leave_nothing_that_adds_up(predict, disk) -> None:
    fill(disk, 20)  # enough for the batches of the plan
    found = []
    for _ in range(3):
        check_stopped(predict("--writer.full_disk_wait_s", 0), disk)
        found.append(os.statvfs(disk).f_bavail)
    assert found[0] == found[1] == found[2]


def test_no_room_for_the_report_of_a_finished_job_is_exit_code_5_too(
    run, own, work, expected, monkeypatch
) -> None:
    def fail(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(throughput, "write_atomically", fail)
        finished = run(*own, "--output_dir", "out")
    assert finished.code == 5, finished.err
    assert "out/run.json: the disk is full" in finished.err
    again = run(*own, "--output_dir", "out")
    assert again.code == 0, again.err
    assert Path("out/predictions.jsonl").read_bytes() == expected
