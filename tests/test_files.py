"""Atomic files: the old one or the new one, and nothing beside them."""

import os
from pathlib import Path

import pytest

from moe_lightning.files import atomic_writer, write_atomically


def test_the_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with atomic_writer(path) as file:
        file.write(b"one")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_the_old_file_stays_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with atomic_writer(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt, SystemExit, OSError])
@pytest.mark.parametrize("has_old", [True, False])
def test_an_exception_leaves_what_was_there(
    tmp_path: Path, fault: type[BaseException], has_old: bool
) -> None:
    path = tmp_path / "a.bin"
    if has_old:
        path.write_bytes(b"old")
    with pytest.raises(fault, match="stop"), atomic_writer(path) as file:  # noqa: PT012
        file.write(b"half")
        raise fault("stop")
    assert os.listdir(tmp_path) == (["a.bin"] if has_old else [])
    if has_old:
        assert path.read_bytes() == b"old"


def test_a_name_that_cannot_be_taken_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "taken"
    path.mkdir()
    with pytest.raises(OSError, match="taken"):
        write_atomically(path, "text")
    assert os.listdir(tmp_path) == ["taken"]


def test_a_missing_directory_is_an_error_and_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "none" / "a.txt", "text")
    assert os.listdir(tmp_path) == []


def test_text_is_utf8_without_changes_at_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_atomically(path, "é\n日本\r\n")
    assert path.read_bytes() == "é\n日本\r\n".encode()


def test_text_that_utf8_cannot_hold_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_the_longest_name_of_a_directory_can_be_written(tmp_path: Path) -> None:
    """The temporary name is longer than the file's; names end at 255 bytes."""
    name = "predictions-" + "x" * 200 + ".jsonl"
    write_atomically(tmp_path / name, "text")
    assert os.listdir(tmp_path) == [name]


def test_the_file_has_the_rights_of_any_new_file(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("x")
    write_atomically(tmp_path / "atomic", "x")
    assert (tmp_path / "atomic").stat().st_mode == plain.stat().st_mode
