"""The tables, the file of numbers, and the chart."""

import json
from pathlib import Path

import pytest

from moe_lightning.benchmark import Contestant, Result, Workload
from moe_lightning.benchmark.comparison import difference
from moe_lightning.benchmark.report import Report

WORKLOAD = Workload(Path("rows.jsonl"), (10, 20), 3)


def result(name, speed, rows, *, layers=True, why_not="", planned=(0.0, 0.0)):
    made = Result(Contestant(name, "one machine", "rows", planned_bytes=planned), why_not)
    made.rows = {row["id"]: row for row in rows}
    for factor in () if why_not else (1.0, 1.2, 0.9):
        numbers = {
            "startup_s": 3.0,
            "prefill_tokens_per_s": speed * factor,
            "decode_tokens_per_s": speed * factor / 10,
            "peak_bytes": 5e8,
            "all_bytes": 9e8,
            "num_processes": 2.0,
        }
        if layers:
            for phase in ("prefill", "decode"):
                parts = {
                    "dispatch": 10.0,
                    "compute": 100.0,
                    "combine": 5.0,
                    "wait": 50.0,
                    "gather": 0.0,
                }
                numbers |= {f"{phase}_{part}_us": us for part, us in parts.items()}
                numbers |= {f"{phase}_row_bytes": 8000.0, f"{phase}_weight_bytes": 0.0}
        made.rounds.append(numbers)
    return made


@pytest.fixture
def report():
    rows = [
        {"id": 0, "logprob": -10.0, "num_tokens": 10, "token_ids": [1, 2, 3]},
        {"id": 1, "logprob": -20.0, "num_tokens": 20, "token_ids": [4, 5, 6]},
    ]
    other = [rows[0] | {"logprob": -10.5}, rows[1] | {"token_ids": [4, 9, 6]}]
    results = [
        result("transformers", 500, other, layers=False),
        result("single", 1000, rows),
        result("ep", 2000, rows, planned=(7.0, 9.0)),
        result("tp", 0, [], why_not="3 ranks do not divide 4 heads"),
    ]
    return Report(results, WORKLOAD, 4, {"machine": "one of two cores"})


def test_differences_are_of_a_token_and_up_to_the_first_other_one(report):
    found = difference(report.results[0], report.results[1])
    assert found is not None
    assert found.logprob == pytest.approx(0.05)
    assert found.same_tokens == pytest.approx(4 / 6)
    assert difference(report.results[3], report.results[1]) is None


def test_the_tables_have_a_line_for_everybody(report):
    text = report.as_text()
    speed = next(line for line in text.splitlines() if line.startswith("ep "))
    assert "2,000 ± 15 %" in speed
    assert "500.00 MB, all 2: 900.00 MB" in speed
    assert "0e+00, 100 % of tokens" in speed
    assert "tp: 3 ranks do not divide 4 heads" in text
    assert "2.00 kB of rows" in text
    markdown = report.as_markdown()
    heads = [line for line in markdown.splitlines() if line.startswith("| strategy")]
    assert len(heads) == 3
    assert all(line.count("|") == 9 for line in markdown.splitlines() if "tokens |" in line)


def test_all_numbers_are_in_the_file(report):
    page = json.loads(report.as_json())
    names = [each["name"] for each in page["contestants"]]
    assert names == ["transformers", "single", "ep", "tp"]
    assert len(page["contestants"][2]["rounds"]) == 3
    assert page["contestants"][0]["difference"]["same_tokens"] == pytest.approx(4 / 6)


def test_files_are_written(report, tmp_path):
    report.write(tmp_path)
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "benchmark.md").read_text() == report.as_markdown()
    assert json.loads((tmp_path / "benchmark.json").read_text())


def test_nobody_ran(tmp_path):
    report = Report([result("tp", 0, [], why_not="no")], WORKLOAD, 4, {})
    report.write(tmp_path)
    assert "tp: no" in report.as_text()
