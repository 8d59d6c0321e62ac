"""A row that makes the model raise while other ranks compute with this one: found by restarts."""

import json
import os
import subprocess
import sys

BAD = 5
PROGRAM = """
import sys
from moe_lightning.cli.main import main
from moe_lightning.tasks import Score

run = Score.run

def run_or_raise(self, runner, rows, **options):
    if any(row.id == {bad} for row in rows):
        raise RuntimeError("index 99 is out of bounds")
    return run(self, runner, rows, **options)

Score.run = run_or_raise
sys.exit(main(sys.argv[1:]))
"""


def test_a_bad_row_is_found_in_two_restarts_and_the_others_are_answered(tiny, tmp_path) -> None:
    rows = [{"id": n, "prompt": f"row {n}"} for n in range(12)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "program.py").write_text(PROGRAM.format(bad=BAD))
    command = [
        *(sys.executable, str(tmp_path / "program.py"), "predict", "--model.checkpoint", str(tiny)),
        *("--data.input", str(tmp_path / "in.jsonl"), "--output_dir", str(tmp_path / "out")),
        *("--model.task", "Score", "--data.max_batch_tokens", "30"),
        *("--trainer.strategy", "moe_fsdp", "--trainer.accelerator", "cpu"),
        *("--trainer.devices", "2"),
    ]

    def run():
        return subprocess.run(
            command,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )

    first = run()
    assert first.returncode in (5, 6), first.stderr
    assert "index 99 is out of bounds" in first.stderr
    assert "computes these rows one at a time" in first.stderr
    second = run()
    assert second.returncode in (5, 6), second.stderr
    assert f"row {BAD}" in second.stderr
    third = run()
    assert third.returncode == 3, third.stderr
    out = tmp_path / "out"
    answers = [json.loads(line) for line in (out / "predictions.jsonl").open()]
    assert [row["id"] for row in answers] == [n for n in range(12) if n != BAD]
    (error,) = [json.loads(line) for line in (out / "errors.jsonl").open()]
    assert (error["id"], error["line"], error["stage"]) == (BAD, BAD + 1, "compute")
    assert error["error"] == "the model raised RuntimeError: index 99 is out of bounds"
