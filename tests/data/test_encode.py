from typing import Any

import pytest
from tiny_tokenizer import make_tokenizer

from moe_lightning.data.encode import CHUNK_ROWS, Encoder
from moe_lightning.data.records import Record, Row, RowError, RowOptions

USER = [{"role": "user", "content": "b a"}]


def record(
    row: int, prompt: str | None = None, messages: list[dict[str, Any]] | None = None
) -> Record:
    return Record(row, row + 1, f"id{row}", prompt, messages, RowOptions(seed=row))


def make_encoder(**changes: object) -> Encoder:
    tokenizer = changes.pop("tokenizer", None) or make_tokenizer()
    options = {"max_positions": 8, "vocab_size": 10, "add_generation_prompt": True}
    return Encoder(tokenizer, **{**options, **changes})  # type: ignore[arg-type]


def test_prompts_and_messages_in_order() -> None:
    rows = make_encoder().encode([record(0, "a b"), record(1, None, USER), record(2, "c zzz")])
    assert rows == [
        Row(0, 1, "id0", [1, 3, 4], RowOptions(seed=0)),
        # user : b a </s> assistant :   (the template adds no <s>)
        Row(1, 2, "id1", [6, 8, 4, 3, 2, 7, 8], RowOptions(seed=1)),
        Row(2, 3, "id2", [1, 5, 0], RowOptions(seed=2)),
    ]


def test_without_generation_prompt() -> None:
    [row] = make_encoder(add_generation_prompt=False).encode([record(0, None, USER)])
    assert isinstance(row, Row)
    assert row.token_ids == [6, 8, 4, 3, 2]


def test_many_rows_equal_one_by_one() -> None:
    prompts = [("a b c " * (i % 3)).strip() for i in range(CHUNK_ROWS + 7)]
    tokenizer = make_tokenizer()
    rows = make_encoder(max_positions=None).encode([record(i, p) for i, p in enumerate(prompts)])
    assert [row.token_ids for row in rows if isinstance(row, Row)] == [
        tokenizer(prompt)["input_ids"] for prompt in prompts
    ]


def test_too_long_prompt_names_the_numbers() -> None:
    good, bad = make_encoder().encode([record(0, "a " * 7), record(1, "a " * 8)])
    assert isinstance(good, Row)
    assert len(good.token_ids) == 8
    assert isinstance(bad, RowError)
    assert (bad.stage, bad.id, bad.line) == ("encode", "id1", 2)
    assert "9 tokens" in bad.error
    assert "8 positions" in bad.error


def test_no_tokens() -> None:
    [bad] = make_encoder(tokenizer=make_tokenizer(bos=False)).encode([record(0, "")])
    assert isinstance(bad, RowError)
    assert "no tokens" in bad.error


def test_token_outside_the_vocabulary() -> None:
    good, bad = make_encoder(vocab_size=5).encode([record(0, "b"), record(1, "c")])
    assert isinstance(good, Row)
    assert isinstance(bad, RowError)
    assert "token id 5" in bad.error


@pytest.mark.parametrize("bad_prompt", ["\ud800", "a \udfff b"])
def test_a_text_that_the_tokenizer_refuses_spoils_only_its_row(bad_prompt: str) -> None:
    first, bad, last = make_encoder().encode(
        [record(0, "a"), record(1, bad_prompt), record(2, "b")]
    )
    assert isinstance(first, Row)
    assert isinstance(last, Row)
    assert last.token_ids == [1, 4]
    assert isinstance(bad, RowError)
    assert bad.error.startswith("the tokenizer refused the row")


def test_template_errors_spoil_only_their_row() -> None:
    tool = [{"role": "tool", "content": "x"}]
    bad, good = make_encoder().encode([record(0, None, tool), record(1, None, USER)])
    assert isinstance(good, Row)
    assert isinstance(bad, RowError)
    assert "no tools here" in bad.error


def test_no_chat_template() -> None:
    encoder = make_encoder(tokenizer=make_tokenizer(template=None))
    bad, good = encoder.encode([record(0, None, USER), record(1, "a")])
    assert isinstance(good, Row)
    assert isinstance(bad, RowError)
    assert "no chat template" in bad.error


def test_nothing() -> None:
    assert make_encoder().encode([]) == []
