"""Who runs when, and what comes of their reports."""

import json
from pathlib import Path

import pytest

from moe_lightning.benchmark import Contestant, Limits, Result, Setup, Workload, compete, rounds
from moe_lightning.benchmark.processes import Ran

WORKLOAD = Workload(Path("rows.jsonl"), (10, 20, 30), 5)  # 60 tokens of prompts, 12 decoded
PARTS = {"dispatch": 0.001, "compute": 0.002, "combine": 0.003, "wait": 0.004, "gather": 0.0}


def phase(begin_s, end_s, *, times=1, passes=2, row_bytes=0):
    parts = {name: times * seconds for name, seconds in PARTS.items()}
    seen = {"parts_s": parts, "num_passes": passes, "row_bytes": row_bytes, "weight_bytes": 0}
    return {"begin_s": begin_s, "end_s": end_s, **seen}


def report(rows, shift_s=0.0):
    phases = {
        "score": phase(102.0, 103.0),
        "prefill": phase(110.0 + shift_s, 112.0 + shift_s, row_bytes=600),
        "decode": phase(120.0 + shift_s, 126.0 + shift_s, times=3, passes=6, row_bytes=1800),
    }
    return {"phases": phases, "rows": rows, "device_bytes": 0}


@pytest.fixture
def setup(tmp_path):
    return Setup("demo", "float32", "auto", "cpu", 1000, tmp_path)


class Starts(list):
    """Names and tasks of who was started, and who is going to fail."""

    def __init__(self):
        self.fails = {}

    @property
    def names(self):
        return [name for name, _ in self]


@pytest.fixture
def starts(monkeypatch):
    """Nothing is started: the ranks' reports are made up."""
    found = Starts()

    def run(command, log, *, limit_s, environment):
        task = json.loads(Path(command[-1]).read_text())
        out = Path(task["out"])
        name = out.name.rpartition("-")[0]
        found.append((name, task))
        if name in found.fails:
            return Ran(100.0, found.fails[name], ())
        for rank in range(task["num_devices"]):
            one = report([{"id": rank, "token_ids": [1, 2]}], 0.5 * rank)
            (out / f"rank-{rank}.json").write_text(json.dumps(one))
        return Ran(100.0, "", (300, 200))

    monkeypatch.setattr(rounds, "run_watched", run)
    return found


def results_of(*names, num_devices=1, strategy="moe_ep", why_not=""):
    made = [
        Contestant(name, "one machine", "-", strategy, num_devices=num_devices, why_not=why_not)
        for name in names
    ]
    return [Result(each, each.why_not) for each in made]


def test_every_other_round_goes_the_other_way(setup, starts):
    compete(results_of("a", "b", "c"), WORKLOAD, setup, Limits(rounds=3))
    assert starts.names == ["a", "b", "c", "c", "b", "a", "a", "b", "c"]


def test_no_round_is_begun_that_would_end_too_late(setup, starts, monkeypatch):
    now_s = iter(range(0, 1000, 10))  # whenever it is asked, 10 s later
    monkeypatch.setattr(rounds.time, "monotonic", lambda: float(next(now_s)))
    compete(results_of("a"), WORKLOAD, setup, Limits(rounds=9, total_s=45))
    assert len(starts) == 3


def test_who_failed_or_cannot_run_is_left_out(setup, starts):
    starts.fails["b"] = "exit code 1: no"
    results = results_of("a", "b") + results_of("c", why_not="no heads")
    compete(results, WORKLOAD, setup, Limits(rounds=2))
    assert starts.names == ["a", "b", "a"]
    assert [each.why_not for each in results] == ["", "exit code 1: no", "no heads"]
    assert [len(each.rounds) for each in results] == [2, 0, 0]


def test_what_a_round_says(setup, starts):
    (result,) = results_of("ep", num_devices=2)
    compete([result], WORKLOAD, setup, Limits(rounds=1))
    (numbers,) = result.rounds
    # From the first rank's beginning to the last one's end; the last phase has both.
    assert numbers["prefill_tokens_per_s"] == pytest.approx(60 / 2.5)
    assert numbers["decode_tokens_per_s"] == pytest.approx(12 / (6.5 - 2.5))
    assert numbers["startup_s"] == pytest.approx(2.0)
    assert (numbers["peak_bytes"], numbers["all_bytes"], numbers["num_processes"]) == (300, 500, 2)
    assert numbers["prefill_wait_us"] == pytest.approx(2000)
    assert numbers["decode_wait_us"] == pytest.approx(2 * 8000 / 8)
    assert numbers["prefill_row_bytes"] == pytest.approx(2 * 600 / 60)
    assert numbers["decode_row_bytes"] == pytest.approx(2 * 1200 / 12)
    assert result.rows == {0: {"id": 0, "token_ids": [1, 2]}, 1: {"id": 1, "token_ids": [1, 2]}}


def test_after_ctrl_c_there_is_what_there_was(setup, starts, monkeypatch):
    results = results_of("a", "b")
    run = rounds.run_watched

    def interrupted(command, *args, **kwargs):
        if "b-0" in command[-1]:
            raise KeyboardInterrupt
        return run(command, *args, **kwargs)

    monkeypatch.setattr(rounds, "run_watched", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compete(results, WORKLOAD, setup, Limits())
    assert [len(each.rounds) for each in results] == [1, 0]
