"""Who takes part in bench_experts.py.

    transformers   eager, grouped_mm, batched_mm: its own functions on the family's own module
    ours           make_backend(name, experts) for each name; packed weights are copies
    peers          vllm, ort: processes of another environment (peers/); moe_ops: CUDA only

All of them compute the same rows with the same weights.
"""

import copy
import importlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from bench_experts_layers import Layer, Point, pairs_bytes
from bench_experts_remote import Peer, PeerError, read_output, write_layer, write_point
from torch import Tensor, nn

from moe_lightning.experts import make_backend
from moe_lightning.experts.backends import why_not

Side = Literal["transformers", "ours", "peer"]
Clock = Callable[[Callable[[], Any]], float]

NAMES = {
    # An order in which neighbours share no weights: whoever comes next finds none in a cache.
    "cpu": (
        *("transformers:eager", "cpu_packed", "transformers:grouped_mm", "cpu_half"),
        *("transformers:batched_mm", "cpu_int8", "grouped_mm", "auto", "vllm", "ort"),
    ),
    "cuda": (
        *("transformers:eager", "triton", "transformers:grouped_mm", "auto"),
        *("transformers:batched_mm", "moe_ops", "grouped_mm"),
    ),
}
FALLS_BACK = ("cpu_packed", "cpu_half", "cpu_int8", "triton")  # where they cannot serve
BYTES_PER_WEIGHT = {"cpu_half": 2.0, "cpu_int8": 1.0, "ort": 1.125}  # others: the parameter's own
INT8 = ("cpu_int8", "ort")
REMOTE = {"vllm": "vllm_block.py", "ort": "ort_block.py"}
QUIET_S = 0.08  # threads of other processes spin for 35 ms (ONNX Runtime) after their last work
BATCHED_BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}  # most that batched_mm may copy


def cpu_clock(call: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s


def cuda_clock(call: Callable[[], Any]) -> float:
    """Seconds between two events around a call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


class Contestant(ABC):
    """One way to compute the experts of a layer.

    Args:
        name: One of :data:`NAMES`.
        bytes_per_weight: Bytes that it reads per weight.
    """

    def __init__(self, name: str, bytes_per_weight: float) -> None:
        self.name = name
        self.bytes_per_weight = bytes_per_weight
        self.is_int8 = name in INT8
        self.side: Side = "ours"
        if name.startswith("transformers:"):
            self.side = "transformers"
        elif name in REMOTE or name == "moe_ops":
            self.side = "peer"

    def takes(self, point: Point) -> bool:
        """Whether it can compute the point within reasonable memory."""
        return True

    @abstractmethod
    def output(self, point: Point) -> Tensor:
        """What it computes, for the comparison of errors."""

    @abstractmethod
    def turn(self, point: Point) -> float:
        """Compute once; seconds."""

    def close(self) -> None:  # noqa: B027 (most hold nothing)
        """Give back what it holds."""


class Local(Contestant):
    """A contestant of this process."""

    def __init__(
        self,
        name: str,
        call: Callable[[Point], Tensor],
        *,
        dtype: torch.dtype,
        clock: Clock,
        is_taken: Callable[[Point], bool] | None = None,
    ) -> None:
        super().__init__(name, BYTES_PER_WEIGHT.get(name, dtype.itemsize))
        self._call, self._clock, self._is_taken = call, clock, is_taken

    def takes(self, point: Point) -> bool:
        """Whether it can compute the point within reasonable memory."""
        return self._is_taken is None or self._is_taken(point)

    def output(self, point: Point) -> Tensor:
        """What it computes, for the comparison of errors."""
        return self._call(point)

    def turn(self, point: Point) -> float:
        """Compute once; seconds."""
        return self._clock(lambda: self._call(point))


class Remote(Contestant):
    """A contestant of another process: nobody else computes during its turn."""

    def __init__(self, name: str, peer: Peer, directory: Path) -> None:
        super().__init__(name, BYTES_PER_WEIGHT.get(name, 4.0))
        self.peer = peer
        self.versions: dict[str, str] = peer.ask(load=str(directory))["versions"]

    def output(self, point: Point) -> Tensor:
        """What it computes, for the comparison of errors."""
        return read_output(self.peer.ask(check=point.number))

    def turn(self, point: Point) -> float:
        """Compute once; seconds."""
        time.sleep(QUIET_S)  # until this process's threads have stopped spinning
        seconds: float = self.peer.ask(run=point.number)["seconds"]
        time.sleep(QUIET_S)
        return seconds

    def close(self) -> None:
        """End the process."""
        self.peer.close()


class Contestants:
    """All that take part in one layer, and why others do not.

    Args:
        layer: The layer.
        experts: Its module, on the device and in the type to measure.
        points: The points of the layer.
        names: Who shall take part.
        peer_python: Interpreter of the environment of the peers; None: they do not take part.
        directory: An empty directory for the weights that peers read.
    """

    def __init__(
        self,
        layer: Layer,
        experts: nn.Module,
        points: list[Point],
        names: list[str],
        *,
        peer_python: str | None,
        directory: Path,
    ) -> None:
        self.layer, self.experts = layer, experts
        weight = next(experts.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.clock = cuda_clock if self.device.type == "cuda" else cpu_clock
        self.active: list[Contestant] = []
        self.absent: dict[str, str] = {}
        self.versions: dict[str, str] = {}
        try:
            for name in names:
                if name in REMOTE:
                    self._add_remote(name, points, peer_python, directory)
                elif name == "moe_ops":
                    self._add_moe_ops()
                elif name.startswith("transformers:"):
                    self._add_transformers(name)
                else:
                    self._add_ours(name)
        except BaseException:
            self.close()
            raise

    def drop(self, contestant: Contestant, reason: str) -> None:
        """Go on without one that broke down."""
        self.active.remove(contestant)
        self.absent[contestant.name] = reason
        contestant.close()

    def close(self) -> None:
        """Give back what they hold."""
        for contestant in self.active:
            contestant.close()
        self.active = []

    def _add(
        self,
        name: str,
        call: Callable[[Point], Tensor],
        is_taken: Callable[[Point], bool] | None = None,
    ) -> None:
        self.active.append(Local(name, call, dtype=self.dtype, clock=self.clock, is_taken=is_taken))

    def _add_transformers(self, name: str) -> None:
        experts: Any = self.experts
        implementation = name.partition(":")[2]

        def call(point: Point) -> Tensor:
            experts.config._experts_implementation = implementation
            rows_TD: Tensor = experts(point.hidden_TD, point.index_TK, point.weights_TK)
            return rows_TD

        def fits(point: Point) -> bool:
            bytes_needed = pairs_bytes(self.layer, point.tokens, self.dtype)
            return bytes_needed <= BATCHED_BYTES[self.device.type]

        self._add(name, call, fits if implementation == "batched_mm" else None)

    def _add_ours(self, name: str) -> None:
        if name in FALLS_BACK and (reason := why_not(name, self.experts)):
            self.absent[name] = reason
            return
        # Parameters of its own over the same memory: a packed backend replaces a parameter's data.
        shared: dict[int, Any] = {
            id(parameter): nn.Parameter(parameter.detach(), requires_grad=False)
            for parameter in self.experts.parameters()
        }
        backend = make_backend(name, copy.deepcopy(self.experts, shared))
        self._add(name, lambda p: backend(p.hidden_TD, p.index_TK, p.weights_TK))

    def _add_remote(
        self, name: str, points: list[Point], python: str | None, directory: Path
    ) -> None:
        if python is None:
            self.absent[name] = "no --peer_python"
            return
        threads = torch.get_num_threads()
        if not (directory / "layer.json").exists():
            write_layer(directory, self.layer, self.experts, threads)
            for point in points:
                write_point(directory, point)
        try:
            peer = Peer(python, REMOTE[name], threads)
        except PeerError as error:
            self.absent[name] = str(error)
            return
        try:
            contestant = Remote(name, peer, directory)
        except PeerError as error:
            peer.close()
            self.absent[name] = str(error)
            return
        self.versions |= contestant.versions
        self.active.append(contestant)

    def _add_moe_ops(self) -> None:
        """moe-ops 0.1.0 (Triton): permute, grouped GEMM and unpermute; no biases."""
        experts: Any = self.experts
        try:
            ops: Any = importlib.import_module("moe_ops")
        except ImportError as error:
            self.absent["moe_ops"] = str(error)
            return
        if experts.has_bias:
            self.absent["moe_ops"] = "it has no biases"
            return

        def call(point: Point) -> Tensor:
            rows_ND, order, ends = ops.permute(
                point.hidden_TD, point.index_TK.int(), E=self.layer.num_experts
            )
            trans_b = not experts.is_transposed
            rows_NF = ops.grouped_gemm(rows_ND, experts.gate_up_proj, ends, trans_b=trans_b)
            rows_NF = experts._apply_gate(rows_NF)
            rows_ND = ops.grouped_gemm(rows_NF, experts.down_proj, ends, trans_b=trans_b)
            rows_TD: Tensor = ops.unpermute(
                *(rows_ND, order, point.weights_TK),
                *(point.tokens, self.layer.top_k),
            )
            return rows_TD

        self._add("moe_ops", call)
