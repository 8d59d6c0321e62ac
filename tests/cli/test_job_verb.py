"""predict as a job, from the command line: continued, refused, begun anew, retried, elsewhere."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pytest

from moe_lightning.demo.random_checkpoint import make_checkpoint
from moe_lightning.jobs import PartWriter
from moe_lightning.tasks import Generate, Score

NUM_ROWS = 12
SMALL = ("--data.max_batch_tokens", 24, "--model.task.rows_factor", 1)


@pytest.fixture
def job(run, tiny, write_rows):
    """The same command, run again and again."""
    write_rows("in.jsonl", [{"id": n, "prompt": f"row {n}" * (n % 3 + 1)} for n in range(NUM_ROWS)])
    own = ("--model.checkpoint", tiny, "--data.input", "in.jsonl", "--model.task.max_new_tokens", 3)

    def job(*arguments: object, output_dir: str = "out") -> Any:
        return run("predict", *own, "--output_dir", output_dir, *arguments)

    return job


@pytest.fixture
def dies_after(monkeypatch):
    """Let a run die after so many batches, its parts committed; returns what mends that."""

    def dies_after(num_batches: int) -> Callable[[], None]:
        commit, num_left = PartWriter.commit, [num_batches]

        def commit_or_die(self: Any, *rest: Any) -> Any:
            entry = commit(self, *rest)
            num_left[0] -= 1
            if num_left[0] == 0:
                raise KeyboardInterrupt
            return entry

        monkeypatch.setattr(PartWriter, "commit", commit_or_die)
        return lambda: monkeypatch.setattr(PartWriter, "commit", commit)

    return dies_after


def predictions(output_dir: str = "out") -> bytes:
    return Path(output_dir, "predictions.jsonl").read_bytes()


def report(output_dir: str = "out") -> dict[str, Any]:
    return json.loads(Path(output_dir, "run.json").read_text())


def test_the_same_command_continues_and_gives_the_same_bytes(job, dies_after, monkeypatch) -> None:
    assert job(*SMALL, output_dir="undisturbed").code == 0
    mend = dies_after(2)
    finished = job(*SMALL)
    assert finished.code == 5
    assert "the same command continues" in finished.err
    assert not Path("out/predictions.jsonl").exists()
    num_done = sum(e["num_rows"] for e in ledger())
    mend()
    computed = []
    run = Generate.run

    def note(self: Any, runner: Any, rows: Sequence[Any], **options: Any) -> Any:
        computed.extend(row.id for row in rows)
        return run(self, runner, rows, **options)

    monkeypatch.setattr(Generate, "run", note)
    finished = job(*SMALL)
    assert finished.code == 0, finished.err
    assert f"{num_done} computed by earlier runs" in finished.err
    assert len(computed) == len(set(computed)) == NUM_ROWS - num_done
    assert predictions() == predictions("undisturbed")
    assert (report()["num_rows"], report()["num_done_before"]) == (NUM_ROWS, num_done)
    success = json.loads(Path("out/_SUCCESS").read_text())
    assert success["counts"] == {
        "num_rows": NUM_ROWS,
        "num_predictions": NUM_ROWS,
        "num_errors": 0,
    }


def ledger() -> list[dict[str, Any]]:
    logs = Path("out").glob("job/*/ledger/*.jsonl")
    return [json.loads(line.split("\t")[0]) for log in logs for line in log.open()]


def test_a_finished_job_is_not_begun_again_and_loads_no_weights(job, monkeypatch) -> None:
    assert job().code == 0
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    import moe_lightning.module as module_file

    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(module_file, "host_on_one_device", load)
    finished = job()
    assert finished.code == 0, finished.err
    assert "nothing to do: earlier runs have answered 12 of 12 rows" in finished.err
    assert {p: p.read_bytes() for p in Path("out").rglob("*") if p.is_file()} == before


CHANGES = {
    "input": ((), "data.input.sha256"),
    "batch": (("--data.max_batch_tokens", 30), "data.max_batch_tokens: 24, now 30"),
    "task": (("--model.task.max_new_tokens", 4), "task.default_max_new_tokens: 3, now 4"),
    "kind": (("--model.task", "Score"), 'task.name: "Generate", now "Score"'),
    "dtype": (("--model.dtype", "bfloat16"), 'model.dtype: "auto", now "bfloat16"'),
    "format": (("--writer.format", "parquet"), 'writer.format: "jsonl", now "parquet"'),
    "model": ((), "model.manifest"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_job_is_refused_with_the_difference_and_restart_forgets_the_first(
    job, dies_after, tmp_path, change
) -> None:
    mend = dies_after(2)
    assert job(*SMALL).code == 5
    mend()
    options, word = CHANGES[change]
    if change == "input":
        with open("in.jsonl", "a") as file:
            file.write('{"id": "one more", "prompt": "row"}\n')
    if change == "model":
        other = make_checkpoint(tmp_path / "other", family="qwen3_moe", vocab_size=512, seed=5)
        options = ("--model.checkpoint", other)
    if change == "kind":
        options = ("--model.task", "Score", "--data.max_batch_tokens", 24)
        finished = job_without_task_options(job, *options)
    else:
        finished = job(*SMALL, *options)
    assert finished.code == 2, finished.err
    assert word in finished.err
    assert "--restart" in finished.err
    assert len(ledger()) == 2  # nothing was touched
    for restart in ("--restart", "--restart=true"):
        if change == "kind":
            finished = job_without_task_options(job, *options, restart)
        else:
            finished = job(*SMALL, *options, restart)
        assert finished.code == 0, finished.err
        assert report()["num_done_before"] == 0


def job_without_task_options(job: Any, *arguments: object) -> Any:
    run, own = job.__closure__[1].cell_contents, job.__closure__[0].cell_contents
    return run("predict", *own[:-2], "--output_dir", "out", *arguments)


def test_failed_rows_are_left_alone_until_they_are_asked_for(job, read_rows, monkeypatch) -> None:
    assert job(*SMALL, output_dir="undisturbed").code == 0
    run, computed = Generate.run, []

    def run_or_raise(self: Any, runner: Any, rows: Sequence[Any], **options: Any) -> Any:
        computed.extend(row.id for row in rows)
        if any(row.id == 7 for row in rows) and is_broken:
            raise RuntimeError("a passing fault")
        return run(self, runner, rows, **options)

    monkeypatch.setattr(Generate, "run", run_or_raise)
    is_broken = True
    assert job(*SMALL).code == 3
    (error,) = read_rows("out/errors.jsonl")
    offset = len(b"".join(Path("in.jsonl").read_bytes().splitlines(keepends=True)[:7]))
    assert (error["id"], error["line"], error["offset"]) == (7, 8, offset)
    is_broken = False
    computed.clear()
    finished = job(*SMALL)
    assert finished.code == 3
    assert "answered 11 of 12 rows" in finished.err
    assert computed == []
    finished = job(*SMALL, "--retry_errors")
    assert finished.code == 0, finished.err
    assert computed == [7]
    assert predictions() == predictions("undisturbed")
    assert not Path("out/errors.jsonl").exists()
    assert report()["num_errors"] == 0


def test_too_many_errors_end_a_run_early(job, read_rows, monkeypatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no row can be computed")

    real = Generate.run
    monkeypatch.setattr(Generate, "run", fail)
    finished = job(*SMALL, "--max_errors", 2)
    assert finished.code == 1
    assert "more than --max_errors 2" in finished.err
    assert "Traceback" not in finished.err
    assert 2 < len(read_rows("out/errors.jsonl")) < NUM_ROWS
    monkeypatch.setattr(Generate, "run", real)
    assert job(*SMALL, "--retry_errors", "--max_errors", 2).code == 0
    assert len(read_rows("out/predictions.jsonl")) == NUM_ROWS


def test_too_many_bad_lines_end_a_run_before_the_model_is_loaded(job, read_rows) -> None:
    with open("in.jsonl", "a") as file:
        file.write("{\n" * 5)
    finished = job("--max_errors", 4)
    assert finished.code == 1
    assert "5 rows failed, more than --max_errors 4" in finished.err
    assert "answered" not in finished.err
    assert len(read_rows("out/errors.jsonl")) == 5
    assert job("--max_errors", 5).code == 3


def test_one_run_at_a_time(job) -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from moe_lightning.jobs import open_storage\n"
            "open_storage('out').lock(); print('locked', flush=True); sys.stdin.read()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout.readline() == b"locked\n"
        finished = job()
        assert finished.code == 2
        assert f"process {holder.pid}" in finished.err
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert job().code == 0


def test_another_strategy_continues(job, dies_after) -> None:
    assert job(*SMALL, output_dir="undisturbed").code == 0
    mend = dies_after(2)
    assert job(*SMALL).code == 5
    mend()
    options = ("--trainer.strategy", "moe_placement", "--trainer.strategy.slots", "[cpu, cpu]")
    finished = job(*SMALL, *options)
    assert finished.code == 0, finished.err
    assert report()["num_done_before"] > 0
    assert predictions() == predictions("undisturbed")


def test_urls(job, dies_after) -> None:
    assert job(*SMALL, output_dir="undisturbed").code == 0
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pipe_file("/bucket/prompts/in.jsonl", Path("in.jsonl").read_bytes())
    options = (*SMALL, "--data.input", "memory://bucket/prompts/in.jsonl")
    mend = dies_after(2)
    assert job(*options, output_dir="memory://bucket/run").code == 5
    mend()
    finished = job(*options, output_dir="memory://bucket/run")
    assert finished.code == 0, finished.err
    assert "predictions: memory://bucket/run" in finished.err
    assert files.cat_file("/bucket/run/predictions.jsonl") == predictions("undisturbed")
    names = {name.removeprefix("/bucket/run/") for name in files.find("/bucket/run")}
    assert names == {"predictions.jsonl", "_SUCCESS", "config.yaml", "run.json", "job/plan.json"}
    assert json.loads(files.cat_file("/bucket/run/run.json"))["num_done_before"] > 0
    assert {path.name for path in Path().iterdir()} == {"in.jsonl", "undisturbed"}


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--data.input", "memory://bucket/nothing.jsonl"), "nothing.jsonl cannot be fetched"),
        (("--data.input", "nosuch://bucket/x"), "nosuch"),
        (("--output_dir", "nosuch://bucket/x"), "nosuch"),
        (("--max_errors", "-1"), "max_errors"),
        (("--data.max_forward_tokens", "0"), "max_forward_tokens"),
        (("--restart", "maybe"), "restart"),
    ],
)
def test_wrong_options(job, options, word) -> None:
    finished = job(*options)
    assert finished.code == 2, finished.err
    assert word in finished.err
    assert "Traceback" not in finished.err


def test_a_training_checkpoint_and_nothing_to_do(run, tiny) -> None:
    Path("train.txt").write_text("so long lives this and this gives life to thee\n" * 50)
    fit = ("fit", "--model.checkpoint", tiny, "--data.train", "train.txt", "--output_dir", "fit")
    options = ("--data.sequence_length", 32, "--trainer.max_steps", 2)
    assert run(*fit, *options, "--save.every_n_train_steps", 1).code == 0
    Path("in.txt").write_text("one\ntwo\n")
    own = ("predict", "--model.checkpoint", tiny, "--data.input", "in.txt", "--output_dir", "out")
    task = ("--model.task", Score.__name__)
    last = ("--ckpt_path", "fit/checkpoints/last.ckpt")
    assert run(*own, *task).code == 0
    finished = run(*own, *task, *last)
    assert finished.code == 2
    assert "ckpt_path: null, now" in finished.err
    assert run(*own, *task, *last, "--restart").code == 0
    finished = run(*own, *task, *last)
    assert finished.code == 0, finished.err
    assert "nothing to do" in finished.err
