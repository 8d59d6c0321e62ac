"""The benchmark of jobs runs at a tiny size, and its shares follow from its times."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WAYS = ["job", "none", "none again", "bare"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bench")
    path = directory / "report.json"
    options = {"rounds": 1, "tasks": "[score]", "rows": "[3,7]", "directory": directory}
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "scripts" / "bench_jobs.py"),
            *(f"--{name}={value}" for name, value in options.items()),
            f"--json_file={path}",
        ],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    # So few rows take so little time that the job is a large part of it: verdict 1.
    assert done.returncode in (0, 1), done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(path.read_text()), done.stdout, done.returncode


def test_two_tables_with_a_line_for_each_case_are_printed(bench) -> None:
    _, printed, _ = bench
    for heading in ("| case | rows | batches | without: CPU s", "| case | setup: CPU ms"):
        start = printed.index(heading)
        lines = printed[start:].split("\n")[:4]
        assert len({line.count("|") for line in lines}) == 1, lines
        assert set(lines[1]) == set("|-:")
        assert [line.split(" | ")[0] for line in lines[2:]] == [
            "| score, 3 rows",
            "| score, 7 rows",
        ]
    for word in ("torch", "lightning", "cores", "outputs on", "1 rounds", "first job"):
        assert word in printed


def test_every_way_ran_and_the_verdict_follows_from_the_times(bench) -> None:
    report, printed, code = bench
    is_cheap = []
    for case, num_rows in zip(report["cases"], (3, 7), strict=True):
        assert (case["rows"], case["batches"]) == (num_rows, 1)
        assert list(case["runs"]) == WAYS
        for runs in case["runs"].values():
            assert len(runs) == 1
            assert min(runs[0]) > 0
        (inside,), (run,) = case["inside"], case["runs"]["job"]
        for clock in (0, 1):
            assert inside["commits"][clock] <= inside["batch ends"][clock]
        hooks = [inside[hook] for hook in ("setup", "batch ends", "teardown")]
        shares = [sum(hook[clock] for hook in hooks) / run[clock] for clock in (0, 1)]
        assert min(shares) > 0
        assert max(shares) < 1
        assert f"| {100 * shares[0]:.2f} % | {100 * shares[1]:.2f} % |" in printed
        is_cheap.append(max(shares) <= 0.02)
    assert code == int(not all(is_cheap))
