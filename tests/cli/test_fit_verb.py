"""``fit``, ``validate`` and ``export`` from the command line, against plain transformers."""

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_lightning.cli.main import main

TEXT = "so long as men can breathe or eyes can see, so long lives this\n<|endoftext|>\n" * 60
HELD_OUT = [
    {"prompt": "so long lives", "answer": " this, and this gives life to thee"},
    {"prompt": "to be", "answer": " or not to be"},
    {"prompt": "who", "answer": " is there"},
]
SCHEDULE = (
    "--model.optimizer=AdamW",
    "--model.optimizer.lr=0.01",
    "--model.lr_scheduler=OneCycleLR",
    "--model.lr_scheduler.max_lr=0.01",
    "--model.lr_scheduler.total_steps=12",
)


def metrics(directory: str | Path, name: str) -> dict[int, float]:
    """A metric by step, from the run's CSV log."""
    with open(Path(directory) / "logs" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {int(row["step"]): float(row[name]) for row in rows if row.get(name)}


@pytest.fixture
def texts(work: Path) -> Path:
    """A training text of one sentence, and held-out answers, in the working directory."""
    Path("train.txt").write_text(TEXT)
    Path("val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in HELD_OUT))
    return work


@pytest.fixture
def training(run, tiny, texts) -> Callable[..., Any]:
    """Run ``fit`` or ``validate`` on the texts."""

    def training(verb: str, output_dir: str, *arguments: object) -> Any:
        Path("train.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in TEXT.split("<|endoftext|>\n"))
        )
        return run(
            *(verb, "--model.checkpoint", tiny, "--output_dir", output_dir),
            *("--data.train", "train.jsonl", "--data.val", "val.jsonl"),
            *("--data.sequence_length", 32, "--data.batch_size", 4),
            *("--trainer.log_every_n_steps", 1, "--trainer.enable_progress_bar", "false"),
            *arguments,
        )

    return training


@pytest.fixture(scope="module")
def fitted(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of 30 steps, validated every 10, started in an empty one."""
    work = tmp_path_factory.mktemp("fitted")
    (work / "train.txt").write_text(TEXT)
    (work / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in HELD_OUT))
    before = Path.cwd()
    os.chdir(work)
    try:
        code = main(
            [
                *("fit", "--model.checkpoint", str(tiny), "--output_dir", "out"),
                *("--data.train", "train.txt", "--data.val", "val.jsonl", "--data.format=auto"),
                *("--data.sequence_length=32", "--data.batch_size=4", "--trainer.max_steps=30"),
                *("--trainer.val_check_interval=10", "--trainer.check_val_every_n_epoch=null"),
                *("--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false"),
                *("--model.optimizer=AdamW", "--model.optimizer.lr=0.01"),
            ]
        )
    finally:
        os.chdir(before)
    assert code == 0
    return work


def test_fit_lowers_the_loss(fitted) -> None:
    losses = metrics(fitted / "out", "train_loss")
    assert list(losses) == list(range(30))
    assert losses[0] > 5.0, "ln(512) = 6.2 is the loss of knowing nothing"
    assert losses[29] < 0.5 * losses[0]


def test_fit_logs_the_held_out_loss_below_the_output_directory(fitted) -> None:
    held_out = metrics(fitted / "out", "val_loss")
    assert list(held_out) == [9, 19, 29]


def test_fit_writes_into_its_output_directory_and_nowhere_else(fitted) -> None:
    assert {path.name for path in fitted.iterdir()} == {"train.txt", "val.jsonl", "out"}
    assert (fitted / "out" / "config.yaml").is_file()
    names = {path.name for path in (fitted / "out" / "checkpoints").iterdir()}
    assert "last.ckpt" in names
    assert len(names) == 2, "the last one, and save_top_k 1"


def test_validate_gives_the_loss_of_transformers(training, tiny) -> None:
    """Mean over all learnt tokens of the file: those of the answers, and each end."""
    finished = training("validate", "out")
    assert finished.code == 0, finished.err
    words = AutoTokenizer.from_pretrained(tiny)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    losses: list[float] = []
    for row in HELD_OUT:
        prompt_ids = words(row["prompt"])["input_ids"]
        answer_ids = [*words(row["answer"])["input_ids"], words.eos_token_id]
        ids = torch.tensor(prompt_ids + answer_ids)
        with torch.inference_mode():
            logits = model(ids[None]).logits[0, :-1]
        nll = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        losses += nll[len(prompt_ids) - 1 :].tolist()
    (loss,) = metrics("out", "val_loss").values()
    assert loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_validate_does_not_depend_on_packing_or_batches(training) -> None:
    options = {
        "packed": ("--data.batch_size", 8),
        "single": ("--data.packing", "false", "--data.batch_size", 1),
        "pairs": ("--data.packing", "false", "--data.batch_size", 2),
    }
    losses = []
    for name, arguments in options.items():
        assert training("validate", name, *arguments).code == 0
        losses += metrics(name, "val_loss").values()
    assert losses[1:] == pytest.approx([losses[0]] * 2, abs=1e-5)


def test_validate_from_a_checkpoint_gives_the_loss_of_fit(training, fitted) -> None:
    shutil.copytree(fitted / "out", "fitted")
    finished = training("validate", "out", "--ckpt_path", "fitted/checkpoints/last.ckpt")
    assert finished.code == 0, finished.err
    (loss,) = metrics("out", "val_loss").values()
    assert loss == pytest.approx(metrics("fitted", "val_loss")[29], abs=1e-6)


def test_validate_shows_the_loss(training) -> None:
    finished = training("validate", "out")
    assert "val_loss" in finished.out + finished.err


@pytest.mark.parametrize("stop_at", [6, 20], ids=["in the first epoch", "in a later epoch"])
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(training, stop_at) -> None:
    """Batches, optimizer, schedule and weights continue: bitwise, as no arithmetic differs."""
    end = stop_at + 6
    schedule = (*SCHEDULE[:-1], f"--model.lr_scheduler.total_steps={end}")
    whole = training("fit", "whole", *schedule, "--trainer.max_steps", end)
    assert whole.code == 0, whole.err
    assert training("fit", "half", *schedule, "--trainer.max_steps", stop_at).code == 0
    checkpoint = ("--ckpt_path", "half/checkpoints/last.ckpt")
    rest = training("fit", "rest", *schedule, "--trainer.max_steps", end, *checkpoint)
    assert rest.code == 0, rest.err
    wanted, first, last = (metrics(name, "train_loss") for name in ("whole", "half", "rest"))
    assert list(first) == list(range(stop_at))
    assert list(last) == list(range(stop_at, end))
    assert first | last == wanted
    assert len(set(wanted.values())) == end, "the losses differ, so that the order is seen"


def test_resuming_into_the_same_directory_keeps_the_log_of_the_first_half(training) -> None:
    """In the same file, or beside it."""
    assert training("fit", "out", *SCHEDULE, "--trainer.max_steps", 6).code == 0
    checkpoint = ("--ckpt_path", "out/checkpoints/last.ckpt")
    assert training("fit", "out", *SCHEDULE, "--trainer.max_steps", 12, *checkpoint).code == 0
    steps: set[int] = set()
    for path in Path("out").rglob("metrics*"):
        with open(path, newline="") as file:
            steps |= {int(row["step"]) for row in csv.DictReader(file) if row["train_loss"]}
    assert steps == set(range(12))


def test_the_same_command_goes_on_from_its_last_checkpoint(training) -> None:
    command = ("fit", "out", *SCHEDULE, "--ckpt_path", "last", "--trainer.max_steps")
    assert training(*command, 4).code == 0  # there is none yet
    assert list(metrics("out", "train_loss")) == [0, 1, 2, 3]
    assert training(*command, 6).code == 0
    assert list(metrics("out", "train_loss"))[-2:] == [4, 5]


def test_checkpoints_of_every_few_steps_can_be_kept(training) -> None:
    options = ("--save.every_n_train_steps", 2, "--save.save_top_k=-1", "--trainer.max_steps", 6)
    assert training("fit", "out", *options).code == 0
    names = {path.name for path in Path("out/checkpoints").iterdir()}
    assert names == {"step=2.ckpt", "step=4.ckpt", "step=6.ckpt", "last.ckpt"}


def test_the_same_seed_gives_the_same_run_and_another_one_does_not(training) -> None:
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        assert training("fit", name, "--trainer.max_steps", 3, "--data.seed", seed).code == 0
    one, two, three = (metrics(name, "train_loss") for name in ("one", "two", "three"))
    assert one == two
    assert one != three


def test_lightnings_flag_switches_checkpoints_off(training) -> None:
    off = ("--trainer.enable_checkpointing", "false")
    finished = training("fit", "out", "--trainer.max_steps", 2, *off)
    assert finished.code == 0, finished.err
    assert not list(Path("out").rglob("*.ckpt"))


def test_a_dev_run_leaves_the_checkpoints_of_a_real_one_alone(training) -> None:
    assert training("fit", "out", "--trainer.max_steps", 2).code == 0
    before = Path("out/checkpoints/last.ckpt").read_bytes()
    assert training("fit", "out", "--trainer.fast_dev_run", "true").code == 0
    assert Path("out/checkpoints/last.ckpt").read_bytes() == before


def test_fit_without_held_out_text(run, tiny, texts) -> None:
    finished = run(
        *("fit", "--model.checkpoint", tiny, "--output_dir", "out", "--trainer.max_steps", 2),
        *("--data.train", "train.txt", "--data.sequence_length", 32, "--data.batch_size", 4),
    )
    assert finished.code == 0, finished.err
    assert Path("out/checkpoints/last.ckpt").is_file()
    assert "Traceback" not in finished.err


def test_predict_runs_from_a_training_checkpoint(predict, fitted, write_rows, read_rows) -> None:
    write_rows("in.jsonl", [{"id": 1, "prompt": "so long as men can"}])
    options = ("--data.input", "in.jsonl", "--model.task", "Score")
    assert predict(*options).code == 0
    (base,) = read_rows("out/predictions.jsonl")
    finished = predict(*options, "--ckpt_path", fitted / "out" / "checkpoints" / "last.ckpt")
    assert finished.code == 0, finished.err
    (tuned,) = read_rows("out/predictions.jsonl")
    # The words of the training text: 30 steps make each of them far likelier.
    assert tuned["logprob"] > 0.7 * base["logprob"]


@pytest.fixture(scope="module")
def exported(tiny: Path, fitted: Path) -> Path:
    """The end of the 30 steps as a Hugging Face directory."""
    code = main(
        [
            *("export", "--model.checkpoint", str(tiny), "--export_dir", str(fitted / "hf")),
            *("--ckpt_path", str(fitted / "out" / "checkpoints" / "last.ckpt")),
        ]
    )
    assert code == 0
    return fitted / "hf"


def test_plain_transformers_loads_an_export(exported, tiny) -> None:
    names = {path.name for path in exported.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    _model, info = AutoModelForCausalLM.from_pretrained(
        exported, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    words = AutoTokenizer.from_pretrained(exported)
    assert words("so long")["input_ids"] == AutoTokenizer.from_pretrained(tiny)("so long").input_ids
    assert words.chat_template
    base = json.loads((tiny / "config.json").read_text())
    config = json.loads((exported / "config.json").read_text())
    ignored = {"transformers_version", "_name_or_path", "architectures", "dtype"}
    assert {k: config.get(k) for k in base if k not in ignored} == {
        k: v for k, v in base.items() if k not in ignored
    }
    assert config["architectures"] == base["architectures"]


def test_an_export_has_the_held_out_loss_of_fit_in_plain_transformers(exported, fitted) -> None:
    words = AutoTokenizer.from_pretrained(exported)
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    losses: list[float] = []
    for row in HELD_OUT:
        prompt_ids = words(row["prompt"])["input_ids"]
        ids = torch.tensor([*prompt_ids, *words(row["answer"])["input_ids"], words.eos_token_id])
        with torch.inference_mode():
            logits = model(ids[None]).logits[0, :-1]
        nll = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        losses += nll[len(prompt_ids) - 1 :].tolist()
    held_out = metrics(fitted / "out", "val_loss")[29]
    assert sum(losses) / len(losses) == pytest.approx(held_out, abs=1e-5)


def test_predict_from_an_export_equals_predict_from_its_training_checkpoint(
    run, tiny, fitted, exported, write_rows, read_rows
) -> None:
    write_rows("in.jsonl", [{"id": n, "prompt": p} for n, p in enumerate(["so long", "men can"])])
    options = ("predict", "--data.input", "in.jsonl", "--model.task.max_new_tokens", 8)
    checkpoint = ("--ckpt_path", fitted / "out" / "checkpoints" / "last.ckpt")
    run(*options, "--model.checkpoint", tiny, "--output_dir", "one", *checkpoint)
    finished = run(*options, "--model.checkpoint", exported, "--output_dir", "two")
    assert finished.code == 0, finished.err
    assert read_rows("one/predictions.jsonl") == read_rows("two/predictions.jsonl")


def test_export_refuses_a_directory_with_a_checkpoint(run, tiny, fitted, exported) -> None:
    before = {path: path.stat().st_mtime_ns for path in exported.iterdir()}
    finished = run(
        *("export", "--model.checkpoint", tiny, "--export_dir", exported),
        *("--ckpt_path", fitted / "out" / "checkpoints" / "last.ckpt"),
    )
    assert finished.code == 2
    assert str(exported) in finished.err
    assert {path: path.stat().st_mtime_ns for path in exported.iterdir()} == before


def test_export_in_half_precision(run, tiny, fitted) -> None:
    finished = run(
        *("export", "--model.checkpoint", tiny, "--export_dir", "half", "--dtype", "bfloat16"),
        *("--ckpt_path", fitted / "out" / "checkpoints" / "last.ckpt"),
    )
    assert finished.code == 0, finished.err
    model = AutoModelForCausalLM.from_pretrained("half", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
