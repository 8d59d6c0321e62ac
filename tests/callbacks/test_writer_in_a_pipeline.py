"""PredictionWriter and Throughput in a plain Lightning pipeline with the user's own dataloader."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pyarrow.parquet as pq
import pytest
import torch
from report_files import JOB
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from moe_lightning import Generate, MoELightningModule, PredictionWriter, Score, Throughput

PROMPTS = ["To be", "or not to be", "that is the question"]


@pytest.fixture
def checkpoint(family_checkpoint: Callable[..., Path]) -> Path:
    return family_checkpoint("qwen3_moe")


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., L.Trainer]:
    """A trainer as in a user's script, in an empty working directory."""
    monkeypatch.chdir(tmp_path)

    def make(*callbacks: L.Callback, **options: Any) -> L.Trainer:
        return L.Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=list(callbacks),
            **options,
        )

    return make


def read(path: str) -> list[Any]:
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]


def test_prompts_of_a_dataloader_are_written_in_its_order(
    trainer, checkpoint, plain_transformers
) -> None:
    module = MoELightningModule(str(checkpoint), task=Score())
    loader = DataLoader(PROMPTS, batch_size=2)
    returned = trainer(PredictionWriter("out")).predict(module, loader)
    rows = read("out/predictions.jsonl")
    assert [row["id"] for row in rows] == [0, 1, 2]
    words, plain = AutoTokenizer.from_pretrained(checkpoint), plain_transformers(checkpoint)
    for row, prompt in zip(rows, PROMPTS, strict=True):
        expected = plain.logprob(words(prompt)["input_ids"])
        assert row["logprob"] == pytest.approx(expected, abs=1e-4)
    assert [row for batch in returned for row in batch] == rows
    assert {p.name for p in Path("out").iterdir()} == JOB | {"predictions.jsonl"}


def test_dicts_of_a_dataloader_keep_their_ids_and_bad_rows_are_errors(trainer, checkpoint) -> None:
    module = MoELightningModule(str(checkpoint), task=Generate(max_new_tokens=3))
    rows = [
        {"id": "a", "prompt": PROMPTS[0]},
        {"id": "b", "prompt": ""},
        {"id": "c", "messages": [{"role": "user", "content": "Who is there?"}]},
    ]
    loader = DataLoader(rows, batch_size=2, collate_fn=list)
    trainer(PredictionWriter("out"), Throughput("out")).predict(
        module, loader, return_predictions=False
    )
    assert [row["id"] for row in read("out/predictions.jsonl")] == ["a", "c"]
    (error,) = read("out/errors.jsonl")
    assert (error["id"], error["line"], error["stage"]) == ("b", None, "encode")
    report = json.loads(Path("out/run.json").read_text())
    assert (report["num_rows"], report["num_predictions"], report["num_errors"]) == (3, 2, 1)


def test_token_ids_of_a_dataloader_skip_the_padding(
    trainer, checkpoint, plain_transformers
) -> None:
    module = MoELightningModule(str(checkpoint), task=Score())
    batch = {
        "input_ids": torch.tensor([[9, 10, 11, 0], [12, 13, 14, 15]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
    }
    trainer(PredictionWriter("out")).predict(module, DataLoader([batch], batch_size=None))
    plain = plain_transformers(checkpoint)
    wanted = [plain.logprob([9, 10, 11]), plain.logprob([12, 13, 14, 15])]
    rows = read("out/predictions.jsonl")
    assert [row["logprob"] for row in rows] == pytest.approx(wanted, abs=1e-4)
    assert [row["num_tokens"] for row in rows] == [3, 4]


def test_several_dataloaders_follow_each_other(trainer, checkpoint) -> None:
    module = MoELightningModule(str(checkpoint), task=Score())
    loaders = [DataLoader(PROMPTS, batch_size=2), DataLoader(PROMPTS[:1], batch_size=2)]
    trainer(PredictionWriter("out")).predict(module, loaders)
    rows = read("out/predictions.jsonl")
    assert [row["id"] for row in rows] == [0, 1, 2, 3]
    assert rows[3]["logprob"] == pytest.approx(rows[0]["logprob"], abs=1e-4)


def test_a_second_predict_of_the_same_trainer_starts_again(trainer, checkpoint) -> None:
    module = MoELightningModule(str(checkpoint), task=Score())
    run = trainer(PredictionWriter("out"), Throughput("out"))
    run.predict(module, DataLoader(PROMPTS, batch_size=1))
    first = Path("out/predictions.jsonl").read_bytes()
    run.predict(module, DataLoader(PROMPTS, batch_size=1))
    assert Path("out/predictions.jsonl").read_bytes() == first
    assert json.loads(Path("out/run.json").read_text())["num_rows"] == 3


def test_an_empty_dataloader_gives_an_empty_file(trainer, checkpoint) -> None:
    module = MoELightningModule(str(checkpoint), task=Score())
    trainer(PredictionWriter("out")).predict(module, DataLoader([], batch_size=2))
    assert Path("out/predictions.jsonl").read_bytes() == b""


def test_without_a_directory_the_trainers_is_used(trainer, checkpoint) -> None:
    module = MoELightningModule(str(checkpoint), task=Score())
    run = trainer(PredictionWriter(format="parquet"), Throughput(), default_root_dir="root")
    run.predict(module, DataLoader(PROMPTS, batch_size=2))
    assert pq.read_table("root/predictions.parquet").num_rows == 3
    assert {p.name for p in Path("root").iterdir()} == JOB | {"predictions.parquet", "run.json"}
    assert {p.name for p in Path().iterdir()} == {"root"}


def test_an_exception_leaves_no_parts_and_names_itself_in_run_json(trainer, checkpoint) -> None:
    class Breaks(L.Callback):
        def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("someone else's callback")

    module = MoELightningModule(str(checkpoint), task=Score())
    run = trainer(PredictionWriter("out"), Throughput("out"), Breaks())
    with pytest.raises(RuntimeError, match="someone else's"):
        run.predict(module, DataLoader(PROMPTS, batch_size=1))
    assert {p.name for p in Path("out").iterdir()} == {"run.json"}
    reason = json.loads(Path("out/run.json").read_text())["exit_reason"]
    assert reason == "RuntimeError: someone else's callback"


def test_an_unusable_batch_says_what_is_accepted(trainer, checkpoint) -> None:
    module = MoELightningModule(str(checkpoint), task=Score())
    run = trainer(PredictionWriter("out"))
    with pytest.raises(TypeError, match="a batch for predict must be"):
        run.predict(module, DataLoader([1, 2, 3], batch_size=2))
    assert list(Path("out").iterdir()) == []
