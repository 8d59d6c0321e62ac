"""The benchmark of models over ranks runs, and its contestants give the same scores."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
TINY = ["--rounds", "1", "--rows", "32", "--hidden", "64", "--layers", "2", "--new-tokens", "2"]


@pytest.mark.wide
def test_ours_and_the_baseline_give_the_same_scores(tmp_path):
    sides = ["fsdp: baseline", "ep: ours"]
    out = tmp_path / "result.json"
    options = [*TINY, "--only", *sides, "--tasks", "score", "--out", out]
    finished = subprocess.run(
        [sys.executable, SCRIPTS / "bench_sharded.py", *options],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert all(side in finished.stdout for side in sides)
    found = json.loads(out.read_text())["results"]["score"]
    assert len(found["fsdp: baseline"]["scores"]) == 32
    assert found["ep: ours"]["largest_difference"] < 1e-3
