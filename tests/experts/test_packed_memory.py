"""Packed experts keep no second copy of their weights: measured in processes of their own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

NUM_WEIGHTS = 3 * 16 * 1024 * 1536
MB = 10**6


@pytest.mark.parametrize(
    ("backend", "dtype", "bytes_before", "bytes_packed"),
    [
        ("cpu_packed", "float32", 4, 4),
        ("cpu_half", "bfloat16", 2, 2),
        ("cpu_int8", "float32", 4, 1),
        ("cpu_int8", "bfloat16", 2, 1),
    ],
)
def test_packed_experts_take_what_their_packed_weights_take(
    backend, dtype, bytes_before, bytes_packed
):
    script = Path(__file__).with_name("measure_packing.py")
    ran = subprocess.run(
        [sys.executable, script, backend, dtype], capture_output=True, text=True, check=True
    )
    grown = json.loads(ran.stdout)
    assert grown["loaded"] == pytest.approx(bytes_before * NUM_WEIGHTS, rel=0.02)
    for packed in (grown["packed"], grown["packed again"]):
        assert packed == pytest.approx(bytes_packed * NUM_WEIGHTS, rel=0.02, abs=4 * MB)
    # Nothing that was freed is kept: neither the packed weights nor what it took to pack them.
    assert grown["loaded again"] == pytest.approx(bytes_before * NUM_WEIGHTS, rel=0.02, abs=4 * MB)
    assert grown["gone"] < 4 * MB
