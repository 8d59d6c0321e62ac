"""Configs: printed, shipped, found by name, merged; and real processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import moe_lightning
from moe_lightning.cli.configs import config_directory

ROWS = [{"id": "a", "prompt": "To be"}, {"id": "b", "prompt": "or not to be"}]


def start(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    root = Path(moe_lightning.__file__).parent.parent
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, "-m", "moe_lightning", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("verb", ["predict", "fit", "validate"])
def test_print_config_explains_every_option(run, verb) -> None:
    finished = run(verb, "--print_config=comments")
    assert (finished.code, finished.err) == (0, "")
    lines = finished.out.splitlines()
    options = ("checkpoint:", "dtype:", "experts_backend:", "output_dir:", "ckpt_path:")
    for option in options:
        (number,) = [n for n, line in enumerate(lines) if line.strip().startswith(option)]
        assert lines[number - 1].strip().startswith("#"), option
    config = yaml.safe_load(finished.out)
    assert config["model"]["checkpoint"] == "demo"
    # Python's own words would tell a newcomer nothing.
    for noise in ("<class", "Namespace(", "object at 0x"):
        assert noise not in finished.out, noise


def test_the_printed_config_is_itself_a_config(run, tiny, write_rows, read_rows) -> None:
    printed = run("predict", "--model.task.max_new_tokens=3", "--print_config=comments").out
    Path("mine.yaml").write_text(printed)
    write_rows("in.jsonl", ROWS)
    options = ("--model.checkpoint", tiny, "--data.input", "in.jsonl", "--output_dir", "out")
    finished = run("predict", "--config", "mine.yaml", *options)
    assert finished.code == 0, finished.err
    assert [row["num_tokens"] for row in read_rows("out/predictions.jsonl")] == [3, 3]


def test_the_config_of_a_run_repeats_it(predict, run, write_rows) -> None:
    write_rows("in.jsonl", ROWS)
    options = ("--model.task.max_new_tokens", 4, "--model.task.temperature", 0.7)
    predict("--data.input", "in.jsonl", *options)
    finished = run("predict", "--config", "out/config.yaml", "--output_dir", "again")
    assert finished.code == 0, finished.err
    first, again = (Path(name, "predictions.jsonl").read_bytes() for name in ("out", "again"))
    assert first == again


def test_a_shipped_config_is_found_by_name_from_another_directory(
    run, tiny, write_rows, read_rows
) -> None:
    write_rows("in.jsonl", ROWS)
    assert not Path("single_device.yaml").exists()
    finished = run(
        *("predict", "--config", "single_device.yaml", "--model.checkpoint", tiny),
        *("--data.input", "in.jsonl", "--output_dir", "out", "--model.task.max_new_tokens", 2),
    )
    assert finished.code == 0, finished.err
    assert [row["id"] for row in read_rows("out/predictions.jsonl")] == ["a", "b"]


def test_a_config_of_the_working_directory_comes_before_a_shipped_one(
    run, tiny, write_rows, read_rows
) -> None:
    write_rows("in.jsonl", ROWS)
    config = {
        "model": {"checkpoint": str(tiny), "task": {"class_path": "Score"}},
        "data": {"input": "in.jsonl"},
        "output_dir": "here",
    }
    Path("single_device.yaml").write_text(yaml.safe_dump(config))
    assert run("predict", "--config=single_device.yaml").code == 0
    assert [row["id"] for row in read_rows("here/predictions.jsonl")] == ["a", "b"]


def test_of_two_configs_the_later_one_wins_and_the_command_line_over_both(
    run, tiny, write_rows
) -> None:
    write_rows("in.jsonl", ROWS)
    first = {
        "model": {"checkpoint": str(tiny), "task": {"class_path": "Score"}, "dtype": "float32"},
        "data": {"input": "in.jsonl", "max_batch_tokens": 11},
        "output_dir": "first",
    }
    second = {"data": {"max_batch_tokens": 22, "limit_rows": 2}, "output_dir": "second"}
    Path("first.yaml").write_text(yaml.safe_dump(first))
    Path("second.yaml").write_text(yaml.safe_dump(second))
    configs = ("--config", "first.yaml", "-c", "second.yaml")
    finished = run("predict", *configs, "--data.limit_rows", 1)
    assert finished.code == 0, finished.err
    assert not Path("first").exists()
    used = yaml.safe_load(Path("second/config.yaml").read_text())
    assert used["data"]["max_batch_tokens"] == 22
    assert used["data"]["limit_rows"] == 1
    assert used["data"]["input"] == "in.jsonl"
    assert used["model"]["dtype"] == "float32"
    assert len(Path("second/predictions.jsonl").read_bytes().splitlines()) == 1


@pytest.mark.parametrize("path", sorted(config_directory().glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_config_parses(run, path) -> None:
    """That each also runs is the business of the tests of what it configures."""
    keys = yaml.safe_load(path.read_text())["data"]
    verb = "fit" if "train" in keys else "predict"
    finished = run(verb, "--config", path.name, "--print_config")
    assert finished.code == 0, finished.err


@pytest.mark.parametrize("arguments", [["--help"], ["-h"]])
def test_help_names_every_verb(run, arguments) -> None:
    finished = run(*arguments)
    assert finished.code == 0
    for verb in ("predict", "fit", "validate", "export"):
        assert verb in finished.out


@pytest.mark.parametrize("verb", ["predict", "fit", "validate", "export"])
def test_help_of_a_verb_names_the_contracts_options(run, verb) -> None:
    finished = run(verb, "--help")
    assert finished.code == 0
    assert "--model.checkpoint" in finished.out
    assert f"moe_lightning {verb}" in finished.out.splitlines()[0], "the usage says what to type"


def test_version(run) -> None:
    finished = run("--version")
    assert (finished.code, finished.out.strip()) == (0, moe_lightning.__version__)


def test_a_process_of_its_own_predicts_and_leaves_with_the_exit_code(
    work, tiny, write_rows, read_rows
) -> None:
    write_rows("in.jsonl", [*ROWS, "not json"])
    finished = start(
        *("predict", "--config", "single_device.yaml", "--model.checkpoint", tiny),
        *("--data.input", "in.jsonl", "--output_dir", "out", "--model.task", "Score"),
        cwd=work,
    )
    assert finished.returncode == 3, finished.stderr
    assert "Traceback" not in finished.stderr
    assert [row["id"] for row in read_rows("out/predictions.jsonl")] == ["a", "b"]
    assert {path.name for path in work.iterdir()} == {"in.jsonl", "out"}
    assert json.loads(Path("out/run.json").read_text())["exit_reason"] == "finished"


def test_a_process_of_its_own_with_a_wrong_verb_is_quick_to_say_so(work) -> None:
    finished = start("predcit", cwd=work)
    assert finished.returncode == 2
    assert "predcit" in finished.stderr
    assert "predict" in finished.stderr
