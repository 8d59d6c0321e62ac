"""``predict`` over ranks from the command line: each launcher gives the rows of one device."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from report_files import JOB, REPORT
from worker_processes import finish, free_port, run_to_its_end, torchrun

from moe_lightning.cli.main import main

PROMPTS = ["To be", "or not to be, that is the question", "é", "Whether 'tis nobler", "in"]
VERB = ("-m", "moe_lightning", "predict")


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "in.jsonl"
    rows = [{"id": n, "prompt": prompt} for n, prompt in enumerate(PROMPTS)]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def options_of(tiny, rows_file):
    """What every run has: ``options_of(output_dir)``."""

    def options_of(output_dir):
        words = ("--model.checkpoint", tiny, "--data.input", rows_file, "--output_dir", output_dir)
        return [*map(str, words), "--model.task.max_new_tokens", "6", "--data.max_batch_tokens=40"]

    return options_of


@pytest.fixture(scope="module")
def check_run(options_of, tmp_path_factory):
    """Compare what a run left with the rows of one device."""
    directory = tmp_path_factory.mktemp("single")
    assert main(["predict", *options_of(directory)]) == 0
    expected = (directory / "predictions.jsonl").read_text()

    def check_run(finished, directory, mesh):
        assert finished.returncode == 0, finished.stderr
        assert (directory / "predictions.jsonl").read_text() == expected
        run = json.loads((directory / "run.json").read_text())
        assert (run["num_rows"], run["num_predictions"], run["num_errors"]) == (5, 5, 0)
        assert (run["world_size"], run["mesh"]) == (2, mesh)
        # One summary, of the first rank, and no part left.
        assert finished.stderr.count("5 of 5 rows answered") == 1
        names = {path.name for path in directory.iterdir()}
        names -= REPORT | JOB
        assert names - {"placement.json"} == {"predictions.jsonl", "run.json", "config.yaml"}
        assert ("placement.json" in names) == (not mesh.endswith("ep 1"))

    return check_run


def test_torchrun(options_of, check_run, tmp_path) -> None:
    finished = torchrun(2, *VERB, "--config", "fsdp.yaml", *options_of(tmp_path))
    check_run(finished, tmp_path, "pp 1 x dp_replicate 1 x fsdp 2 x tp 1 x ep 1")


@pytest.mark.wide
def test_the_launcher_of_lightning(options_of, check_run, tmp_path) -> None:
    config = ("--config", "expert_parallel.yaml", "--trainer.devices", "2")
    finished = finish(*VERB, *config, *options_of(tmp_path))
    check_run(finished, tmp_path, "pp 1 x dp_replicate 1 x fsdp 2 x tp 1 x ep 2")


@pytest.mark.wide
def test_two_processes_where_nothing_is_said(options_of, check_run, tmp_path) -> None:
    finished = finish(*VERB, "--config", "tensor_parallel.yaml", *options_of(tmp_path))
    check_run(finished, tmp_path, "pp 1 x dp_replicate 1 x fsdp 1 x tp 2 x ep 1")


def test_slurm(options_of, check_run, tmp_path) -> None:
    # As srun does: so many tasks with the same command.
    environ = {
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_JOB_NAME": "moe-pp",
        "SLURM_JOB_ID": "77",
        "SLURM_NODEID": "0",
        "SLURM_NODELIST": "localhost",
        "MASTER_PORT": str(free_port()),
    }
    command = (sys.executable, *VERB, "--config", "pipeline_parallel.yaml", *options_of(tmp_path))

    def task(rank):
        place = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        return run_to_its_end(*command, **environ, **place)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(task, range(2))
    assert second.returncode == 0, second.stderr
    assert "rows answered" not in second.stderr
    check_run(first, tmp_path, "pp 2 x dp_replicate 1 x fsdp 1 x tp 1 x ep 1")


# Refusals that one process can see: exit code 2, what is wrong and what to do.

WRONG = {
    "an illegal size": (
        ["moe_fsdp", "--trainer.strategy.fsdp_size", "2", "--trainer.devices", "1"],
        ["fsdp_size 2", "number of ranks, 1"],
    ),
    "a policy without ep": (
        ["moe_fsdp", "--trainer.strategy.policy", "round_robin", "--trainer.devices", "1"],
        ["policy", "ep_size is 1"],
    ),
    "no time": (["moe_ep", "--trainer.strategy.timeout_s", "0"], ["timeout_s is 0"]),
    "no chunks": (["moe_ep", "--trainer.strategy.overlap_chunks", "0"], ["overlap_chunks is 0"]),
    "offload on a CPU": (
        ["moe_fsdp", "--trainer.strategy.cpu_offload", "true", "--trainer.devices", "1"],
        ["cpu_offload", "CPU"],
    ),
    "a file that is not given": (["moe_ep", "--trainer.strategy.policy", "file"], ["file"]),
    "another dtype": (["moe_ep", "--trainer.strategy.wire_dtype", "int3"], ["wire_dtype"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_option_is_named(name, predict, monkeypatch) -> None:
    arguments, words = WRONG[name]
    finished = predict("--trainer.strategy", *arguments)
    assert finished.code == 2, finished.err
    assert finished.out == ""
    assert "Traceback" not in finished.err
    for word in words:
        assert word in finished.err
    assert not Path("out/predictions.jsonl").exists()
