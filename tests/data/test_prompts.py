import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from tiny_tokenizer import make_tokenizer
from torch.utils.data import DataLoader, default_collate

from moe_lightning.data import prompts as prompts_module
from moe_lightning.data.batches import as_row_batch
from moe_lightning.data.encode import Encoder
from moe_lightning.data.prompts import PromptData
from moe_lightning.data.records import Row, RowBatch, RowOptions
from moe_lightning.errors import UsageError


class CountingTask:
    default_max_new_tokens = 2
    rows_factor = 1

    def planned_tokens(self, num_prompt_tokens_N, max_new_tokens_N):  # type: ignore[no-untyped-def]
        return num_prompt_tokens_N + max_new_tokens_N


class TwiceTask(CountingTask):
    rows_factor = 2


ENCODER = Encoder(make_tokenizer(), max_positions=8, vocab_size=10, add_generation_prompt=True)


def write_rows(path: Path, rows: list[Any]) -> str:
    path.write_text(
        "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    )
    return str(path)


# Tokens with <s>: 2, -, 4, 9 (too long), 3, -; costs with 2 new tokens: 4, 6, 3 + 7 = 10
ROWS = [
    {"id": "p", "prompt": "a"},
    "{broken",
    {"id": "q", "prompt": "a b c"},
    {"id": "r", "prompt": "a a a a a a a a"},
    {"id": "s", "prompt": "b b", "max_new_tokens": 7},
    {"id": "q", "prompt": "a"},
]


def ids(data: PromptData) -> list[list[object]]:
    return [[row.id for row in batch.rows] for batch in data.predict_dataloader()]


@pytest.mark.parametrize("limit", [0, 5_000_000])
def test_plan_and_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(prompts_module, "MAX_TOKENS_IN_MEMORY", limit)
    data = PromptData(write_rows(tmp_path / "p.jsonl", ROWS), max_batch_tokens=12)
    data.plan(ENCODER, CountingTask())
    assert data.num_rows == 6
    assert [(e.row, e.line, e.id, e.stage) for e in data.row_errors] == [
        (1, 2, None, "read"),
        (3, 4, "r", "encode"),
        (5, 6, "q", "read"),
    ]
    assert data.num_tokens_N.tolist() == [2, 4, 3]
    assert [batch.tolist() for batch in data.batches] == [[4], [2, 0]]
    lines = (tmp_path / "p.jsonl").read_bytes().splitlines(keepends=True)
    p, q, s = (sum(map(len, lines[:n])) for n in (0, 2, 4))
    none = RowOptions()
    assert list(data.predict_dataloader()) == [
        RowBatch(0, [Row(4, 5, "s", [1, 4, 4], RowOptions(max_new_tokens=7), s)], []),
        RowBatch(1, [Row(2, 3, "q", [1, 3, 4, 5], none, q), Row(0, 1, "p", [1, 3], none, p)], []),
    ]


def test_rows_factor_widens_the_batches(tmp_path: Path) -> None:
    data = PromptData(write_rows(tmp_path / "p.jsonl", ROWS), max_batch_tokens=15)
    data.plan(ENCODER, TwiceTask())
    assert ids(data) == [["s", "q", "p"]]


@pytest.mark.parametrize(("limit", "num_errors", "good"), [(0, 0, []), (1, 0, ["p"]), (3, 1, None)])
def test_limit_rows(tmp_path: Path, limit: int, num_errors: int, good: list[str] | None) -> None:
    data = PromptData(write_rows(tmp_path / "p.jsonl", ROWS), limit_rows=limit)
    data.plan(ENCODER, CountingTask())
    assert data.num_rows == limit
    assert len(data.row_errors) == num_errors
    assert [i for batch in ids(data) for i in batch] == (["q", "p"] if good is None else good)


def test_limit_on_a_full_chunk_and_progress(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.txt"
    path.write_text("a\n" * 1100)
    data = PromptData(str(path), limit_rows=1024)
    data.plan(ENCODER, CountingTask(), is_quiet=False)
    assert data.num_rows == 1024
    assert sum(len(batch) for batch in data.batches) == 1024
    assert capsys.readouterr().err == ""  # no bar for less than a second


def test_file_changed_between_plan_and_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts_module, "MAX_TOKENS_IN_MEMORY", 0)
    path = tmp_path / "p.txt"
    path.write_text("a\nb\n")
    data = PromptData(str(path))
    data.plan(ENCODER, CountingTask())
    path.write_text("a\nb\nc\n")
    with pytest.raises(UsageError, match="changed while it was in use"):
        ids(data)


@pytest.mark.parametrize("value", [0, -1])
def test_budget_must_be_positive(value: int) -> None:
    with pytest.raises(UsageError, match=r"--data\.max_batch_tokens"):
        PromptData("p.txt", max_batch_tokens=value)


def test_limit_must_not_be_negative() -> None:
    with pytest.raises(UsageError, match=r"--data\.limit_rows"):
        PromptData("p.txt", limit_rows=-1)


class EchoModule(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = ENCODER
        self.task = CountingTask()

    def predict_step(self, batch: RowBatch, batch_idx: int) -> list[dict[str, Any]]:
        return [{"id": row.id, "token_ids": row.token_ids} for row in batch.rows]


def make_trainer(path: Path) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        default_root_dir=path,
    )


def test_with_a_trainer(tmp_path: Path) -> None:
    data = PromptData(write_rows(tmp_path / "p.jsonl", ROWS), max_batch_tokens=12)
    batches: Any = make_trainer(tmp_path).predict(EchoModule(), data)
    assert [[row["id"] for row in batch] for batch in batches] == [["s"], ["q", "p"]]
    assert [row["token_ids"] for row in batches[1]] == [[1, 3, 4, 5], [1, 3]]


def test_zero_rows_with_a_trainer(tmp_path: Path) -> None:
    data = PromptData(write_rows(tmp_path / "p.jsonl", []))
    assert not make_trainer(tmp_path).predict(EchoModule(), data)
    assert data.num_rows == 0


def test_only_for_predict() -> None:
    with pytest.raises(UsageError, match="only serves predict, not fit"):
        PromptData("p.txt").setup("fit")


def row(number: int, token_ids: list[int], id: str | int | None = None, **options: Any) -> Row:
    return Row(number, number, number if id is None else id, token_ids, RowOptions(**options))


def test_user_batch_of_texts() -> None:
    expected = RowBatch(3, [row(10, [1, 3]), row(11, [1, 4])], [])
    assert as_row_batch(["a", "b"], ENCODER, index=3, first_id=10) == expected
    assert as_row_batch(("a", "b"), ENCODER, index=3, first_id=10) == expected
    assert as_row_batch(expected, ENCODER, index=9) is expected
    assert as_row_batch([], ENCODER, index=0) == RowBatch(0, [], [])


def test_user_batch_of_dicts_keeps_bad_rows_as_errors() -> None:
    items = [{"id": "x", "prompt": "a", "seed": 1}, {"id": "y"}, {"prompt": "c " * 9}]
    batch = as_row_batch(items, ENCODER, index=0, first_id=5)
    assert batch.rows == [row(5, [1, 3], "x", seed=1)]
    assert [(e.row, e.line, e.id, e.stage) for e in batch.errors] == [
        (6, None, "y", "read"),
        (7, None, 7, "encode"),
    ]


def test_user_batch_of_torchs_default_collation() -> None:
    rows = [
        {"prompt": "a", "id": 7, "temperature": 0.5},
        {"prompt": "b", "id": 8, "temperature": 0},
    ]
    rows[1]["temperature"] = 0.25
    [collated] = DataLoader(rows, batch_size=2)  # type: ignore[arg-type]
    batch = as_row_batch(collated, ENCODER, index=0)
    assert batch.rows == [
        Row(0, 0, 7, [1, 3], RowOptions(temperature=0.5)),
        Row(1, 1, 8, [1, 4], RowOptions(temperature=0.25)),
    ]


def test_user_batch_of_token_ids() -> None:
    input_ids = torch.tensor([[0, 0, 1, 3], [1, 4, 5, 3], [0, 0, 0, 0], [1, 99, 3, 3]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]])
    batch = as_row_batch(
        {"input_ids": input_ids, "attention_mask": mask, "id": ["a", "b", "c", "d"]},
        ENCODER,
        index=0,
    )
    assert batch.rows == [row(0, [1, 3], "a"), row(1, [1, 4, 5, 3], "b")]
    assert [(e.id, e.stage) for e in batch.errors] == [("c", "encode"), ("d", "encode")]
    no_mask = as_row_batch({"input_ids": input_ids[:2]}, ENCODER, index=0, first_id=4)
    assert no_mask.rows == [row(4, [0, 0, 1, 3]), row(5, [1, 4, 5, 3])]


TRANSPOSED = [{"messages": [{"role": "user", "content": c}]} for c in "ab"]


@pytest.mark.parametrize(
    ("batch", "part"),
    [
        ("a", "a string"),
        (None, "null"),
        (torch.zeros(2, 3), "Tensor"),
        (["a", {"prompt": "b"}], "a string"),
        ([1, 2], "a number"),
        ({"text": ["a"]}, "['text']"),
        ({"prompt": "a"}, "a string"),
        ({"prompt": ["a", "b"], "id": [1]}, "{'id': 1, 'prompt': 2}"),
        ({"prompt": ["a"], "stop": [["x"]]}, "collate_fn=list"),
        (default_collate(TRANSPOSED), "collate_fn=list"),
        ({"input_ids": torch.zeros(3, dtype=torch.long)}, "[3]"),
        ({"input_ids": torch.zeros(1, 2)}, "[1, 2]"),
        ({"input_ids": [[1]]}, "a list"),
        ({"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.ones(1, 3)}, "[1, 3]"),
        ({"input_ids": torch.ones(2, 2).long(), "id": [1]}, "{'id': 1, 'input_ids': 2}"),
    ],
)
def test_other_user_batches_are_refused(batch: object, part: str) -> None:
    with pytest.raises(TypeError) as caught:
        as_row_batch(batch, ENCODER, index=0)
    assert "must be a RowBatch, a list of prompts" in str(caught.value)
    assert part in str(caught.value)


def test_reencoded_rows_that_fail_now_are_errors_of_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts_module, "MAX_TOKENS_IN_MEMORY", 0)
    path = tmp_path / "p.txt"
    path.write_text("a\nb b\n")
    encoder = Encoder(make_tokenizer(), max_positions=8, vocab_size=10, add_generation_prompt=True)
    data = PromptData(str(path))
    data.plan(encoder, CountingTask())
    encoder.max_positions = 2
    [batch] = data.predict_dataloader()
    assert [r.id for r in batch.rows] == [1]
    assert [e.id for e in batch.errors] == [2]


def test_batches_are_row_numbers(tmp_path: Path) -> None:
    data = PromptData(write_rows(tmp_path / "p.jsonl", ROWS))
    data.plan(ENCODER, CountingTask())
    assert all(batch.dtype == np.int64 for batch in data.batches)
