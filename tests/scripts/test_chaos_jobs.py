"""chaos.py: its plans are what they say, it finds what must not be, and a sample runs."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

SAMPLE_SEED = 11
# 30 runs, most with the strategies whose processes start in a moment.
SAMPLE = ("single", "placement", "rpc", "single", "placement", "fsdp", "single")


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "scripts")


def test_plans_are_drawn_by_seed_and_number():
    from chaos_job_plan import STRATEGIES, draw

    plans = [draw(number, 1) for number in range(40)]
    assert plans == [draw(number, 1) for number in range(40)]
    assert plans != [draw(number, 2) for number in range(40)]
    assert [plan.strategy for plan in plans] == [*STRATEGIES] * 10


def test_everybody_is_struck_by_everything_at_all_times():
    from chaos_job_plan import MOST_STRIKES, VICTIMS, Signal, When, draw

    plans = [draw(number, 1) for number in range(2000)]
    assert {len(plan.strikes) for plan in plans} == set(range(1, MOST_STRIKES + 1))
    strikes = [(plan.strategy, strike) for plan in plans for strike in plan.strikes]
    assert {strike.signal for _, strike in strikes} == set(get_args(Signal))
    for strategy, victims in VICTIMS.items():
        own = [strike for of, strike in strikes if of == strategy]
        assert {strike.victim for strike in own if strike.signal == "KILL"} == set(victims)
        assert {strike.when for strike in own} == set(get_args(When))


# What must not be.


@pytest.fixture
def usual():
    from chaos_job_scene import Usual

    stages_s = {"planning": 1.0, "loading": 1.0, "predicting": 1.0, "merging": 1.0}
    return Usual(b'{"id": 0}\n{"id": 1}\n', 2, 1, 4.0, stages_s)


@pytest.fixture
def finished(usual, tmp_path):
    """The files of a job that is as it must be."""
    from chaos_job_watch import JobFiles

    counts = {"num_rows": 2, "num_predictions": 2, "num_errors": 0}
    (tmp_path / "job").mkdir()
    for name, text in {
        "predictions.jsonl": usual.predictions.decode(),
        "_SUCCESS": json.dumps({"counts": counts}),
        "run.json": json.dumps({"num_done_before": 1}),
        "config.yaml": "",
        "job/plan.json": "",
    }.items():
        (tmp_path / name).write_text(text)
    return JobFiles(tmp_path, 2)


def test_a_finished_job_as_it_must_be(finished, usual):
    from chaos_job_verdict import judge_outcome

    assert judge_outcome(finished, usual, [0]) == []


@pytest.mark.parametrize(
    ("name", "text", "wrong"),
    [
        ("predictions.jsonl", '{"id": 1}\n{"id": 0}\n', "not that of an undisturbed run"),
        ("predictions.jsonl", '{"id": 0}\n{"id": 0}\n', "more than once"),
        ("errors.jsonl", "", "files are"),
        ("job/part", "", "job/ holds"),
        ("_SUCCESS", json.dumps({"counts": {"num_rows": 1}}), "_SUCCESS counts"),
        ("run.json", json.dumps({"num_done_before": 0}), "of which 0 were used"),
    ],
)
def test_what_is_wrong_with_a_finished_job_is_found(finished, usual, name, text, wrong):
    from chaos_job_verdict import judge_outcome

    (finished.output / name).write_text(text)
    assert any(wrong in each for each in judge_outcome(finished, usual, [0]))


@pytest.mark.parametrize(
    ("before", "done", "lost", "wrong"),
    [
        ([0], [0, 1], [1, 1], None),
        ([0], [0, 1, 1], [0, 0], "computed twice"),
        ([0, 1], [1], [0, 0], "not any more"),
        ([0], [0], [2, 0], "more than one batch"),
    ],
)
def test_what_is_wrong_with_a_ledger_is_found(before, done, lost, wrong):
    from chaos_job_verdict import judge_rows

    problems = judge_rows(before, done, lost, is_hurried=False)
    assert problems == [] if wrong is None else wrong in problems[0]


@pytest.mark.parametrize(
    ("signal", "victim", "changes", "is_right"),
    [
        ("KILL", "master", {"code": -9}, True),
        ("KILL", "master", {"code": 0}, False),
        ("KILL", "rank", {"code": 6}, True),
        ("KILL", "rank", {"code": 1}, False),
        ("KILL", "rank", {"code": 6, "after_s": 999.0}, False),
        ("KILL", "worker", {"code": 0}, True),
        ("TERM", "master", {"code": 5, "num_rows_unbegun": 9}, True),
        ("TERM", "master", {"code": 0, "num_rows_unbegun": 9}, False),
        ("INT", "group", {"code": 5, "num_rows_unbegun": 9, "after_s": 60.0}, False),
        ("KILL", "master", {"code": -9, "left": "somebody"}, False),
        ("KILL", "rank", {"code": 6, "said": "Traceback"}, False),
        ("KILL", "rank", {"code": -9, "has_hung": True}, False),
    ],
)
def test_what_is_wrong_with_an_ending_is_found(usual, signal, victim, changes, is_right):
    from chaos_job_plan import Strike
    from chaos_job_verdict import Ending, judge_ending

    ending = Ending(Strike(signal, victim, "predicting", 0.5), stage="predicting")
    assert (judge_ending(replace(ending, **changes), usual) == []) == is_right


# Real runs.


def test_a_sample_of_runs_bears_it(tmp_path, capfd):
    import chaos

    turns = Counter(SAMPLE[number % len(SAMPLE)] for number in range(30))
    assert min(turns["rpc"], turns["fsdp"]) >= 4
    options = ["--runs", "30", "--seed", str(SAMPLE_SEED), "--processes", "2"]
    code = chaos.main([*options, "--strategies", ",".join(SAMPLE), "--keep", str(tmp_path / "k")])
    said = capfd.readouterr().out
    print(said)
    assert code == 0, said
