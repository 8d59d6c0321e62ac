import json
from pathlib import Path
from typing import Any

import pytest

from moe_lightning.errors import UsageError
from moe_lightning.placement import (
    ExpertPlacement,
    check_loads,
    imbalance,
    load_loads,
    save_loads,
)


def test_reads_routing_balance(tmp_path: Path) -> None:
    path = tmp_path / "routing_balance.json"
    path.write_text('{"version": 3, "loads": {"10": [0, 2.5], "2": [7]}, "entropy": null}')
    loads = load_loads(path)
    assert loads == {2: [7.0], 10: [0.0, 2.5]}
    assert list(loads) == [2, 10]


def test_save_and_load(tmp_path: Path) -> None:
    loads = {1: [3, 0.25, 0], 4: [1e-9]}
    save_loads(tmp_path / "loads.json", loads)
    assert load_loads(tmp_path / "loads.json") == loads
    assert len((tmp_path / "loads.json").read_text().splitlines()) == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "holds a JSON list"),
        ("{}", '"loads" is missing'),
        ('{"loads": [[1, 2]]}', '"loads" is [[1, 2]]'),
        ('{"loads": {"x": [1]}}', "the layer 'x'"),
        ('{"loads": {"3": {}}}', 'layer 3 of "loads" is {}'),
        ('{"loads": {"3": [1, -2]}}', "layer 3, expert 1: the load is -2"),
        ('{"loads": {"3": [NaN]}}', "layer 3, expert 0: the load is nan"),
        ('{"loads": {"3": [1e999]}}', "layer 3, expert 0: the load is inf"),
        ('{"loads": {"3": [true]}}', "layer 3, expert 0: the load is True"),
        ('{"loads": {"3": ["1"]}}', "layer 3, expert 0: the load is '1'"),
        ('{"loads": {"3": [[1]]}}', "layer 3, expert 0: the load is [1]"),
        ('{"loads": {"3": [null]}}', "layer 3, expert 0: the load is None"),
        ('{"loads": {"3": [1' + "0" * 400 + "]}}", "layer 3, expert 0: the load is 1000"),
    ],
)
def test_malformed_files_are_named_with_the_place(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "loads.json"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        load_loads(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


def test_placement_is_no_file_of_loads(tmp_path: Path) -> None:
    ExpertPlacement(1, {0: ((0,),)}).save(tmp_path / "placement.json")
    with pytest.raises(UsageError, match='"loads" is missing'):
        load_loads(tmp_path / "placement.json")


def test_check_loads_accepts_those_of_the_model() -> None:
    check_loads({0: [1, 2], 3: [0.0]}, {3: 1, 0: 2})


def test_imbalance() -> None:
    placement = ExpertPlacement(3, {0: ((0,), (1,), (0, 2)), 5: ((1,), (1,))})
    loads: dict[int, Any] = {0: [2, 4, 6], 5: [0, 0]}
    # Slot 0: 2 + 3, slot 1: 4, slot 2: 3; the mean is 4.
    assert imbalance(placement, loads) == {0: 5 / 4, 5: 1.0}
    assert imbalance(placement, {0: [0, 1, 0], 5: [3, 4]}) == {0: 3.0, 5: 3.0}
    with pytest.raises(UsageError, match="layer 5"):
        imbalance(placement, {0: [1, 1, 1]})


def test_saved_loads_are_plain_json(tmp_path: Path) -> None:
    save_loads(tmp_path / "loads.json", {0: [1, 2]})
    assert json.loads((tmp_path / "loads.json").read_text()) == {"loads": {"0": [1, 2]}}
