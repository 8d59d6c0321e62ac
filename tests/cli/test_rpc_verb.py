"""``predict`` with experts on workers: each way to start gives the rows of one device; refusals."""

import json
import re
import time
from pathlib import Path

import pytest
import torch
import yaml
from sampling import sampled
from worker_processes import (
    free_port,
    outside_address,
    torchrun,
    workers,
)

import moe_lightning
from moe_lightning.cli.configs import config_directory
from moe_lightning.cli.main import main
from moe_lightning.demo.random_checkpoint import make_checkpoint
from moe_lightning.modeling.checkpoint import open_checkpoint
from moe_lightning.modeling.manifest import manifest_hash
from moe_lightning.placement import ExpertPlacement
from moe_lightning.transport.keys import new_keys
from moe_lightning.workers.roster import Roster

PROMPTS = ["To be", "or not to be, that is the question", "é", "Whether 'tis nobler", "in", "the"]
RPC = ("--trainer.strategy", "moe_rpc")
SOON = ("--trainer.strategy.join_timeout_s", 3)
TASKS = ("Generate", "Score", "Embed")


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "in.jsonl"
    rows = [{"id": n, "prompt": prompt} for n, prompt in enumerate(PROMPTS)]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def arguments_of(tiny, rows_file):
    """The command line of a task: ``arguments_of(task, output_dir, *more)``."""

    def arguments_of(task, output_dir, *more):
        words = ("predict", *more, "--model.checkpoint", tiny, "--data.input", rows_file)
        words += ("--model.task", task, "--output_dir", output_dir)
        if task == "Generate":
            words += ("--model.task.max_new_tokens", 6)
        return [str(word) for word in words]

    return arguments_of


@pytest.fixture(scope="module")
def expected(arguments_of, tmp_path_factory):
    """The rows of one device, by task."""
    directory = tmp_path_factory.mktemp("single")
    for task in TASKS:
        assert main(arguments_of(task, directory / task)) == 0
    return {task: read(directory / task) for task in TASKS}


def read(directory):
    lines = (Path(directory) / "predictions.jsonl").read_bytes().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture
def check_rows(expected):
    """Compare what a run left with the rows of one device."""

    def check_rows(directory, task="Generate"):
        rows = read(directory)
        if task == "Generate":
            assert rows == expected[task]
            return
        key = {"Score": "logprob", "Embed": "embedding"}[task]
        assert [row["id"] for row in rows] == [row["id"] for row in expected[task]]
        for row, other in zip(rows, expected[task], strict=True):
            assert row[key] == pytest.approx(other[key], abs=1e-5)  # fp32 sums in another order

    return check_rows


@pytest.fixture(scope="module")
def by_hand(tiny):
    """Addresses of two workers that were started by hand and wait for master after master."""
    options = ("--model.checkpoint", tiny, "--memory_gb", 0.5)
    with workers(options, options) as started:
        yield [worker.address() for worker in started]


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    directory = tmp_path_factory.mktemp("keys") / "keys"
    new_keys(directory)
    return directory


def named(addresses):
    return (*RPC, "--trainer.strategy.workers", f"[{', '.join(addresses)}]")


@pytest.fixture
def predict_rpc(run, arguments_of):
    """``predict`` in this process, anew each time, with workers in others."""

    def predict_rpc(*arguments, task="Generate"):
        return run(*arguments_of(task, "out", "--restart", *arguments))

    return predict_rpc


# Ways to start.


def test_workers_that_the_master_starts_itself(predict_rpc, check_rows) -> None:
    finished = predict_rpc("--config", "rpc.yaml")
    assert finished.code == 0, finished.err
    check_rows("out")
    report = json.loads(Path("out/run.json").read_text())
    assert (report["strategy"], report["world_size"]) == ("RPCStrategy", 1)
    assert ExpertPlacement.load(Path("out/placement.json")).num_slots == 2


@pytest.mark.parametrize("task", TASKS)
def test_workers_started_by_hand(by_hand, predict_rpc, check_rows, task) -> None:
    finished = predict_rpc(*named(by_hand), task=task)
    assert finished.code == 0, finished.err
    check_rows("out", task)
    # Four experts in each of two layers, none of them on the master.
    slots = ExpertPlacement.load(Path("out/placement.json")).slots
    assert slots == {layer: ((0,), (0,), (1,), (1,)) for layer in (0, 1)}


def test_workers_and_the_master_hold_experts(by_hand, predict_rpc, check_rows) -> None:
    master_too = ("--trainer.strategy.experts_on_master", "true")
    finished = predict_rpc(
        *(*named(by_hand), *master_too, "--trainer.strategy.policy", "round_robin")
    )
    assert finished.code == 0, finished.err
    check_rows("out")
    slots = ExpertPlacement.load(Path("out/placement.json")).slots
    assert slots == {layer: ((0,), (1,), (2,), (0,)) for layer in (0, 1)}


def test_the_config_of_a_run_repeats_it(by_hand, predict_rpc, run, check_rows) -> None:
    predict_rpc(*named(by_hand))
    finished = run("predict", "--config", "out/config.yaml", "--output_dir", "again")
    assert finished.code == 0, finished.err
    check_rows("again")


def test_workers_with_keys_beyond_loopback(tiny, keys, predict_rpc, check_rows, tmp_path) -> None:
    host = outside_address()
    if host is None:
        pytest.skip("this machine has no address but loopback")
    other_keys = tmp_path / "other keys"
    new_keys(other_keys)
    options = ("--model.checkpoint", tiny, "--keys", keys, "--listen")
    with workers([*options, f"tcp://{host}:0"], [*options, "tcp://*:0"]) as started:
        first, second = (worker.address() for worker in started)
        second = f"tcp://{host}:{second.rpartition(':')[2]}"
        finished = predict_rpc(*named([first, second]), "--trainer.strategy.keys", keys)
        assert finished.code == 0, finished.err
        check_rows("out")
        # Another key is nobody, whatever the address; and the worker serves on.
        finished = predict_rpc(*named([first]), *SOON, "--trainer.strategy.keys", other_keys)
        check(finished, first, "keys", "within 3 s")
        finished = predict_rpc(*named([first]))
        check(finished, first, "--new-keys", "--trainer.strategy.keys")
        finished = predict_rpc(*named([second]), "--trainer.strategy.keys", keys)
        assert finished.code == 0, finished.err


def test_torchrun(arguments_of, check_rows, work) -> None:
    finished = torchrun(3, "-m", "moe_lightning", *arguments_of("Generate", "out", *RPC))
    assert finished.returncode == 0, finished.stderr
    check_rows("out")
    assert "Traceback" not in finished.stderr
    assert finished.stderr.count("rows answered") == 1  # by rank 0
    # Two of three ranks hold experts.
    assert ExpertPlacement.load(Path("out/placement.json")).num_slots == 2
    assert {path.name for path in work.iterdir()} == {"out"}


SCRIPT = """
import json, sys
import lightning as L
from torch.utils.data import DataLoader
from moe_lightning import Embed, Generate, MoELightningModule, RPCStrategy, Score

checkpoint, rows_file, transport = sys.argv[1:]
prompts = [json.loads(line)["prompt"] for line in open(rows_file)]
module = MoELightningModule(checkpoint)
trainer = L.Trainer(
    strategy=RPCStrategy(policy="round_robin", transport=transport), accelerator="cpu",
    devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
)
for task in (Score(), Embed(), Generate(max_new_tokens=6)):
    module.task = task
    batches = trainer.predict(module, DataLoader(prompts, batch_size=4))
    rows = [row for batch in batches for row in batch]
    with open(f"{type(task).__name__}-{trainer.global_rank}.json", "x") as file:
        json.dump(rows, file)
"""


@pytest.mark.parametrize("transport", sampled(["zmq", "tensorpipe"], "zmq"))
def test_a_plain_lightning_script_under_torchrun(
    tiny, rows_file, expected, work, transport
) -> None:
    Path("script.py").write_text(SCRIPT)
    finished = torchrun(3, "script.py", tiny, rows_file, transport)
    assert finished.returncode == 0, finished.stderr
    for task, key in (("Score", "logprob"), ("Embed", "embedding"), ("Generate", "token_ids")):
        rows, *none = (json.loads(Path(f"{task}-{rank}.json").read_text()) for rank in range(3))
        assert none == [[], []]
        assert len(rows) == len(PROMPTS)
        for row, other in zip(rows, expected[task], strict=True):
            assert row[key] == pytest.approx(other[key], abs=1e-5)


def test_a_master_that_cannot_begin_ends_the_workers_of_torchrun(arguments_of, work) -> None:
    arguments = arguments_of("Generate", "out", *RPC)
    finished = torchrun(2, "-m", "moe_lightning", *arguments, "--data.input", "nope.jsonl")
    assert finished.returncode != 0
    assert "error: " in finished.stderr
    assert "nope.jsonl" in finished.stderr


def test_validate(by_hand, run, tiny) -> None:
    Path("text.txt").write_text("so long lives this and this gives life to thee\n" * 50)
    data = ("--data.val", "text.txt", "--data.sequence_length", 32)
    losses = []
    for name, strategy in (("single", ()), ("out", named(by_hand))):
        arguments = ("--model.checkpoint", tiny, "--output_dir", name, *data, *strategy)
        finished = run("validate", *arguments)
        assert finished.code == 0, finished.err
        (found,) = re.findall(r"val_loss\W+([0-9.]+)", finished.out)
        losses.append(float(found))
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_the_shipped_config_says_every_option_of_the_strategy(run) -> None:
    finished = run("predict", "--config", "rpc.yaml", "--print_config")
    every = yaml.safe_load(finished.out)["trainer"]["strategy"]["init_args"]
    shipped = (config_directory() / "rpc.yaml").read_text()
    assert yaml.safe_load(shipped)["trainer"]["strategy"]["init_args"] == every


def test_bad_rows_do_not_stop_the_others(by_hand, run, tiny, write_rows, read_rows) -> None:
    write_rows("in.jsonl", [{"id": 1, "prompt": "To be"}, "not json", {"id": 3, "prompt": "or"}])
    common = ("--model.checkpoint", tiny, "--data.input", "in.jsonl", "--output_dir", "out")
    finished = run("predict", *named(by_hand), *common, "--model.task", "Score")
    assert finished.code == 3, finished.err
    assert [row["id"] for row in read_rows("out/predictions.jsonl")] == [1, 3]
    assert len(read_rows("out/errors.jsonl")) == 1


def test_zero_rows(by_hand, run, tiny) -> None:
    Path("in.jsonl").write_text("")
    common = ("--model.checkpoint", tiny, "--data.input", "in.jsonl", "--output_dir", "out")
    finished = run("predict", *named(by_hand), *common)
    assert finished.code == 0, finished.err
    assert Path("out/predictions.jsonl").read_bytes() == b""


# Refusals.


def check(finished, *words, code=2):
    """An exit code, one message with these words in few lines, and nothing predicted."""
    assert finished.code == code, finished.err
    assert "Traceback" not in finished.err
    assert finished.err.startswith("error: "), finished.err
    assert finished.err.count("error: ") == 1
    assert len(finished.err.splitlines()) <= 15, finished.err
    for word in words:
        assert word in finished.err, finished.err


WRONG = {
    "workers to use and workers to start": (
        ["--trainer.strategy.workers", "[tcp://127.0.0.1:1]", "--trainer.strategy.num_workers", 2],
        ["trainer.strategy.workers", "num_workers"],
    ),
    "no workers": (["--trainer.strategy.workers", "[]"], ["trainer.strategy.workers is empty"]),
    "an address that is none": (
        ["--trainer.strategy.workers", "[over there]"],
        ["trainer.strategy.workers", "over there", "tcp://HOST:PORT"],
    ),
    "another machine without keys": (
        ["--trainer.strategy.workers", "[tcp://192.0.2.11:7000]"],
        ["trainer.strategy.workers", "tcp://192.0.2.11:7000", "--new-keys"],
    ),
    "another machine in the open": (
        [
            *("--trainer.strategy.workers", "[tcp://192.168.0.2:7000]"),
            *("--trainer.strategy.insecure_network", "true"),  # zmq has keys to use
        ],
        ["tcp://192.168.0.2:7000", "--new-keys"],
    ),
    "keys that are not there": (["--trainer.strategy.keys", "nowhere"], ["nowhere", "--new-keys"]),
    "no transport": (["--trainer.strategy.transport", "pigeons"], ["transport", "pigeons"]),
    "no time": (["--trainer.strategy.timeout_s", 0], ["timeout_s=0"]),
    "no dtype": (["--trainer.strategy.dispatch_dtype", "int1"], ["dispatch_dtype", "int1"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_option_is_named(predict_rpc, name) -> None:
    arguments, words = WRONG[name]
    check(predict_rpc(*RPC, *arguments), *words)


def test_a_worker_that_is_not_there_is_named_in_time(by_hand, predict_rpc) -> None:
    nobody = f"tcp://127.0.0.1:{free_port()}"
    start_s = time.monotonic()
    finished = predict_rpc(*named([by_hand[0], nobody]), *SOON)
    assert time.monotonic() - start_s < 15
    check(finished, f"no answer within 3 s from {nobody} (no connection).", "join_timeout_s")
    assert predict_rpc(*named(by_hand)).code == 0, "the one that was there serves on"


def test_another_checkpoint_is_refused(by_hand, run, rows_file, tmp_path) -> None:
    # The same shapes, other weights.
    other = make_checkpoint(
        tmp_path / "other",
        family="qwen3_moe",
        hidden_size=32,
        num_layers=2,
        num_experts=4,
        top_k=2,
        expert_size=16,
        num_heads=4,
        num_kv_heads=2,
        vocab_size=512,
        max_positions=128,
        seed=7,
    )
    options = ("--model.checkpoint", other, "--data.input", rows_file, "--output_dir", "out")
    finished = run("predict", *named(by_hand), *options)
    check(finished, by_hand[0], "checkpoint")


def test_another_release_is_refused(by_hand, predict_rpc, monkeypatch) -> None:
    ours = moe_lightning.__version__
    monkeypatch.setattr(moe_lightning, "__version__", "0.0.7")
    check(predict_rpc(*named(by_hand)), by_hand[0], "0.0.7", ours, "release")


@pytest.mark.wide
def test_a_worker_of_another_master_is_refused(by_hand, predict_rpc, tiny) -> None:
    roster = Roster(by_hand[:1], keys=None, timeout_s=15)
    manifest = manifest_hash(open_checkpoint(str(tiny)))
    roster.meet(manifest, join_timeout_s=10, still_starting=lambda: None)
    check(predict_rpc(*named(by_hand)), by_hand[0], "another master")
    roster.close()
    assert predict_rpc(*named(by_hand)).code == 0, "it is free again"


def test_fit_is_refused(run, tiny) -> None:
    Path("train.txt").write_text("so long lives this and this gives life to thee\n" * 200)
    finished = run(
        *("fit", "--model.checkpoint", tiny, "--output_dir", "out", "--trainer.max_steps", 1),
        *("--data.train", "train.txt", "--data.sequence_length", 32, *RPC),
    )
    check(finished, "moe_rpc", "inference", "--trainer.strategy auto")


def test_a_training_checkpoint_is_refused_with_what_to_do(predict_rpc) -> None:
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.6"}, "some.ckpt")
    finished = predict_rpc(*RPC, "--ckpt_path", "some.ckpt")
    check(finished, "--ckpt_path", "moe_rpc", "moe_lightning export")
