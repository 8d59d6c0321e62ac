"""chaos_rpc.py: it finds what must not be, its plans are what they say, and it runs."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKER = "tcp://127.0.0.1:7000"
TIMEOUT_S = 2.0


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")


# Plans.


def draw(number, **options):
    from chaos_rpc_plan import KINDS
    from chaos_rpc_plan import draw as draw_plan

    settings = {
        "seed": 1,
        "kinds": KINDS,
        "transports": ("zmq", "tensorpipe"),
        "starts": ("hand", "local"),
        "num_workers": 3,
        "timeout_s": TIMEOUT_S,
        "tasks": ("Generate", "Score"),
    }
    return draw_plan(number, **{**settings, **options})


def test_plans_are_drawn_by_seed_and_number():
    plans = [draw(number) for number in range(40)]
    assert plans == [draw(number) for number in range(40)]
    assert plans != [draw(number, seed=2) for number in range(40)]
    assert {(plan.start, plan.transport) for plan in plans} == {
        (start, transport) for start in ("hand", "local") for transport in ("zmq", "tensorpipe")
    }


def test_plans_hold_what_each_sort_needs():
    plans = [draw(number) for number in range(500)]
    for plan in plans:
        assert all(fault.worker < plan.num_workers for fault in plan.faults)
        assert len({fault.worker for fault in plan.faults}) == len(plan.faults)
        stages = [fault.stage for fault in plan.faults]
        if any(fault.kind == "restart" for fault in plan.faults):
            assert plan.start == "hand", "nobody starts a local worker again"
        if plan.sort == "two":
            assert len(plan.faults) == 2
        else:
            assert len(plan.faults) == 1
        if plan.sort in ("last", "adopted"):
            assert plan.num_workers == 1
        if plan.sort != "one":
            assert not {"start", "end"} & set(stages)
            assert all(fault.awake_s is None for fault in plan.faults)
        if plan.sort == "replicas":
            assert "load" not in stages
        if plan.task == "Score":
            assert "decode" not in stages
    faults = [fault for plan in plans for fault in plan.faults]
    assert {fault.kind for fault in faults} == {
        *("kill", "stop", "restart", "kill_master", "nap_master", "interrupt", "interrupt_twice")
    }
    assert {plan.sort for plan in plans} == {"one", "two", "replicas", "last", "adopted"}
    naps = [fault.awake_s for fault in faults if fault.kind == "stop" and fault.awake_s]
    assert min(naps) < 0.8 * TIMEOUT_S < 1.2 * TIMEOUT_S < max(naps)
    assert all(f.awake_s < 0.8 * TIMEOUT_S for f in faults if f.kind == "nap_master")


def test_only_faults_that_were_asked_for_are_drawn():
    for number in range(50):
        assert {f.kind for f in draw(number, kinds=["stop"]).faults} == {"stop"}
        assert {f.kind for f in draw(number, kinds=["kill_master"]).faults} == {"kill_master"}


# Verdicts.

ROWS = [{"id": "a", "text": "to be"}, {"id": "b", "text": "or not"}]


@pytest.fixture
def reference(tmp_path):
    path = tmp_path / "reference.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def judged(tmp_path, reference):
    """The violations of a made-up run: a worker is killed at 5 s, adopted, and all ends well."""
    from chaos_rpc_nursery import Child
    from chaos_rpc_plan import Fault, Plan
    from chaos_rpc_record import Mark, Run, Setting, Strike
    from chaos_rpc_verdict import judge

    def judged(
        *,
        sort="one",
        kind="kill",
        at_s=5.0,
        awake_s=None,
        lost_s=5.7,
        adopted="worker x adopted 3 experts",
        code=0,
        said="",
        rows=ROWS,
        end_s=9.0,
        **changes,
    ):
        times = {"began": 1.0, "met": 2.0, "ready": 3.0, "prefill": 3.1, "decode": 4.0}
        marks = [Mark(name, s, "") for name, s in times.items() if s < end_s]
        if lost_s is not None:
            marks.append(Mark("lost", lost_s, f"worker {WORKER} is lost: its connection closed"))
        if adopted is not None:
            marks.append(Mark("adopted", (lost_s or 0) + 0.1, adopted))
        if code == 0:
            marks += [Mark("done", end_s - 0.2, ""), Mark("left", end_s - 0.1, "")]
        fault = Fault(kind, 0, "decode", turn=0, fraction=0.5, awake_s=awake_s)
        strike = Strike(fault, at_s, "" if fault.is_masters else WORKER)
        if awake_s is not None:
            strike.awake_at_s = at_s + awake_s
        directory = tmp_path / "run"
        (directory / "out").mkdir(parents=True)
        if rows is not None:
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (directory / "out" / "predictions.jsonl").write_text(text)
        master = Child(directory / "master.log")
        master.log.write_text(said)
        master.start_s = 0.0
        master.has_ended(code, end_s)
        plan = Plan(0, sort, "hand", "zmq", "Generate", 3, (fault,))
        run = Run(plan, directory, master, sorted(marks, key=lambda m: m.at_s), [strike])
        run.names = {0: WORKER}
        run = replace(run, **changes)
        usual_master = Child(master.log)
        usual_master.start_s = 0.0
        usual_master.has_ended(0, 8.0)
        calm = [mark for mark in marks if mark.name not in ("lost", "adopted")]
        usual = replace(run, master=usual_master, marks=calm)
        setting = Setting(
            None, tmp_path, "demo", reference, 24, 600, TIMEOUT_S, {"hand": 4.0, "local": 60.0}
        )
        return judge(run, setting, reference, usual).violations

    return judged


GOOD = {
    "a kill": {},
    "a stop": {"kind": "stop", "lost_s": 7.1},
    "a nap": {"kind": "stop", "awake_s": 1.0, "lost_s": None, "adopted": None},
    "a long nap": {"kind": "stop", "awake_s": 3.0, "lost_s": 7.1},
    "replicas": {"sort": "replicas", "adopted": None, "bytes_before": 10, "bytes_after": 10},
    "others have read": {"bytes_before": 10, "bytes_after": 20},
    "the master adopts": {"sort": "adopted", "adopted": "the master adopted 3 experts"},
    "at the end, unnoticed": {"at_s": 8.5, "lost_s": None, "adopted": None},
    "the last": {
        "sort": "last",
        "code": 6,
        "said": f"lost {WORKER}. Nobody adopts 2 experts (layer 0: 1, 2)",
        "rows": None,
        "adopted": None,
    },
    "before it was met": {
        "at_s": 1.5,
        "code": 2,
        "said": f"no answer from {WORKER}",
        "rows": None,
        "lost_s": None,
        "adopted": None,
    },
    "a killed master": {
        **{"kind": "kill_master", "code": -9, "rows": None, "lost_s": None, "adopted": None},
        "end_s": 5.0,
    },
    "noticed late by a busy machine": {"lost_s": 6.2, "waits": [(4.0, 1.0), (6.0, 1.3)]},
    "Ctrl-C": {
        **{"kind": "interrupt", "code": 5, "rows": None, "lost_s": None, "adopted": None},
        "end_s": 6.5,
    },
}


@pytest.mark.parametrize("run", GOOD.values(), ids=GOOD.keys())
def test_a_run_that_bore_it_has_no_violations(run, judged):
    assert judged(**run) == []


BAD = {
    "a missing row": ({"rows": ROWS[:1]}, "1 rows of 2"),
    "a row twice": ({"rows": [*ROWS, ROWS[1]]}, "3 rows of 2"),
    "another text": ({"rows": [ROWS[0], {"id": "b", "text": "or"}]}, "rows ['b']"),
    "no rows": ({"rows": None}, "is missing"),
    "another exit code": ({"code": 1}, "exit code 1"),
    "6 although others were there": ({"code": 6, "said": WORKER}, "exit code 6"),
    "a traceback": ({"said": "Traceback (most recent call last)"}, "traceback"),
    "noticed late": ({"lost_s": 6.2}, "was given up after 1.20 s, later than 1.00 s"),
    "noticed late by a machine that was busy before": (
        {"lost_s": 6.2, "waits": [(4.0, 1.0), (6.0, 1.1)]},
        "was given up after 1.20 s, later than 1.10 s",
    ),
    "never noticed": ({"lost_s": None, "adopted": None}, "nobody noticed"),
    "a stop noticed late": ({"kind": "stop", "lost_s": 7.3}, "after 2.30 s, later than 2.20 s"),
    "a nap taken for a loss": ({"kind": "stop", "awake_s": 1.0}, "given up after a nap of 1.0 s"),
    "nobody adopted": ({"adopted": None}, "nobody adopted"),
    "nobody has read": ({"bytes_before": 10, "bytes_after": 10}, "nobody has read"),
    "replicas, and yet adopted": ({"sort": "replicas"}, "replicas were there"),
    "replicas, and yet read": (
        {"sort": "replicas", "adopted": None, "bytes_before": 10, "bytes_after": 12},
        "2 bytes were read",
    ),
    "not the master adopts": ({"sort": "adopted"}, "the master was to adopt"),
    "it went on without anybody": ({"sort": "last"}, "without its last worker"),
    "the last is not named": (
        {"sort": "last", "code": 6, "said": "layer, expert", "rows": None},
        f"do not name {WORKER}",
    ),
    "layers are not named": (
        {"sort": "last", "code": 6, "said": f"{WORKER} expert", "rows": None},
        "do not name layer",
    ),
    "half an answer": (
        {"sort": "last", "code": 6, "said": f"{WORKER} layer expert"},
        "although it failed",
    ),
    "who is absent is not named": (
        {"at_s": 1.5, "code": 2, "said": "no answer", "rows": None},
        "last words name none",
    ),
    "workers outlive their master": (
        {"kind": "kill_master", "code": -9, "rows": None, "orphans_s": 3.0},
        "3.0 s after the master",
    ),
    "a master that napped gives up": (
        {"kind": "nap_master", "awake_s": 1.0},
        "after a nap, the master",
    ),
    "Ctrl-C takes long": (
        {"kind": "interrupt_twice", "code": 5, "rows": None, "end_s": 9.0},
        "4.00 s after it was interrupted",
    ),
    "interrupted by nobody": ({"code": 5, "rows": None}, "nobody has interrupted it"),
    "it took long": ({"end_s": 36.0}, "it took 36.0 s, more than 35.0 s"),
}


@pytest.mark.parametrize(("run", "violation"), BAD.values(), ids=BAD.keys())
def test_what_must_not_be_is_found(run, violation, judged):
    assert any(violation in each for each in judged(**run)), judged


def test_scores_may_differ_by_a_ten_thousandth(tmp_path):
    from chaos_rpc_verdict import compare

    paths = [tmp_path / name for name in ("wanted", "close", "far")]
    for path, logprob in zip(paths, (-0.5, -0.50009, -0.50011), strict=True):
        path.write_text(json.dumps({"id": "a", "logprob": logprob}) + "\n")
    assert compare(paths[0], paths[1]) == []
    assert compare(paths[0], paths[2]) == ["rows ['a'] (of 1) are not as usual"]


# The script.


@pytest.fixture
def line():
    from chaos_rpc_report import Line

    def line(**changes):
        values = {
            **{"plan": draw(0), "stages": ["decode"], "outcome": "ok", "noticed_s": [0.66]},
            **{"reasons": ["its connection closed"], "adopted_s": 0.1, "orphans_s": 0.0},
            **{"run_s": 3.0, "usual_s": 2.0, "waited_s": 0.0, "violations": []},
        }
        return Line(**{**values, **changes})

    return line


@pytest.mark.parametrize("violations", [[], ["two rows are missing"]])
def test_a_violation_is_exit_code_1_and_leaves_the_logs(violations, line, monkeypatch, capsys):
    import chaos_rpc

    directories = []

    def carry_out(*_, directory, **__):
        directories.append(directory)
        yield line()
        yield line(violations=violations)

    monkeypatch.setattr(chaos_rpc, "carry_out", carry_out)
    assert chaos_rpc.main(runs=2, seed=7) == len(violations)
    said = capsys.readouterr().out
    assert "seed 7" in said
    assert ("VIOLATION two rows are missing" in said) == bool(violations)
    assert directories[0].exists() == bool(violations)


@pytest.mark.slow
def test_the_script_runs(tmp_path):
    report = tmp_path / "chaos.json"
    options = {
        **{"runs": 2, "seed": 3, "faults": "kill,stop", "transport": "zmq", "starts": "hand"},
        **{"tasks": "Generate", "workers": 2, "timeout_s": 1, "rows": 4, "tokens": 8},
        "json": report,
    }
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "scripts" / "chaos_rpc.py")),
            *(f"--{name}={value}" for name, value in options.items()),
        ],
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "seed 3: 3 runs" in done.stdout
    made = json.loads(report.read_text())
    assert made["seed"] == 3
    assert [run["plan"]["number"] for run in made["runs"]] == [0, 1, 999]
    assert all(run["outcome"] == "ok" for run in made["runs"])
    assert all(run["plan"]["faults"] for run in made["runs"][:2])
