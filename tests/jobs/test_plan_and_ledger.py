"""What is computed together; lines with checksums; what of a log counts."""

import json

import numpy as np
import pytest

from moe_lightning.errors import StoppedError
from moe_lightning.jobs import Patience, work_units
from moe_lightning.jobs.ledger import PartEntry, decode, encode, sealed_bytes
from moe_lightning.jobs.plan import JobPlan, differences

BATCHES = [np.array(rows) for rows in ([4, 0], [3, 1], [2, 6, 5])]


def units(**options):
    return [(number, rows.tolist()) for number, rows in work_units(BATCHES, **options)]


def test_units_of_one_rank_are_the_batches():
    assert units() == [(0, [4, 0]), (1, [3, 1]), (2, [2, 6, 5])]


def test_the_rows_of_an_incomplete_round_are_dealt_to_all_ranks():
    assert units(num_ranks=2) == [(0, [4, 0]), (1, [3, 1]), (3, [2, 5]), (4, [6])]
    assert units(num_ranks=4) == [(3, [4, 2]), (4, [0, 6]), (5, [3, 5]), (6, [1])]
    assert len(units(num_ranks=9)) == 7


def test_what_is_done_is_left_out_and_nothing_else_changes():
    is_done = np.array([False, True, False, True, False, False, True])
    assert units(is_done_N=is_done) == [(0, [4, 0]), (2, [2, 5])]
    assert units(num_ranks=2, is_done_N=is_done) == [(0, [4, 0]), (3, [2, 5])]
    assert units(is_done_N=np.ones(7, dtype=bool)) == []


def test_suspects_are_alone():
    is_done = np.array([False, False, True, False, False, False, False])
    assert units(is_done_N=is_done, alone={3, 1, 2}) == [
        (0, [4, 0]),
        (2, [6, 5]),
        (4, [1]),
        (6, [3]),
    ]


def test_no_rows():
    assert work_units([], num_ranks=3) == []
    assert list(JobPlan().lines()) == []


def test_the_plan_is_written_as_json_lines():
    assert b"".join(JobPlan({}, 7, BATCHES).lines()) == b"[4,0]\n[3,1]\n[2,6,5]\n"


def test_differences_name_the_values():
    before = {"data": {"bytes": 5, "format": "auto"}, "seed": 0}
    now = {"data": {"bytes": 6, "format": "auto"}, "task": {"name": "Score"}}
    assert differences(before, now) == [
        "data.bytes: 5, now 6",
        "seed: 0, now not there",
        'task.name: not there, now "Score"',
    ]


ENTRIES = [PartEntry(f"job/a/parts/{n}.part", n, "ab" * 32, 1, 0) for n in range(3)]


def test_a_ledger_is_read_back_and_damaged_lines_are_left_out():
    lines = [encode(entry) for entry in ENTRIES]
    assert decode(b"".join(lines)) == ENTRIES
    log = b"".join(lines)
    for length in range(len(log)):
        whole = sum(length >= len(b"".join(lines[: n + 1])) for n in range(3))
        assert decode(log[:length]) == ENTRIES[:whole]
    for at in range(len(lines[1])):
        damaged = lines[1][:at] + bytes([lines[1][at] ^ 4]) + lines[1][at + 1 :]
        found = decode(lines[0] + damaged + lines[2])
        assert found in ([ENTRIES[0], ENTRIES[2]], [ENTRIES[0]])  # or the line end is damaged
    assert decode(lines[0] + lines[1][:30] + b"\n" + lines[2]) == [ENTRIES[0], ENTRIES[2]]


def test_a_log_counts_up_to_where_it_was_when_the_next_epoch_began():
    claims = {
        1: json.dumps({"seals": {}}).encode(),
        2: b'{"seals": {"1-0": 1',  # crashed while it began
        3: json.dumps({"seals": {"1-0": 100}}).encode(),
        4: json.dumps({"seals": {"1-0": 170, "1-1": 80, "3-0": 50}}).encode(),
    }
    assert sealed_bytes("1-0", 1, claims) == 100
    assert sealed_bytes("1-1", 1, claims) == 0  # came after epoch 3 had begun
    assert sealed_bytes("3-0", 3, claims) == 50
    assert sealed_bytes("4-0", 4, claims) is None
    assert sealed_bytes("2-0", 2, claims) == 0


class FullDisk:
    """A disk that is full for so many tries."""

    def __init__(self, num_failures, errno=28):
        self.num_failures = num_failures
        self.errno = errno
        self.now_s = 0.0
        self.said = []
        self.is_stopped = False

    def write(self):
        if self.num_failures:
            self.num_failures -= 1
            raise OSError(self.errno, "no")
        return "written"

    def sleep(self, seconds):
        self.now_s += seconds

    def patience(self, wait_s):
        return Patience(
            wait_s,
            5.0,
            is_stopped=lambda: self.is_stopped,
            say=self.said.append,
            clock=lambda: self.now_s,
            sleep=self.sleep,
        )


def test_a_full_disk_is_waited_for():
    disk = FullDisk(3)
    assert disk.patience(60.0)(disk.write, "out") == "written"
    assert disk.now_s == pytest.approx(15.0)
    assert len(disk.said) == 2
    assert "out: the disk is full. Waiting for space, up to 60 s" in disk.said[0]


def test_patience_ends():
    disk = FullDisk(99)
    with pytest.raises(StoppedError, match="the disk is full"):
        disk.patience(12.0)(disk.write, "out")
    assert disk.now_s == pytest.approx(12.0)


def test_who_wants_to_stop_does_not_wait():
    disk = FullDisk(99)
    disk.is_stopped = True
    with pytest.raises(StoppedError, match="the same command continues"):
        disk.patience(1000.0)(disk.write, "out")
    assert disk.now_s == 0


def test_a_failing_disk_is_not_waited_for():
    disk = FullDisk(1, errno=5)
    with pytest.raises(StoppedError, match="writing failed"):
        disk.patience(60.0)(disk.write, "out")
    assert disk.now_s == 0
