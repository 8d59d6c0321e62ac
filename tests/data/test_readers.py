import json
import os
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from input_files import write, write_parquet

from moe_lightning.data.lines import JsonLinesSource
from moe_lightning.data.parquet import ParquetSource
from moe_lightning.data.readers import open_source
from moe_lightning.data.records import Record, RowError, RowOptions
from moe_lightning.data.row_ids import IdIndex
from moe_lightning.errors import UsageError


def text_record(row: int, line: int, prompt: str, offset: int) -> Record:
    return Record(row, line, line, prompt, None, RowOptions(), offset)


def test_text_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "p.txt", b"\xef\xbb\xbffirst\r\n\n  \t\n two \xc3\xa4\nlast")
    source = open_source(path)
    rows = [
        text_record(0, 1, "first", 0),
        text_record(1, 4, " two ä", 15),
        text_record(2, 5, "last", 23),
    ]
    assert list(source.scan()) == rows
    assert source.read([2, 0, 2]) == [rows[2], rows[0], rows[2]]
    assert source.num_bytes_scanned == source.num_bytes == path.stat().st_size


@pytest.mark.parametrize("content", [b"", b"\n\n \r\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.json", "p"])
def test_zero_rows_are_legal(tmp_path: Path, content: bytes, name: str) -> None:
    source = open_source(write(tmp_path / name, content))
    assert list(source.scan()) == []
    assert source.read([]) == []


def test_zero_rows_of_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "p.parquet", {"prompt": pa.array([], pa.string())})
    assert list(open_source(path).scan()) == []


def test_json_lines_with_every_bad_kind(tmp_path: Path) -> None:
    lines = [
        b'{"id": "a", "prompt": "x"}',
        b"{broken",
        b"",
        b'{"id": "c", "prompt": null}',
        b'{"id": "a", "prompt": "again"}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b"[" * 200_000,
        b'{"id": ' + b"1" * 5000 + b', "prompt": "x"}',
        b"null",
        b'{"id": 1, "prompt": "number"}',
        b'{"id": "1", "prompt": "text"}',
        b'{"id": 1, "prompt": "again"}',
    ]
    source = open_source(write(tmp_path / "p.jsonl", b"\r\n".join(lines)))
    items = list(source.scan())
    assert [item.row for item in items] == list(range(12))
    assert [item.line for item in items] == [1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]
    good = [item.row for item in items if isinstance(item, Record)]
    assert good == [0, 9, 10]
    errors = {item.line: item for item in items if isinstance(item, RowError)}
    assert {error.stage for error in errors.values()} == {"read"}
    parts = {
        2: "not JSON: Expecting property name enclosed in double quotes at character 2",
        4: "neither 'prompt' nor 'messages'",
        5: "the id 'a' is that of line 1",
        6: "byte 0xff at position 12",
        7: "surrogate",
        8: "nested too deeply",
        9: "digits",
        10: "not null",
        13: "the id 1 is that of line 11",
    }
    assert set(errors) == set(parts)
    for line, part in parts.items():
        assert part in errors[line].error
    assert errors[4].id == "c"
    assert errors[2].id is None
    assert source.read(range(12)) == items
    assert source.read([11, 0]) == [items[11], items[0]]


def test_line_number_as_id_meets_own_id(tmp_path: Path) -> None:
    content = '{"id": 2, "prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c"}\n'
    items = list(open_source(write(tmp_path / "p.jsonl", content)).scan())
    assert [type(item) for item in items] == [Record, RowError, Record]
    assert items[2].id == 3


def test_too_long_line_is_an_error_and_the_next_is_read(tmp_path: Path) -> None:
    long = b'{"prompt": "' + b"x" * 3_000_000 + b'"}'
    path = write(tmp_path / "p.jsonl", long + b'\n{"prompt": "a"}\n' + long)
    source = JsonLinesSource(path, max_line_bytes=1000)
    tracemalloc.start()
    items = list(source.scan())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [type(item) for item in items] == [RowError, Record, RowError]
    assert isinstance(items[0], RowError)
    assert "3,000,015 bytes; at most 1,000" in items[0].error
    assert peak < 500_000
    assert source.read([2, 1, 0]) == items[::-1]


def test_line_of_exactly_the_limit_is_read(tmp_path: Path) -> None:
    line = '{"prompt": "aaa"}'
    path = write(tmp_path / "p.jsonl", f"{line}\n{line}")
    items = list(JsonLinesSource(path, max_line_bytes=len(line)).scan())
    assert [type(item) for item in items] == [Record, Record]


def test_parquet_rows(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "p.parquet",
        {
            "id": pa.array(["a", None, "a", "d"]),
            "prompt": pa.array(["x", None, "y", None]),
            "messages": pa.array(
                [None, None, None, [{"role": "user", "content": "hi", "name": None}]]
            ),
            "max_new_tokens": pa.array([2.0, None, None, 4.0]),
            "stop": pa.array([["."], None, None, None]),
            "extra": pa.array([b"\xff"] * 4),
        },
        row_group_size=2,
    )
    source = open_source(path)
    items = list(source.scan())
    assert items[0] == Record(0, 1, "a", "x", None, RowOptions(max_new_tokens=2, stop=(".",)))
    assert isinstance(items[1], RowError)
    assert (items[1].line, items[1].id) == (2, 2)
    assert isinstance(items[2], RowError)
    assert "line 1" in items[2].error
    assert items[3] == Record(
        3, 4, "d", None, [{"role": "user", "content": "hi"}], RowOptions(max_new_tokens=4)
    )
    assert source.read([3, 1, 0, 2]) == [items[3], items[1], items[0], items[2]]
    assert source.num_bytes_scanned == source.num_bytes


def test_parquet_cell_that_is_not_utf8_spoils_only_its_row(tmp_path: Path) -> None:
    raw = pa.array([b"a", b"\xff", b"c"], pa.binary()).view(pa.string())
    source = open_source(write_parquet(tmp_path / "p.parquet", {"prompt": raw}))
    items = list(source.scan())
    assert [type(item) for item in items] == [Record, RowError, Record]
    assert source.read([0, 1, 2]) == items


def test_parquet_cache_keeps_at_least_one_group(tmp_path: Path) -> None:
    prompts = [f"prompt {i}" for i in range(50)]
    path = write_parquet(tmp_path / "p.parquet", {"prompt": prompts}, row_group_size=7)
    source = ParquetSource(path, cache_bytes=1)
    items = list(source.scan())
    order = [49, 0, 7, 6, 48, 13, 14]
    assert source.read(order) == [items[row] for row in order]
    assert len(source._cache) == 1


@pytest.mark.parametrize("name", ["p.txt", "p.parquet"])
def test_changed_file_is_noticed(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    make = write_parquet if name == "p.parquet" else None
    write_parquet(path, {"prompt": ["a", "b"]}) if make else write(path, "a\nb\n")
    source = open_source(path)
    assert len(list(source.scan())) == 2
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(UsageError, match="changed while it was in use"):
        source.read([0])
    with pytest.raises(UsageError, match="changed while it was in use"):
        list(source.scan())
    path.unlink()
    with pytest.raises(UsageError, match="can no longer be read"):
        source.read([0])


def test_file_that_grows_during_the_scan_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "p.txt", "a\n" * 10)
    scan = open_source(path).scan()
    next(scan)
    with path.open("a") as file:
        file.write("late\n")
    with pytest.raises(UsageError, match="20 bytes, now 25"):
        list(scan)


def test_rows_not_scanned_are_refused(tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "p.txt", "a\nb\n"))
    next(source.scan())
    with pytest.raises(IndexError):
        source.read([1])


GOOD = st.builds(
    lambda text: json.dumps({"prompt": text}).encode(),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
)
BAD = st.sampled_from(
    [b"{", b"[1]", b"nul", b'{"prompt": 1}', b'{"prompt": "\xff"}', b'{"text": "a"}', b"\x01", b"1"]
)
BLANK = st.sampled_from([b"", b" ", b"\t\r"])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("gbe"), GOOD, BAD, BLANK), max_size=30),
    st.sampled_from([b"\n", b"\r\n"]),
    st.randoms(use_true_random=False),
)
def test_any_mix_of_lines(tmp_path_factory, mix, end, random) -> None:  # type: ignore[no-untyped-def]
    lines = [{"g": good, "b": bad, "e": blank}[kind] for kind, good, bad, blank in mix]
    kinds = [kind for kind, *_ in mix]
    path = tmp_path_factory.mktemp("mix") / "p.jsonl"
    # a good first and last row, so that the file as a whole is JSON Lines
    frame = b'{"prompt": "frame"}'
    path.write_bytes(end.join([frame, *lines, frame]))
    source = open_source(path)
    items = list(source.scan())
    expected = [(1, "g")]
    expected += [(i, kind) for i, kind in enumerate(kinds, start=2) if kind != "e"]
    expected.append((len(lines) + 2, "g"))
    found = [(item.line, "g" if isinstance(item, Record) else "b") for item in items]
    assert found == expected
    assert [item.row for item in items] == list(range(len(items)))
    order = list(range(len(items)))
    random.shuffle(order)
    assert source.read(order) == [items[row] for row in order]


def test_many_rows_stream_in_little_memory(tmp_path: Path) -> None:
    num_rows = 200_000
    path = tmp_path / "p.jsonl"
    with path.open("w") as file:
        for i in range(num_rows):
            file.write(f'{{"id": "name-of-row-{i}", "prompt": "{"x" * 100}"}}\n')
        file.write('{"id": "name-of-row-777", "prompt": "again"}\n')
    source = open_source(path)
    assert source.num_bytes > 25_000_000
    tracemalloc.start()
    num_good, last = 0, None
    for last in source.scan():
        num_good += isinstance(last, Record)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_good == num_rows
    assert isinstance(last, RowError)
    assert "line 778 " in last.error
    # offsets 8, hashes 8, table 4 to 6 bytes a row, and copies while they grow; nothing of the text
    assert peak < 35 * num_rows
    [far] = source.read([150_000])
    assert far.id == "name-of-row-150000"


@given(st.lists(st.one_of(st.integers(0, 20), st.sampled_from(["1", "2", "x"])), max_size=60))
def test_id_index_equals_a_dict(ids: list[int | str]) -> None:
    index = IdIndex()
    first: dict[tuple[type, int | str], int] = {}
    for row, id_ in enumerate(ids):
        key = (type(id_), id_)
        assert index.add(id_, row=row * 3) == first.get(key)
        first.setdefault(key, row * 3)


def test_id_index_grows() -> None:
    index = IdIndex()
    assert all(index.add(i, row=i) is None for i in range(5000))
    assert [index.add(i, row=5000 + i) for i in range(5000)] == list(range(5000))
