import gzip
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from input_files import write, write_parquet

from moe_lightning.data.readers import open_source
from moe_lightning.data.records import Record, RowError
from moe_lightning.errors import UsageError


def damaged_parquet(path: Path) -> Path:
    write_parquet(path, {"prompt": [f"{i} some text" for i in range(5000)]})
    raw = bytearray(path.read_bytes())
    raw[4:1000] = bytes(996)
    return write(path, bytes(raw))


def cut_parquet(path: Path) -> Path:
    write_parquet(path, {"prompt": ["a", "b"]})
    return write(path, path.read_bytes()[:-20])


def fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def directory(path: Path) -> Path:
    path.mkdir()
    return path


BAD_FILES: dict[str, tuple[str, Callable[[Path], Path], str]] = {
    "missing": ("p.jsonl", lambda p: p, "does not exist"),
    "directory": ("d", directory, "is a directory"),
    "fifo": ("f", fifo, "not a regular file"),
    "unknown ending": ("p.csv", lambda p: write(p, "a,b\n"), "'.csv'"),
    "gzip": ("p.jsonl", lambda p: write(p, gzip.compress(b"{}")), "gzip-compressed"),
    "zip": ("p.txt", lambda p: write(p, b"PK\x03\x04..."), "a zip archive"),
    "zstd": ("p.jsonl", lambda p: write(p, b"\x28\xb5\x2f\xfd.."), "zstd-compressed"),
    "utf-16": ("p.txt", lambda p: write(p, "hällo".encode("utf-16")), "UTF-16"),
    "binary": ("p.txt", lambda p: write(p, b"\x7fELF\0\0"), "a zero byte at 4"),
    "lfs pointer": (
        "p.parquet",
        lambda p: write(p, "version https://git-lfs.github.com/spec/v1\noid sha256:00"),
        "git lfs pull",
    ),
    "html": ("p.jsonl", lambda p: write(p, "\n<!DOCTYPE html><html>"), "an HTML page"),
    "array": ("p.json", lambda p: write(p, '[\n{"prompt": "a"},\n'), "p.json > p-rows.jsonl`"),
    "array jsonl": ("p.jsonl", lambda p: write(p, '[{"prompt": "a"}]\n'), "one JSON array"),
    "pretty": ("p.jsonl", lambda p: write(p, '{\n  "prompt": "a"\n}\n'), "several lines"),
    "parquet as text": (
        "p.txt",
        lambda p: write_parquet(p, {"prompt": ["a"]}),
        "--data.format parquet",
    ),
    "text as parquet": ("p.parquet", lambda p: write(p, "hello"), "does not begin with PAR1"),
    "empty parquet": ("p.parquet", lambda p: write(p, b""), "empty (0 bytes)"),
    "cut parquet": ("p.parquet", cut_parquet, "cut short or of another format"),
    "damaged parquet": ("p.parquet", damaged_parquet, "row group 0"),
    "no prompt column": (
        "p.parquet",
        lambda p: write_parquet(p, {"text": ["a"]}),
        "['text'], but neither 'prompt' nor 'messages'",
    ),
    "prompt of numbers": (
        "p.parquet",
        lambda p: write_parquet(p, {"prompt": [1]}),
        "'prompt' holds int64",
    ),
    "id of floats": (
        "p.parquet",
        lambda p: write_parquet(p, {"prompt": ["a"], "id": [1.5]}),
        "'id' holds double",
    ),
    "messages of strings": (
        "p.parquet",
        lambda p: write_parquet(p, {"messages": [["a"]]}),
        "lists of {role, content}",
    ),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_are_usage_errors(tmp_path: Path, kind: str) -> None:
    name, make, part = BAD_FILES[kind]
    path = make(tmp_path / name)
    with pytest.raises(UsageError) as caught:
        list(open_source(path).scan())
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("path", ["", ".", "/", "a\0b"])
def test_paths_that_are_no_file(path: str) -> None:
    with pytest.raises(UsageError):
        open_source(path)


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "p.txt", "a")

    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)  # chmod does not stop root
    with pytest.raises(UsageError, match="cannot be read: Permission denied"):
        open_source(path)


def test_a_first_row_that_is_a_list_is_only_a_bad_row(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", '[1, 2]\n{"prompt": "a"}\n')
    assert [type(item) for item in open_source(path).scan()] == [RowError, Record]


def test_format_overrides_the_ending(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", '{"prompt": "a"}\n')
    assert open_source(path, format="text").read([]) == []
    [text] = open_source(path, format="text").scan()
    [json_row] = open_source(path, format="jsonl").scan()
    assert isinstance(text, Record)
    assert isinstance(json_row, Record)
    assert (text.prompt, json_row.prompt) == ('{"prompt": "a"}', "a")
