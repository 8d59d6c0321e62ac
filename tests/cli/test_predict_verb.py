"""``predict`` from the command line: the contract's files and rows, against plain transformers."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from report_files import JOB
from transformers import AutoTokenizer

GENERATE_KEYS = ["id", "text", "token_ids", "finish_reason", "num_prompt_tokens", "num_tokens"]
SCORE_KEYS = ["id", "logprob", "num_tokens", "perplexity"]
PROMPTS = ["To be", "or not to be, that is the question", "é", "Whether 'tis nobler", "in"]
ROWS = [{"id": f"row-{n}", "prompt": prompt} for n, prompt in enumerate(PROMPTS)]


@pytest.fixture
def tokenizer(tiny: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny)


@pytest.fixture
def plain(tiny: Path, plain_transformers: Callable[[Path], Any]) -> Any:
    return plain_transformers(tiny)


JOB_FILES = {"_SUCCESS", "job/plan.json"}


def files_below(directory: Path) -> set[str]:
    return {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()}


def test_generate_leaves_the_contracts_files_and_nothing_else(predict, work, write_rows) -> None:
    write_rows("in.jsonl", ROWS)
    finished = predict("--data.input", "in.jsonl", "--model.task.max_new_tokens", 5)
    assert finished.code == 0, finished.err
    assert {path.name for path in work.iterdir()} == {"in.jsonl", "out"}
    assert {p.name for p in Path("out").iterdir()} == {
        "predictions.jsonl",
        "config.yaml",
        "run.json",
        *JOB,
    }


def test_generate_rows_are_those_of_transformers_in_input_order(
    predict, plain, tokenizer, write_rows, read_rows
) -> None:
    write_rows("in.jsonl", ROWS)
    predict("--data.input", "in.jsonl", "--model.task", "Generate", "--model.task.max_new_tokens=5")
    rows = read_rows("out/predictions.jsonl")
    assert [row["id"] for row in rows] == [row["id"] for row in ROWS]
    for row, prompt in zip(rows, PROMPTS, strict=True):
        assert list(row) == GENERATE_KEYS
        prompt_ids = tokenizer(prompt)["input_ids"]
        new_ids = plain.greedy(prompt_ids, 5)
        assert row["token_ids"] == new_ids
        assert row["text"] == tokenizer.decode(new_ids, skip_special_tokens=True)
        assert row["num_prompt_tokens"] == len(prompt_ids)
        assert row["num_tokens"] == len(new_ids)
        has_ended = new_ids[-1] == tokenizer.eos_token_id
        assert row["finish_reason"] == ("stop" if has_ended else "length")


def test_score_rows_are_those_of_transformers(
    predict, plain, tokenizer, write_rows, read_rows
) -> None:
    write_rows("in.jsonl", ROWS)
    finished = predict("--data.input", "in.jsonl", "--model.task", "Score")
    assert finished.code == 0, finished.err
    rows = read_rows("out/predictions.jsonl")
    assert [row["id"] for row in rows] == [row["id"] for row in ROWS]
    for row, prompt in zip(rows, PROMPTS, strict=True):
        assert list(row) == SCORE_KEYS
        ids = tokenizer(prompt)["input_ids"]
        expected = plain.logprob(ids)
        assert row["num_tokens"] == len(ids)
        # Sums of fp32 log-probabilities of at most 40 tokens, in another order.
        assert row["logprob"] == pytest.approx(expected, abs=1e-4)
        perplexity = math.exp(-expected / max(1, len(ids) - 1))
        assert row["perplexity"] == pytest.approx(perplexity, rel=1e-4)


def test_embed_rows_are_those_of_transformers(
    predict, plain, tokenizer, write_rows, read_rows
) -> None:
    write_rows("in.jsonl", ROWS)
    finished = predict("--data.input", "in.jsonl", "--model.task=Embed")
    assert finished.code == 0, finished.err
    rows = read_rows("out/predictions.jsonl")
    assert [row["id"] for row in rows] == [row["id"] for row in ROWS]
    for row, prompt in zip(rows, PROMPTS, strict=True):
        assert list(row) == ["id", "embedding"]
        expected = plain.embedding(tokenizer(prompt)["input_ids"]).tolist()
        assert row["embedding"] == pytest.approx(expected, abs=1e-5)


def test_messages_use_the_chat_template(predict, plain, tokenizer, write_rows, read_rows) -> None:
    messages = [{"role": "user", "content": "Who is there?"}]
    write_rows("in.jsonl", [{"id": 1, "messages": messages}])
    predict("--data.input", "in.jsonl", "--model.task.max_new_tokens", 4)
    (row,) = read_rows("out/predictions.jsonl")
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert row["num_prompt_tokens"] == len(ids)
    assert row["token_ids"] == plain.greedy(ids, 4)


def test_openai_batch_lines_keep_their_ids_and_lengths(
    predict, plain, tokenizer, write_rows, read_rows
) -> None:
    messages = [{"role": "user", "content": "Nay, answer me"}]
    common = {"method": "POST"}
    write_rows(
        "in.jsonl",
        [
            common
            | {
                "custom_id": "chat",
                "url": "/v1/chat/completions",
                "body": {"model": "any", "messages": messages, "max_tokens": 3},
            },
            common
            | {
                "custom_id": "text",
                "url": "/v1/completions",
                "body": {"model": "any", "prompt": "Long live", "max_tokens": 6},
            },
            common
            | {
                "custom_id": "bad",
                "url": "/v1/completions",
                "body": {"model": "any", "prompt": "Long live", "n": 2},
            },
        ],
    )
    finished = predict("--data.input", "in.jsonl")
    assert finished.code == 3, finished.err
    chat, text = read_rows("out/predictions.jsonl")
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert (chat["id"], chat["token_ids"]) == ("chat", plain.greedy(ids, 3))
    prompt_ids = tokenizer("Long live")["input_ids"]
    assert (text["id"], text["token_ids"]) == ("text", plain.greedy(prompt_ids, 6))
    (error,) = read_rows("out/errors.jsonl")
    assert (error["id"], error["line"], error["stage"]) == ("bad", 3, "read")
    assert "'body.n'" in error["error"]


def test_parquet_input_gives_the_rows_of_json_lines(predict, write_rows, read_rows) -> None:
    write_rows("in.jsonl", ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), "in.parquet", row_group_size=2)
    predict("--data.input", "in.jsonl", "--model.task", "Score")
    expected = Path("out/predictions.jsonl").read_bytes()
    finished = predict("--data.input", "in.parquet", "--model.task", "Score")
    assert finished.code == 0, finished.err
    assert Path("out/predictions.jsonl").read_bytes() == expected


def test_text_input_has_one_prompt_a_line_and_line_numbers_as_ids(
    predict, tokenizer, read_rows
) -> None:
    Path("in.txt").write_text("To be\n\n  or not\r\nto be")
    predict("--data.input", "in.txt", "--model.task", "Score")
    rows = read_rows("out/predictions.jsonl")
    counts = [len(tokenizer(text)["input_ids"]) for text in ("To be", "  or not", "to be")]
    assert [(row["id"], row["num_tokens"]) for row in rows] == list(
        zip([1, 3, 4], counts, strict=True)
    )


def test_bad_rows_go_to_errors_and_the_exit_code_is_3(predict, write_rows, read_rows) -> None:
    too_long = "x " * 200  # 128 positions
    write_rows(
        "in.jsonl",
        [
            {"id": "a", "prompt": "good"},
            "not json",
            {"id": "empty", "prompt": ""},
            {"id": "long", "prompt": too_long},
            {"id": "a", "prompt": "the id again"},
            {"id": 7, "prompt": "good too"},
        ],
    )
    finished = predict("--data.input", "in.jsonl", "--model.task.max_new_tokens", 2)
    assert finished.code == 3
    assert "errors.jsonl" in finished.err
    assert [row["id"] for row in read_rows("out/predictions.jsonl")] == ["a", 7]
    errors = read_rows("out/errors.jsonl")
    assert [list(error) for error in errors] == [["id", "line", "offset", "stage", "error"]] * 4
    places = [(error["id"], error["line"], error["stage"]) for error in errors]
    assert places == [
        (None, 2, "read"),
        ("empty", 3, "encode"),
        ("long", 4, "encode"),
        ("a", 5, "read"),
    ]
    lines = Path("in.jsonl").read_bytes().splitlines(keepends=True)
    assert [error["offset"] for error in errors] == [sum(map(len, lines[:n])) for n in (1, 2, 3, 4)]
    assert "128" in errors[2]["error"]
    report = json.loads(Path("out/run.json").read_text())
    assert (report["num_rows"], report["num_predictions"], report["num_errors"]) == (6, 2, 4)
    assert files_below(Path("out/job")) == {"plan.json"}


def test_only_bad_rows_end_with_3_and_an_empty_file(predict, write_rows, read_rows) -> None:
    write_rows("in.jsonl", ["{", '{"id": 1}'])
    assert predict("--data.input", "in.jsonl").code == 3
    assert Path("out/predictions.jsonl").read_bytes() == b""
    assert len(read_rows("out/errors.jsonl")) == 2


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_zero_rows_give_an_empty_file_and_exit_0(predict, content) -> None:
    Path("in.jsonl").write_text(content)
    finished = predict("--data.input", "in.jsonl")
    assert finished.code == 0, finished.err
    assert Path("out/predictions.jsonl").read_bytes() == b""
    assert not Path("out/errors.jsonl").exists()
    report = json.loads(Path("out/run.json").read_text())
    assert (report["num_rows"], report["exit_reason"]) == (0, "finished")


def test_zero_rows_as_parquet_is_a_readable_file(predict) -> None:
    Path("in.jsonl").write_text("")
    finished = predict("--data.input", "in.jsonl", "--writer.format", "parquet")
    assert finished.code == 0, finished.err
    assert pq.read_table("out/predictions.parquet").num_rows == 0


@pytest.mark.parametrize("task", ["Generate", "Score", "Embed"])
def test_parquet_output_holds_the_rows_of_json_lines(predict, write_rows, read_rows, task) -> None:
    write_rows("in.jsonl", ROWS)
    options = ("--data.input", "in.jsonl", "--model.task", task)
    predict(*options)
    expected = read_rows("out/predictions.jsonl")
    finished = predict(*options, "--writer.format", "parquet", "--output_dir", "out2")
    assert finished.code == 0, finished.err
    assert files_below(Path("out2")) - JOB_FILES == {
        "predictions.parquet",
        "config.yaml",
        "run.json",
    }
    assert pq.read_table("out2/predictions.parquet").to_pylist() == expected


def test_parquet_output_with_ids_of_both_kinds_has_strings(predict, write_rows) -> None:
    write_rows("in.jsonl", [{"id": 5, "prompt": "a b"}, {"id": "x", "prompt": "c d"}])
    predict("--data.input", "in.jsonl", "--model.task", "Score", "--writer.format", "parquet")
    assert pq.read_table("out/predictions.parquet")["id"].to_pylist() == ["5", "x"]


def test_parquet_output_takes_ids_beyond_64_bits(predict, write_rows) -> None:
    write_rows("in.jsonl", [{"id": 2**70, "prompt": "a b"}, {"id": 1, "prompt": "c d"}])
    options = ("--data.input", "in.jsonl", "--model.task", "Score", "--writer.format", "parquet")
    assert predict(*options).code == 0
    assert pq.read_table("out/predictions.parquet")["id"].to_pylist() == [str(2**70), "1"]


@pytest.mark.parametrize("task", ["Generate", "Score"])
def test_the_budget_changes_no_row(predict, write_rows, read_rows, task) -> None:
    rows = [{"id": n, "prompt": "la " * (1 + 7 * n % 20)} for n in range(23)]
    write_rows("in.jsonl", rows)
    options = ("--data.input", "in.jsonl", "--model.task", task)
    predict(*options)
    expected = read_rows("out/predictions.jsonl")
    # A longer row gets a batch of its own: Score computes most rows alone here.
    finished = predict(*options, "--data.max_batch_tokens", 16)
    assert finished.code == 0, finished.err
    answers = read_rows("out/predictions.jsonl")
    assert [row["id"] for row in answers] == list(range(23))
    for answer, wanted in zip(answers, expected, strict=True):
        if task == "Generate":
            assert answer == wanted
        else:
            assert answer["logprob"] == pytest.approx(wanted["logprob"], abs=1e-4)


def test_a_rows_own_options_come_first(predict, write_rows, read_rows) -> None:
    write_rows(
        "in.jsonl",
        [{"id": 1, "prompt": "To be", "max_new_tokens": 2}, {"id": 2, "prompt": "To be"}],
    )
    predict("--data.input", "in.jsonl", "--model.task.max_new_tokens", 6)
    short, long = read_rows("out/predictions.jsonl")
    assert short["token_ids"] == long["token_ids"][:2]
    assert short["num_tokens"] == 2


def test_limit_rows_takes_the_first_ones(predict, write_rows, read_rows) -> None:
    write_rows("in.jsonl", ROWS)
    predict("--data.input", "in.jsonl", "--data.limit_rows", 2, "--model.task", "Score")
    assert [row["id"] for row in read_rows("out/predictions.jsonl")] == ["row-0", "row-1"]


def test_lightnings_limit_predict_batches_writes_what_was_computed(
    predict, write_rows, read_rows
) -> None:
    write_rows("in.jsonl", ROWS)
    options = ("--data.input", "in.jsonl", "--model.task", "Score", "--data.max_batch_tokens", 1)
    finished = predict(*options, "--trainer.limit_predict_batches", 2)
    assert finished.code == 0, finished.err
    assert len(read_rows("out/predictions.jsonl")) == 2


def test_a_rerun_replaces_every_file_of_the_run_before(predict, write_rows, read_rows) -> None:
    write_rows("in.jsonl", [*ROWS, "not json"])
    assert predict("--data.input", "in.jsonl", "--model.task", "Score").code == 3
    write_rows("in.jsonl", ROWS[:2])
    assert predict("--data.input", "in.jsonl", "--model.task", "Embed").code == 0
    rows = read_rows("out/predictions.jsonl")
    assert [list(row) for row in rows] == [["id", "embedding"]] * 2
    assert not Path("out/errors.jsonl").exists()
    assert json.loads(Path("out/run.json").read_text())["num_rows"] == 2
    task = yaml.safe_load(Path("out/config.yaml").read_text())["model"]["task"]
    assert task["class_path"].endswith("Embed")


def test_a_rerun_in_the_other_format_leaves_no_predictions_of_the_run_before(
    predict, write_rows
) -> None:
    write_rows("in.jsonl", ROWS)
    options = ("--data.input", "in.jsonl", "--model.task", "Score")
    predict(*options)
    predict(*options, "--writer.format", "parquet")
    assert files_below(Path("out")) - JOB_FILES == {
        "predictions.parquet",
        "config.yaml",
        "run.json",
    }


def test_a_rerun_gives_the_same_bytes(predict, write_rows) -> None:
    write_rows("in.jsonl", ROWS)
    options = ("--data.input", "in.jsonl", "--model.task.temperature", 1.0)
    predict(*options)
    first = Path("out/predictions.jsonl").read_bytes()
    predict(*options)
    assert Path("out/predictions.jsonl").read_bytes() == first


def test_run_json_says_what_was_done_and_with_what(predict, tokenizer, write_rows, work) -> None:
    write_rows("in.jsonl", ROWS)
    predict("--data.input", "in.jsonl", "--model.task.max_new_tokens", 3)
    report = json.loads(Path("out/run.json").read_text())
    assert report["exit_reason"] == "finished"
    assert {"torch", "lightning", "transformers", "moe_lightning", "python"} <= set(
        report["versions"]
    )
    assert len(report["devices"]) == 1
    assert (report["num_rows"], report["num_predictions"], report["num_errors"]) == (5, 5, 0)
    num_prompt_tokens = sum(len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS)
    assert report["num_prompt_tokens"] == num_prompt_tokens
    rows = [json.loads(line) for line in Path("out/predictions.jsonl").read_bytes().splitlines()]
    assert report["num_new_tokens"] == sum(row["num_tokens"] for row in rows)
    assert report["tokens_per_s"] > 0
    assert report["elapsed_s"] > 0


def test_the_summary_names_rows_and_the_directory(predict, write_rows) -> None:
    write_rows("in.jsonl", ROWS)
    finished = predict("--data.input", "in.jsonl", "--model.task", "Score")
    assert "5 of 5 rows" in finished.err
    assert "out" in finished.err.splitlines()[-1]
    assert finished.out == ""


def test_text_beyond_ascii_is_written_as_itself(predict, write_rows, read_rows) -> None:
    write_rows("in.jsonl", [json.dumps({"id": "ключ-日本", "prompt": "été"}, ensure_ascii=False)])
    predict("--data.input", "in.jsonl", "--model.task", "Score")
    assert "ключ-日本".encode() in Path("out/predictions.jsonl").read_bytes()


def test_the_output_directory_is_made_with_its_parents(predict, write_rows) -> None:
    write_rows("in.jsonl", ROWS[:1])
    options = ("--data.input", "in.jsonl", "--model.task", "Score")
    assert predict(*options, "--output_dir", "a/b/c").code == 0
    assert os.path.isfile("a/b/c/predictions.jsonl")
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "flag", ["--trainer.enable_progress_bar=false", "--trainer.barebones=true"]
)
def test_lightnings_flags_switch_the_progress_bar_off(predict, write_rows, flag) -> None:
    write_rows("in.jsonl", ROWS)
    finished = predict("--data.input", "in.jsonl", "--model.task", "Score", flag)
    assert finished.code == 0, finished.err
    assert "Predicting" not in finished.err
    assert Path("out/predictions.jsonl").is_file()
