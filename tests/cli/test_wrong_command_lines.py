"""Wrong command lines, inputs and checkpoints: one clear message, the exit code, nothing left."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

# What a message may be long; a usage listing of all options is not a clear message.
MAX_LINES = 17


@pytest.fixture
def predict_rows(predict, write_rows):
    """``predict`` on two good rows."""
    write_rows("in.jsonl", [{"id": 1, "prompt": "To be"}, {"id": 2, "prompt": "or not"}])
    Path("folder").mkdir()
    return lambda *arguments: predict("--data.input", "in.jsonl", *arguments)


@pytest.fixture
def fit_text(run, tiny):
    """``fit`` for one step on a good text."""
    Path("train.txt").write_text("so long lives this and this gives life to thee\n" * 200)
    return lambda *arguments: run(
        *("fit", "--model.checkpoint", tiny, "--output_dir", "out", "--trainer.max_steps", 1),
        *("--data.train", "train.txt", "--data.sequence_length", 32, *arguments),
    )


def check(finished, code: int, *words: str) -> None:
    """One message with these words, the exit code, and nothing half-written."""
    assert finished.code == code, finished.err
    assert "Traceback" not in finished.err
    lines = finished.err.strip().splitlines()
    messages = [line for line in lines if "error:" in line]
    assert len(messages) == 1, finished.err
    for word in words:
        assert word in finished.err, finished.err
    left = {str(path.relative_to("out")) for path in Path("out").rglob("*")}
    assert left <= {"config.yaml", "run.json"}, left
    if "run.json" in left:
        assert json.loads(Path("out/run.json").read_text())["exit_reason"] != "finished"


def check_short(finished, code: int, *words: str) -> None:
    check(finished, code, *words)
    lines = finished.err.strip().splitlines()
    assert len(lines) <= MAX_LINES, f"{len(lines)} lines:\n{finished.err[:500]}\n..."
    # Words of Python and of the parser, which tell a user nothing.
    for noise in ("<class", "Namespace(", "NestedArg"):
        assert noise not in finished.err, finished.err


def test_no_verb_prints_the_usage(run) -> None:
    finished = run()
    assert finished.code == 2
    assert "usage:" in finished.out + finished.err


def test_an_unknown_verb_is_named(run) -> None:
    check_short(run("predcit"), 2, "'predcit'", "predict")


WRONG_OPTIONS = {
    "unknown option": (["--model.chekpoint", "x"], ["chekpoint"]),
    "unknown group": (["--nonsense", "1"], ["nonsense"]),
    "stray word": (["in.jsonl"], ["in.jsonl"]),
    "no value": (["--data.input"], ["data.input", "expected one argument"]),
    "missing config": (["--config", "nope.yaml"], ["nope.yaml", "single_device.yaml"]),
    "config without a name": (["--config"], ["--config"]),
    "misspelt task": (["--model.task", "Genrate"], ["model.task", "Genrate"]),
    "option of another task": (
        ["--model.task", "Score", "--model.task.max_new_tokens", "5"],
        ["model.task", "max_new_tokens"],
    ),
    "text for a number": (
        ["--model.task.max_new_tokens", "many"],
        ["model.task", "max_new_tokens", "many"],
    ),
    "fraction for a whole number": (
        ["--data.max_batch_tokens", "1.5"],
        ["data.max_batch_tokens", "1.5"],
    ),
    "unknown dtype": (["--model.dtype", "float8"], ["model.dtype", "float8", "bfloat16"]),
    "unknown backend": (["--model.experts_backend", "magic"], ["experts_backend", "magic"]),
    "unknown output format": (["--writer.format", "csv"], ["writer.format", "csv", "parquet"]),
    "unknown input format": (["--data.format", "csv"], ["data.format", "csv", "parquet"]),
    "seed that is no number": (["--seed_everything", "abc"], ["seed_everything", "abc"]),
    "no new tokens": (["--model.task.max_new_tokens", "0"], ["max_new_tokens", "at least 1"]),
    "top_p of 2": (["--model.task.top_p", "2"], ["model.task.top_p", "2", "(0, 1]"]),
    "top_p of 0": (["--model.task.top_p", "0"], ["model.task.top_p", "(0, 1]"]),
    "negative temperature": (["--model.task.temperature=-1"], ["temperature", "-1"]),
    "negative top_k": (["--model.task.top_k=-1"], ["model.task.top_k", "-1"]),
    "empty stop string": (["--model.task.stop", "['']"], ["model.task.stop"]),
    "no budget": (["--data.max_batch_tokens", "0"], ["data.max_batch_tokens", "0"]),
    "negative limit": (["--data.limit_rows=-1"], ["data.limit_rows", "-1"]),
    "training data in predict": (["--data.train", "in.jsonl"], ["data.train"]),
    "unknown strategy": (["--trainer.strategy", "moe_magic"], ["moe_magic", "strategy"]),
    "unknown accelerator": (["--trainer.accelerator", "abacus"], ["abacus", "cpu"]),
    "no devices": (["--trainer.accelerator=cpu", "--trainer.devices=0"], ["devices"]),
    "devices that are no number": (["--trainer.devices", "two"], ["devices"]),
    "unknown precision": (["--trainer.precision", "7"], ["trainer.precision", "7"]),
    "bad print_config": (["--print_config=foo"], ["print_config", "foo"]),
    "missing input": (["--data.input", "nope.jsonl"], ["nope.jsonl"]),
    "input is a directory": (["--data.input", "folder"], ["folder", "directory"]),
    "ckpt_path missing": (["--ckpt_path", "nope.ckpt"], ["--ckpt_path", "nope.ckpt"]),
}


@pytest.mark.parametrize("name", WRONG_OPTIONS)
def test_a_wrong_option_is_named_with_exit_code_2(predict_rows, name) -> None:
    arguments, words = WRONG_OPTIONS[name]
    check_short(predict_rows(*arguments), 2, *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none")
def test_a_gpu_that_is_not_there_is_said_so(predict_rows) -> None:
    check_short(predict_rows("--trainer.accelerator", "gpu"), 2, "gpu")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: [unclosed", ["bad.yaml"]),
        ("model:\n  chekpoint: x\n", ["chekpoint"]),
        ("- a\n- b\n", ["bad.yaml"]),
        ("model:\n  task: Genrate\n", ["model.task", "Genrate"]),
    ],
    ids=["broken YAML", "unknown key", "a list", "misspelt task"],
)
def test_a_wrong_config_is_exit_code_2(predict_rows, text, words) -> None:
    Path("bad.yaml").write_text(text)
    check_short(predict_rows("--config", "bad.yaml"), 2, *words)


def test_an_input_that_is_no_text_is_exit_code_2(predict_rows) -> None:
    Path("in.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00rest")
    check_short(predict_rows("--data.input", "in.jsonl.gz"), 2, "in.jsonl.gz", "gz")


@pytest.mark.parametrize("place", ["taken", "taken/below"])
def test_an_output_directory_that_cannot_be_made_is_exit_code_2(predict_rows, place) -> None:
    Path("taken").write_text("a file")
    check_short(predict_rows("--output_dir", place), 2, "--output_dir", "taken")
    assert Path("taken").read_text() == "a file"


def test_a_failed_start_leaves_older_predictions_alone(predict_rows) -> None:
    assert predict_rows("--model.task", "Score").code == 0
    before = Path("out/predictions.jsonl").read_bytes()
    for wrong in (["--data.input", "nope.jsonl"], ["--model.checkpoint", "./nope"], ["--oops"]):
        assert predict_rows(*wrong).code in (2, 4)
        assert Path("out/predictions.jsonl").read_bytes() == before
        assert not Path("out/parts").exists()


# Checkpoints: exit code 4.


def test_a_missing_checkpoint_is_exit_code_4(predict_rows) -> None:
    check_short(predict_rows("--model.checkpoint", "./nope"), 4, "./nope")


def test_a_checkpoint_that_is_a_file_is_exit_code_4(predict_rows) -> None:
    Path("file").write_text("x")
    check_short(predict_rows("--model.checkpoint", "file"), 4, "file")


def test_an_empty_directory_is_exit_code_4(predict_rows) -> None:
    Path("empty").mkdir()
    check_short(predict_rows("--model.checkpoint", "empty"), 4, "empty", "config.json")


def test_a_dense_model_is_named_with_exit_code_4(predict_rows, tiny) -> None:
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained("dense")
    for path in tiny.iterdir():
        if "token" in path.name:
            shutil.copy(path, "dense")
    check_short(predict_rows("--model.checkpoint", "dense"), 4, "LlamaForCausalLM", "dense model")


def test_a_truncated_shard_is_exit_code_4(predict_rows, tiny) -> None:
    shutil.copytree(tiny, "cut")
    weights = Path("cut/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1000])
    check_short(predict_rows("--model.checkpoint", "cut"), 4, "model.safetensors", "truncated")


def test_a_missing_tensor_is_exit_code_4(predict_rows, tiny) -> None:
    shutil.copytree(tiny, "gap")
    weights = load_file("gap/model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, "gap/model.safetensors", metadata={"format": "pt"})
    check_short(predict_rows("--model.checkpoint", "gap"), 4, "model.norm.weight")


@pytest.mark.parametrize("task", ["Generate", "Score", "Embed"])
def test_nan_weights_are_exit_code_4(predict_rows, tiny, task) -> None:
    shutil.copytree(tiny, "nan")
    weights = load_file("nan/model.safetensors")
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, "nan/model.safetensors", metadata={"format": "pt"})
    options = ("--model.checkpoint", "nan", "--model.task", task)
    finished = predict_rows(*options)
    assert finished.code == 4, finished.err
    # The progress bar has begun by then, and must not share the message's line.
    (message,) = [line for line in finished.err.splitlines() if line.startswith("error: ")]
    assert "check_weights" in message
    assert "Traceback" not in finished.err
    assert not list(Path("out").glob("predictions*"))
    assert not Path("out/errors.jsonl").exists()
    assert not Path("out/parts").exists()


def test_check_weights_names_the_nan_tensor(predict_rows, tiny) -> None:
    shutil.copytree(tiny, "nan")
    weights = load_file("nan/model.safetensors")
    weights["model.layers.1.mlp.experts.2.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, "nan/model.safetensors", metadata={"format": "pt"})
    finished = predict_rows("--model.checkpoint", "nan", "--model.check_weights", "true")
    check_short(finished, 4, "model.layers.1.mlp.experts.2.up_proj.weight")


def test_a_training_checkpoint_that_is_none_is_exit_code_4(predict_rows) -> None:
    Path("junk.ckpt").write_text("junk")
    check_short(predict_rows("--ckpt_path", "junk.ckpt"), 4, "junk.ckpt")


def test_a_training_checkpoint_of_another_model_is_exit_code_4(predict_rows) -> None:
    torch.save({"state_dict": {"other.weight": torch.zeros(2)}}, "other.ckpt")
    check_short(predict_rows("--ckpt_path", "other.ckpt"), 4, "other.ckpt")


# Training.

WRONG_FIT = {
    "missing train": (["--data.train", "nope.txt"], ["nope.txt"]),
    "missing val": (["--data.val", "nope.txt"], ["nope.txt"]),
    "misspelt optimizer": (["--model.optimizer", "Adamm"], ["model.optimizer", "Adamm"]),
    "negative learning rate": (
        ["--model.optimizer", "AdamW", "--model.optimizer.lr=-1"],
        ["learning rate"],
    ),
    "schedule without its numbers": (
        ["--model.lr_scheduler", "OneCycleLR"],
        ["model.lr_scheduler", "max_lr"],
    ),
    "longer than the positions": (
        ["--data.sequence_length", "1000"],
        ["data.sequence_length", "1,000", "128"],
    ),
    "batch larger than the text": (["--data.batch_size", "9999"], ["data.batch_size", "9999"]),
    "no sequences": (["--data.batch_size", "0"], ["data.batch_size", "0"]),
    "text for a number": (["--trainer.max_steps", "few"], ["trainer.max_steps", "few"]),
    "ckpt_path missing": (["--ckpt_path", "nope.ckpt"], ["--ckpt_path", "nope.ckpt"]),
}


@pytest.mark.parametrize("name", WRONG_FIT)
def test_a_wrong_option_of_fit_is_named_with_exit_code_2(fit_text, name) -> None:
    arguments, words = WRONG_FIT[name]
    finished = fit_text(*arguments)
    assert "Traceback" not in finished.err
    assert finished.code == 2, finished.err
    for word in words:
        assert word in finished.err
    lines = finished.err.strip().splitlines()
    assert len(lines) <= MAX_LINES, f"{len(lines)} lines:\n{finished.err[:500]}\n..."
    assert not list(Path().rglob("*.ckpt"))
    assert not Path("lightning_logs").exists()


def test_fit_without_data_names_the_option(run, tiny) -> None:
    finished = run("fit", "--model.checkpoint", tiny, "--output_dir", "out")
    check_short(finished, 2, "data.train")


def test_validate_without_held_out_text_names_the_option(run, tiny) -> None:
    finished = run(
        *("validate", "--model.checkpoint", tiny, "--output_dir", "out"),
        *("--data.sequence_length", 32),
    )
    check_short(finished, 2, "--data.val")


def test_fit_from_a_junk_training_checkpoint_is_exit_code_4(fit_text) -> None:
    Path("junk.ckpt").write_text("junk")
    finished = fit_text("--ckpt_path", "junk.ckpt")
    assert finished.code == 4, finished.err
    assert "junk.ckpt" in finished.err
    assert "Traceback" not in finished.err


def test_export_without_its_options_names_them(run) -> None:
    check_short(run("export"), 2, "--export_dir")


def test_export_of_a_missing_training_checkpoint_is_exit_code_2(run, tiny) -> None:
    options = ("--model.checkpoint", tiny, "--ckpt_path", "nope.ckpt", "--export_dir", "out")
    check_short(run("export", *options), 2, "nope.ckpt")
    assert not Path("out").exists()


def test_export_of_a_junk_training_checkpoint_is_exit_code_4(run, tiny) -> None:
    Path("junk.ckpt").write_text("junk")
    options = ("--model.checkpoint", tiny, "--ckpt_path", "junk.ckpt", "--export_dir", "out")
    check_short(run("export", *options), 4, "junk.ckpt")
    assert not Path("out").exists()
