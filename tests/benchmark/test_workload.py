"""The rows are of the lengths that are asked for."""

import json

import pytest

from moe_lightning import MoELightningModule
from moe_lightning.benchmark import make_workload
from moe_lightning.errors import UsageError


@pytest.fixture(scope="module")
def encoder():
    return MoELightningModule("demo").encoder


def make(path, encoder, source, **options):
    options = {"num_rows": 7, "num_prompt_tokens": 40, "max_new_tokens": 5} | options
    return make_workload(path / "rows.jsonl", encoder, source=source, **options)


def test_rows_of_the_demo_have_the_length(tmp_path, encoder):
    made = make(tmp_path, encoder, "demo")
    rows = [json.loads(line) for line in made.path.read_text().splitlines()]
    assert [row["id"] for row in rows] == list(range(7))
    assert len({row["prompt"] for row in rows}) == 7
    assert all(37 <= length <= 43 for length in made.num_prompt_tokens)
    assert made.prompt_tokens == sum(len(encoder.tokenizer(r["prompt"])["input_ids"]) for r in rows)
    assert made.decode_tokens == 7 * 4
    assert made.num_tokens == made.prompt_tokens + 7 * 5


def test_rows_of_a_file_are_cut(tmp_path, encoder):
    path = tmp_path / "own.txt"
    path.write_text("short\n" + "a long line of words " * 50 + "\n")
    made = make(tmp_path, encoder, str(path), num_prompt_tokens=12)
    assert made.num_rows == 2
    assert made.num_prompt_tokens[0] < 12
    assert abs(made.num_prompt_tokens[1] - 12) <= 2


def test_an_empty_file_is_refused(tmp_path, encoder):
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(UsageError, match="no row"):
        make(tmp_path, encoder, str(tmp_path / "none.jsonl"))
