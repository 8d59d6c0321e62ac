import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lightning.errors import UsageError
from moe_lightning.placement import ExpertPlacement

SMALL = ExpertPlacement(3, {1: ((0,), (1,), (0, 2)), 4: ((1,), (1,))})


@st.composite
def placements(draw: st.DrawFn) -> ExpertPlacement:
    num_slots = draw(st.integers(1, 5))
    some_slots = st.lists(st.integers(0, num_slots - 1), min_size=1, unique=True).map(tuple)
    layer = st.lists(some_slots, min_size=1, max_size=9).map(tuple)
    return ExpertPlacement(num_slots, draw(st.dictionaries(st.integers(0, 99), layer)))


def content(**changes: Any) -> dict[str, Any]:
    """A file's content, with some keys changed, or left out where they are None."""
    keys = {
        "format": "moe_lightning expert placement",
        "version": 1,
        "num_slots": 3,
        "layers": {"1": [[0], 1, [2, 0]]},
    }
    return {key: value for key, value in {**keys, **changes}.items() if value is not None}


def test_who_holds_what() -> None:
    assert SMALL.layers == (1, 4)
    assert (SMALL.num_experts(1), SMALL.num_experts(4)) == (3, 2)
    assert SMALL.experts_of(0, 1) == (0, 2)
    assert SMALL.experts_by_layer(0) == {1: (0, 2), 4: ()}
    assert SMALL.experts_by_layer(1) == {1: (1,), 4: (0, 1)}
    assert SMALL.experts_by_layer(2) == {1: (2,), 4: ()}
    assert SMALL.num_replicas == 1


def test_order_of_layers_and_slots_does_not_matter() -> None:
    other = ExpertPlacement(3, {4: ((1,), (1,)), 1: ((0,), (1,), (2, 0))})
    assert other == SMALL
    assert other.to_json() == SMALL.to_json()
    assert pickle.loads(pickle.dumps(other)) == SMALL


def test_json_has_one_line_a_layer() -> None:
    assert SMALL.to_json() == (
        "{\n"
        '  "format": "moe_lightning expert placement",\n'
        '  "version": 1,\n'
        '  "num_slots": 3,\n'
        '  "layers": {\n'
        '    "1": [[0],[1],[0,2]],\n'
        '    "4": [[1],[1]]\n'
        "  }\n"
        "}\n"
    )


def test_bare_numbers_are_slots() -> None:
    read = ExpertPlacement.from_json(json.dumps(content()))
    assert read == ExpertPlacement(3, {1: ((0,), (1,), (0, 2))})


@given(placements())
def test_json_round_trip(placement: ExpertPlacement) -> None:
    assert ExpertPlacement.from_json(placement.to_json()) == placement


def test_save_and_load(tmp_path: Path) -> None:
    SMALL.save(tmp_path / "placement.json")
    assert ExpertPlacement.load(str(tmp_path / "placement.json")) == SMALL
    assert [path.name for path in tmp_path.iterdir()] == ["placement.json"]


def test_file_of_an_editor_that_writes_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(SMALL.to_json(), encoding="utf-8-sig")
    assert ExpertPlacement.load(tmp_path / "p.json") == SMALL


@pytest.mark.parametrize("name", ["missing/p.json", "directory"])
def test_where_it_cannot_be_saved(tmp_path: Path, name: str) -> None:
    (tmp_path / "directory").mkdir()
    with pytest.raises(UsageError, match=f"{name}: the placement cannot be written"):
        SMALL.save(tmp_path / name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": None}, '"format" is None'),
        ({"format": "other"}, "\"format\" is 'other'"),
        ({"version": None}, '"version" is None'),
        ({"version": 2}, '"version" is 2, but this release reads version 1'),
        ({"version": True}, '"version" is True'),
        ({"num_slots": None}, '"num_slots" is None'),
        ({"num_slots": "3"}, "\"num_slots\" is '3'"),
        ({"num_slots": 2.0}, '"num_slots" is 2.0'),
        ({"num_slots": 0}, "num_slots=0"),
        ({"layers": None}, '"layers" is missing'),
        ({"layers": [[0]]}, '"layers" is [[0]]'),
        ({"layers": {"1": []}}, 'layer 1 of "layers" is []'),
        ({"layers": {"1": 0}}, 'layer 1 of "layers" is 0'),
        ({"layers": {"one": [0]}}, "the layer 'one'"),
        ({"layers": {"-1": [0]}}, "the layer '-1'"),
        ({"layers": {"01": [0]}}, "the layer '01'"),
        ({"layers": {"²": [0]}}, "the layer '²'"),
        ({"layers": {"": [0]}}, "the layer ''"),
        ({"layers": {"9" * 5000: [0]}}, "the layer '9999"),
        ({"layers": {"1": [0, "a"]}}, "layer 1, expert 1: 'a' is neither"),
        ({"layers": {"1": [0, 1.0]}}, "layer 1, expert 1: 1.0 is neither"),
        ({"layers": {"1": [0, None]}}, "layer 1, expert 1: None is neither"),
        ({"layers": {"1": [0, [True]]}}, "layer 1, expert 1: [True] is neither"),
        ({"layers": {"1": [0, [[1]]]}}, "layer 1, expert 1: [[1]] is neither"),
        ({"layers": {"1": [0], "7": [0, 1, 3]}}, "layer 7, expert 2: slot 3 is not one"),
        ({"layers": {"1": [0, -1]}}, "layer 1, expert 1: slot -1 is not one"),
        ({"layers": {"1": [0, []]}}, "layer 1, expert 1: has no slot"),
        ({"layers": {"1": [0, [2, 1, 2]]}}, "layer 1, expert 1: is on slots [2, 1, 2], one"),
    ],
)
def test_malformed_files_are_named_with_the_place(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(content(**changes)))
    with pytest.raises(UsageError) as error:
        ExpertPlacement.load(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"num_slots": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"layers": {"0": [0], "0": [1]}}', "the key '0' is there twice"),
        (b"[1, 2]", "holds a JSON list"),
        (b"null", "holds a JSON NoneType"),
        (b"\xff\xfe\x00", "not UTF-8 text (byte 0)"),
    ],
)
def test_files_that_are_no_json_object(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(data)
    with pytest.raises(UsageError) as error:
        ExpertPlacement.load(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["missing.json", "", "a" * 300, "null\0byte"])
def test_paths_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot be read as a placement"):
        ExpertPlacement.load(tmp_path / name)


def test_placement_of_another_model() -> None:
    SMALL.check({1: 3, 4: 2}, 3)
    SMALL.check({4: 2, 1: 3}, 5)  # slots 3 and 4 stay empty
    with pytest.raises(UsageError, match=r"MoE layers 1, 4, but the model has 1-4, 6\..*another"):
        SMALL.check({1: 3, 2: 3, 3: 3, 4: 2, 6: 1}, 3)
    with pytest.raises(UsageError, match=r"MoE layers 1, 4, but the model has \(none\)"):
        SMALL.check({}, 3)
    with pytest.raises(UsageError, match=r"p\.json: layer 4 has 2 experts, but the model has 8"):
        SMALL.check({1: 3, 4: 8}, 3, name="p.json")


def test_placement_for_more_slots_than_there_are() -> None:
    with pytest.raises(UsageError, match=r"for 3 slots, but there are 2\. Give 3 slots"):
        SMALL.check({1: 3, 4: 2}, 2)


def test_package_needs_no_torch() -> None:
    code = "import sys, moe_lightning.placement; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
