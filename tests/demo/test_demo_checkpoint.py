"""The shipped checkpoint and configs do what the model card and the README say."""

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from report_files import JOB, REPORT
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_lightning import MoELightningModule, Score
from moe_lightning.cli.main import main
from moe_lightning.demo import checkpoint_path, finetune_path, prompts_path
from moe_lightning.dispatch import LayerTrace

KINDS = ("plays", "verse", "prose")
PROMPTS = [json.loads(line) for line in prompts_path().read_text().splitlines()]


@pytest.fixture(scope="module")
def predictions(tmp_path_factory):
    """What the README's first command answers."""
    directory = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        assert main(["predict", "--config", "single_device.yaml"]) == 0
    output = directory / "outputs" / "single_device"
    names = {path.name for path in output.iterdir()}
    assert names == REPORT | JOB | {"predictions.jsonl", "run.json", "config.yaml"}
    return [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]


def test_it_is_small_and_has_prompts_of_all_kinds():
    num_bytes = sum(path.stat().st_size for path in checkpoint_path().iterdir())
    assert num_bytes < 24_000_000
    counts = {kind: sum(p["id"].startswith(kind) for p in PROMPTS) for kind in KINDS}
    assert counts == {"plays": 20, "verse": 20, "prose": 20}


def test_every_prompt_is_answered_in_order(predictions):
    assert [row["id"] for row in predictions] == [prompt["id"] for prompt in PROMPTS]


def test_answers_are_those_of_transformers(predictions):
    model = AutoModelForCausalLM.from_pretrained(checkpoint_path(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path())
    for number in range(0, 60, 6):
        inputs = tokenizer(PROMPTS[number]["prompt"], return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
        want = output[0, inputs["input_ids"].shape[1] :].tolist()
        assert predictions[number]["token_ids"] == want, PROMPTS[number]["id"]


def test_its_plays_read_like_plays(predictions):
    """Speakers in capitals at the beginning of a line, or stage directions."""
    texts = [row["text"] for row in predictions if row["id"].startswith("plays")]
    is_play = [re.search(r"^[A-Z][A-Z ]+\.$|\[E", text, re.MULTILINE) is not None for text in texts]
    words = " ".join(texts).lower().split()
    assert sum(is_play) >= 15
    assert sum(word.strip(".,;:!?") in ("thou", "thy", "sir", "lord", "king") for word in words) > 4


def test_it_has_learnt_and_sends_the_kinds_to_different_experts():
    """Held-out text: its perplexity, and the shares of tokens that each expert gets."""
    module = MoELightningModule("demo", task=Score())
    module.configure_model()
    counts: dict[str, dict[int, np.ndarray]] = {kind: {} for kind in KINDS}
    current = ""

    def count(trace: LayerTrace) -> None:
        found = np.bincount(trace.index_TK.flatten().numpy(), minlength=trace.num_experts)
        counts[current][trace.layer] = counts[current].get(trace.layer, 0) + found

    module.routing_log.subscribe(count)
    logprob = tokens = 0
    for current in KINDS:
        texts = [p["prompt"] for p in PROMPTS if p["id"].startswith(current)]
        with torch.inference_mode():
            for row in module.predict_step(texts, 0):
                logprob += row["logprob"]
                tokens += row["num_tokens"] - 1
    assert math.exp(-logprob / tokens) < 70, "chance is 2,048"
    shares = {
        kind: np.stack([c / c.sum() for _, c in sorted(layers.items())])
        for kind, layers in counts.items()
    }
    for one, other in (("plays", "verse"), ("plays", "prose"), ("verse", "prose")):
        assert np.abs(shares[one] - shares[other]).sum(1).mean() / 2 > 0.08


@pytest.mark.slow
def test_finetune_config_lowers_held_out_loss_and_predict_runs_from_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = ["--config", "finetune.yaml", "--trainer.enable_progress_bar", "false"]
    assert main(["validate", *base, "--output_dir", "before"]) == 0
    assert main(["fit", *base]) == 0
    with open("before/logs/metrics.csv") as file:
        (before,) = [float(r["val_loss"]) for r in csv.DictReader(file) if r["val_loss"]]
    with open("outputs/finetune/logs/metrics.csv") as file:
        after = [float(r["val_loss"]) for r in csv.DictReader(file) if r["val_loss"]]
    assert len(after) == 2
    assert after[-1] < before - 0.3
    messages = [{"role": "user", "content": "My lord, the king is at the gates!"}]
    Path("chat.jsonl").write_text(json.dumps({"id": 1, "messages": messages}) + "\n")
    options = [
        "--ckpt_path",
        "outputs/finetune/checkpoints/last.ckpt",
        "--data.input",
        "chat.jsonl",
    ]
    assert (
        main(["predict", "--config", "single_device.yaml", *options, "--output_dir", "tuned"]) == 0
    )
    (row,) = [json.loads(line) for line in Path("tuned/predictions.jsonl").read_text().splitlines()]
    assert row["finish_reason"] == "stop", "it has learnt where an answer ends"


def test_shipped_fine_tuning_sample_is_dialogue():
    for part, num_rows in (("train", 321), ("val", 80)):
        rows = [json.loads(line) for line in finetune_path(part).read_text().splitlines()]
        roles = [[message["role"] for message in row["messages"]] for row in rows]
        assert roles == [["user", "assistant"]] * num_rows
