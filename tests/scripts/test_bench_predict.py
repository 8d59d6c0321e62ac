"""The benchmark runs at a tiny size, and its two sides agree there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    directory = tmp_path_factory.mktemp("bench")
    sizes = {
        "rows": 12,
        "prompt_max": 40,
        "answer_max": 12,
        "hidden_size": 64,
        "num_layers": 2,
        "num_experts": 8,
        "expert_size": 32,
        "vocab_size": 512,
        "repetitions_score": 1,
        "repetitions_generate": 1,
        "threads": 1,
        "seconds_machine": 0.05,
    }
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "scripts" / "bench_predict.py"),
            "--checkpoint=" + str(directory / "missing"),
            "--json=" + str(directory / "report.json"),
            *(f"--{name}={value}" for name, value in sizes.items()),
        ],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((directory / "report.json").read_text()), done.stdout


def test_a_missing_checkpoint_is_skipped_with_a_message(report: tuple[dict, str]) -> None:
    assert "demo: skipped" in report[1]


def test_both_tasks_of_the_random_model_are_compared(report: tuple[dict, str]) -> None:
    compared = [(c["model"], c["task"]) for c in report[0]["comparisons"]]
    assert compared == [("random", "score"), ("random", "generate")]


def test_both_sides_give_the_same_answers(report: tuple[dict, str]) -> None:
    score, generate = (c["sameness"] for c in report[0]["comparisons"])
    assert score["max_logprob_difference"] < 1e-4  # the contract's tolerance of fp32 scores
    assert generate["num_unexplained"] == 0


def test_useful_tokens_do_not_depend_on_padding(report: tuple[dict, str]) -> None:
    score, generate = report[0]["comparisons"]
    assert generate["tokens"] - generate["new_tokens"] == score["tokens"]
    assert 12 * 4 <= score["tokens"] <= 12 * 40
    assert 12 * 4 <= generate["new_tokens"] <= 12 * 12


def test_the_parts_add_up_and_no_run_beats_the_limit(report: tuple[dict, str]) -> None:
    for comparison in report[0]["comparisons"]:
        assert all(part_s >= 0 for part_s in comparison["profile"]["seconds"].values())
        assert all(0 < share < 1 for share in comparison["fraction_of_limit"].values())
    generate = report[0]["comparisons"][1]
    assert generate["profile"]["num_decode_steps"] >= 11  # the longest answer's, but its first
