"""Parts in any order, and the finished files in the order of the input."""

import io
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_lightning.jobs import LocalStorage, PartWriter
from moe_lightning.jobs.parts import Parts
from moe_lightning.jobs.results import PARQUET_ROWS, write_errors, write_predictions


@pytest.fixture
def add(tmp_path):
    """Adds a part to `add.parts`; text instead of a dict is an error's JSON."""
    storage = LocalStorage(tmp_path)
    writer = PartWriter(storage, "job/a", epoch=1)
    storage.write("job/a/epochs/000001.json", b"{}")

    def add(rows):
        number = len(add.entries)
        lines = [
            (n, not isinstance(row, str), row if isinstance(row, str) else text(row))
            for n, row in rows.items()
        ]
        add.entries.append(writer.commit(f"{number}", lines))
        assert add.parts.add(add.entries[-1])

    add.entries, add.parts, add.storage = [], Parts(storage), storage
    yield add
    add.parts.close()


def text(row):
    return json.dumps(row, ensure_ascii=False)


def predictions(parts):
    file = io.BytesIO()
    write_predictions(parts, file, "jsonl")
    return file.getvalue()


def parquet(parts):
    file = io.BytesIO()
    write_predictions(parts, file, "parquet")
    return pq.ParquetFile(io.BytesIO(file.getvalue()))


def errors(parts, input_errors=()):
    file = io.BytesIO()
    return write_errors(parts, input_errors, file), file.getvalue()


def test_rows_come_in_the_order_of_the_input(add):
    add({4: {"id": "e"}, 0: {"id": "a"}})
    add({3: {"id": "d"}, 1: '{"id": "b", "error": "x"}', 2: {"id": "c"}})
    assert add.parts.rows_ok.tolist() == [0, 2, 3, 4]
    assert add.parts.rows_failed.tolist() == [1]
    assert predictions(add.parts) == b'{"id": "a"}\n{"id": "c"}\n{"id": "d"}\n{"id": "e"}\n'
    assert add.parts.read(1) == b'{"id": "b", "error": "x"}'


def test_without_parts_the_files_are_empty(add):
    assert (add.parts.rows_ok.tolist(), add.parts.rows_failed.tolist()) == ([], [])
    assert predictions(add.parts) == b""
    assert errors(add.parts) == ((0, 0), b"")
    assert parquet(add.parts).read().num_rows == 0


def test_empty_parts_and_parts_of_errors_only_give_no_rows(add):
    add({})
    add({0: '{"id": 1}'})
    assert predictions(add.parts) == b""
    assert parquet(add.parts).read().num_rows == 0
    assert errors(add.parts) == ((0, 1), b'{"id": 1}\n')


def test_errors_of_the_input_and_of_rows_are_merged_by_row(add):
    add({5: '{"row": 5}', 1: '{"row": 1}', 2: {"id": 2}})
    of_input = [(0, '{"in": 0}'), (3, '{"in": 3}'), (9, '{"in": 9}')]
    assert errors(add.parts, of_input) == (
        (3, 5),
        b'{"in": 0}\n{"row": 1}\n{"in": 3}\n{"row": 5}\n{"in": 9}\n',
    )


def test_an_answer_beats_an_error_and_a_later_part_an_earlier_one(add):
    add({0: {"v": 1}, 1: "first error", 2: {"v": 1}, 3: "first error"})
    add({0: "too late", 1: {"v": 2}, 2: {"v": 2}, 3: "second error"})
    assert add.parts.rows_ok.tolist() == [0, 1, 2]
    assert add.parts.rows_failed.tolist() == [3]
    assert [add.parts.read(row) for row in range(4)] == [
        b'{"v": 1}',
        b'{"v": 2}',
        b'{"v": 2}',
        b"second error",
    ]


def test_text_with_tabs_line_ends_and_other_alphabets_is_kept(add):
    kept = 'tab\t newline\n return\r\n \x85 \x0b \x0c \x1c separators\u2028\u2029 日本 é \x00 \\ "'
    add({1: {"text": kept}, 0: {"text": "first"}})
    lines = predictions(add.parts).split(b"\n")
    assert [json.loads(line)["text"] for line in lines[:-1]] == ["first", kept]
    assert lines[-1] == b""


def test_row_numbers_are_ordered_as_numbers(add):
    add({10: {"id": "ten"}, 9: {"id": "nine"}, 100: {"id": "hundred"}})
    assert add.parts.rows_ok.tolist() == [9, 10, 100]


def test_more_parts_than_files_that_stay_open(add):
    numbers = list(range(1000))
    print("seed 0")
    random.Random(0).shuffle(numbers)
    for part in range(100):
        add({n: {"id": n} for n in numbers[part * 10 : part * 10 + 10]})
    lines = predictions(add.parts).splitlines()
    assert [json.loads(line)["id"] for line in lines] == list(range(1000))


def test_a_part_that_is_not_what_the_ledger_says_is_left_out_and_counted(add):
    add({0: {"id": 0}})
    add({1: {"id": 1}})
    content = add.storage.read(add.entries[0].part)
    for damage in (content[:-1], content + b"x", content.replace(b"0}", b"9}"), b"", None):
        add.storage.remove(add.entries[0].part)
        if damage is not None:
            add.storage.write(add.entries[0].part, damage)
        parts = Parts(add.storage)
        parts.extend(add.entries)
        assert parts.num_damaged == 1
        assert parts.rows_ok.tolist() == [1]


def test_a_part_is_taken_in_once(add):
    add({0: {"id": 0}})
    add.parts.extend(add.entries)
    assert predictions(add.parts) == b'{"id": 0}\n'


# Parquet.


def test_parquet_rows_over_several_row_groups(add):
    rows = [
        {"id": n, "logprob": -0.5 * n, "token_ids": [n, n + 1]} for n in range(PARQUET_ROWS + 5)
    ]
    add(dict(enumerate(rows)))
    file = parquet(add.parts)
    assert file.num_row_groups == 2
    assert file.schema_arrow.field("id").type == pa.int64()
    assert file.read().to_pylist() == rows


def test_parquet_takes_rows_without_new_tokens_in_the_first_row_group(add):
    """Prompts that fill the model's positions generate nothing: their lists have no type."""
    rows = [{"id": n, "token_ids": []} for n in range(PARQUET_ROWS)]
    rows += [{"id": -1, "token_ids": [5, 6]}, {"id": -2, "token_ids": []}]
    add(dict(enumerate(rows)))
    assert parquet(add.parts).read().to_pylist() == rows


def test_parquet_takes_embeddings_that_are_empty_first(add):
    rows = [{"id": n, "embedding": []} for n in range(PARQUET_ROWS)]
    rows += [{"id": 7, "embedding": [0.5, -1.0]}]
    add(dict(enumerate(rows)))
    assert parquet(add.parts).read().to_pylist() == rows


@pytest.mark.parametrize(
    ("ids", "wanted"),
    [
        ([1, 2, -3], [1, 2, -3]),
        ([1, 2, "x"], ["1", "2", "x"]),
        ([2**63 - 1, -(2**63)], [2**63 - 1, -(2**63)]),
        ([2**64, -1], [str(2**64), "-1"]),
        (["", "é\u2028"], ["", "é\u2028"]),
    ],
)
def test_parquet_ids_are_strings_unless_all_are_64_bit_integers(add, ids, wanted):
    add({n: {"id": each} for n, each in enumerate(ids)})
    assert parquet(add.parts).read()["id"].to_pylist() == wanted


def test_an_id_that_is_text_in_the_last_row_group_makes_all_ids_text(add):
    add({n: {"id": n} for n in range(PARQUET_ROWS)} | {PARQUET_ROWS: {"id": "x"}})
    ids = parquet(add.parts).read()["id"].to_pylist()
    assert (ids[:2], ids[-2:]) == (["0", "1"], [str(PARQUET_ROWS - 1), "x"])


def test_a_file_that_cannot_be_written_is_not_there(add, tmp_path):
    add({0: {"id": 0}})
    add.parts.read = lambda row: b"{not json"
    with (
        pytest.raises(json.JSONDecodeError),
        add.storage.writer("predictions.parquet") as file,
    ):
        write_predictions(add.parts, file, "parquet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job"]
    assert not list((tmp_path / "job" / "tmp").iterdir())
