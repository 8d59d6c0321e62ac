"""Parts and their merge: any order in, the input's order out."""

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_lightning.callbacks import merge
from moe_lightning.callbacks.merge import Parts, write_jsonl, write_parquet
from moe_lightning.callbacks.prediction_writer import to_json


def write_part(directory: Path, number: int, rows: dict[int, dict[str, Any] | str]) -> None:
    """A part by hand; text instead of a dict is an error's JSON."""
    with open(directory / f"0-{number:08d}.part", "wb") as file:
        for row, answer in rows.items():
            kind = "error" if isinstance(answer, str) else "ok"
            text = answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
            file.write(f"{row}\t{kind}\t{text}\n".encode())


def test_rows_come_in_the_order_of_the_input(tmp_path: Path) -> None:
    write_part(tmp_path, 1, {4: {"id": "e"}, 0: {"id": "a"}})
    write_part(tmp_path, 0, {3: {"id": "d"}, 1: '{"id": "b", "error": "x"}', 2: {"id": "c"}})
    parts = Parts(tmp_path)
    assert parts.rows_ok == [0, 2, 3, 4]
    assert parts.rows_failed == [1]
    write_jsonl(parts, tmp_path / "out.jsonl")
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert lines == ['{"id": "a"}', '{"id": "c"}', '{"id": "d"}', '{"id": "e"}']
    assert parts.read(1) == '{"id": "b", "error": "x"}'


def test_without_parts_the_files_are_empty(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    assert (parts.rows_ok, parts.rows_failed) == ([], [])
    write_jsonl(parts, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == b""
    write_parquet(parts, tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet").num_rows == 0


def test_empty_parts_and_parts_of_errors_only_give_no_rows(tmp_path: Path) -> None:
    write_part(tmp_path, 0, {})
    write_part(tmp_path, 1, {0: '{"id": 1}'})
    parts = Parts(tmp_path)
    assert (parts.rows_ok, parts.rows_failed) == ([], [0])
    write_parquet(parts, tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet").num_rows == 0


def test_temporary_files_of_unfinished_parts_are_left_out(tmp_path: Path) -> None:
    write_part(tmp_path, 0, {0: {"id": "a"}})
    (tmp_path / ".0-00000001.part.123.tmp").write_bytes(b'1\tok\t{"id": "b"}\n')
    assert Parts(tmp_path).rows_ok == [0]


def test_text_with_tabs_line_ends_and_other_alphabets_is_kept(tmp_path: Path) -> None:
    text = 'tab\t newline\n return\r\n separator\u2028 日本 é \x00 \\ "'
    (tmp_path / "0-00000000.part").write_bytes(
        f"1\tok\t{to_json({'text': text})}\n0\tok\t{to_json({'text': 'first'})}\n".encode()
    )
    write_jsonl(Parts(tmp_path), tmp_path / "out.jsonl")
    lines = (tmp_path / "out.jsonl").read_bytes().split(b"\n")
    assert [json.loads(line)["text"] for line in lines[:-1]] == ["first", text]
    assert lines[-1] == b""


def test_more_parts_than_files_that_stay_open(tmp_path: Path) -> None:
    numbers = list(range(1000))
    print("seed 0")
    random.Random(0).shuffle(numbers)
    for part in range(200):
        write_part(tmp_path, part, {n: {"id": n} for n in numbers[part * 5 : part * 5 + 5]})
    write_jsonl(Parts(tmp_path), tmp_path / "out.jsonl")
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == list(range(1000))


def test_row_numbers_are_ordered_as_numbers(tmp_path: Path) -> None:
    write_part(tmp_path, 0, {10: {"id": "ten"}, 9: {"id": "nine"}, 100: {"id": "hundred"}})
    assert Parts(tmp_path).rows_ok == [9, 10, 100]


def test_parquet_rows_over_several_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "PARQUET_ROWS", 2)
    rows = [{"id": n, "logprob": -0.5 * n, "token_ids": [n, n + 1]} for n in range(5)]
    write_part(tmp_path, 0, dict(enumerate(rows)))
    write_parquet(Parts(tmp_path), tmp_path / "out.parquet")
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.to_pylist() == rows
    assert table.schema.field("id").type == pa.int64()
    assert pq.ParquetFile(tmp_path / "out.parquet").num_row_groups == 3


def test_parquet_takes_rows_without_new_tokens_in_the_first_row_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts that fill the model's positions generate nothing: their lists have no type."""
    monkeypatch.setattr(merge, "PARQUET_ROWS", 2)
    rows = [{"id": n, "token_ids": tokens} for n, tokens in enumerate([[], [], [5, 6], []])]
    write_part(tmp_path, 0, dict(enumerate(rows)))
    write_parquet(Parts(tmp_path), tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == rows


def test_parquet_ids_are_strings_unless_all_are_integers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "PARQUET_ROWS", 2)
    write_part(tmp_path, 0, {0: {"id": 1}, 1: {"id": 2}, 2: {"id": "x"}})
    write_parquet(Parts(tmp_path), tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet")["id"].to_pylist() == ["1", "2", "x"]


def test_parquet_ids_beyond_64_bits_become_strings(tmp_path: Path) -> None:
    write_part(tmp_path, 0, {0: {"id": 2**64}, 1: {"id": -1}})
    write_parquet(Parts(tmp_path), tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet")["id"].to_pylist() == [str(2**64), "-1"]


def test_a_failed_merge_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "0.part").write_bytes(b"0\tok\t{not json\n")
    with pytest.raises(json.JSONDecodeError):
        write_parquet(Parts(tmp_path / "parts"), tmp_path / "out.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["parts"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("plain", '{"text": "plain"}'),
        ("é 日本 🎭", '{"text": "é 日本 🎭"}'),
        ("a\nb\t\u2028", '{"text": "a\\nb\\t\u2028"}'),
        ("\ud83d alone é", '{"text": "\\ud83d alone \\u00e9"}'),
    ],
    ids=["ascii", "beyond ascii", "line ends", "lone surrogate"],
)
def test_to_json_is_one_line_of_utf8(text: str, wanted: str) -> None:
    line = to_json({"text": text})
    assert line == wanted
    assert b"\n" not in line.encode()
    assert json.loads(line) == {"text": text}
