"""What the machine can do at most, measured in turns with the contestants of bench_experts.py."""

import contextlib
import math
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from bench_experts_contestants import cpu_clock, cuda_clock
from torch import Tensor
from torch.nn.functional import linear

Kind = Literal["read", "float", "int8"]
M, N, K = 1536, 2048, 2048  # of the product that gives the rates on a CPU
CUDA_SIDE = 8192  # of the square product on a GPU


class Probe(NamedTuple):
    """A call that does nothing but read, or nothing but multiply."""

    kind: Kind
    amount: int  # bytes or operations
    call: Callable[[], Any]


@dataclass(frozen=True)
class Rates:
    """The best that the probes saw; None: not measured on such a device."""

    read_bytes_per_s: float
    float_flop_per_s: float
    int8_flop_per_s: float | None

    def least_s(self, *, num_bytes: float, flop: float, is_int8: bool) -> float | None:
        """The least time that reading so many bytes and computing so many operations take."""
        rate = self.int8_flop_per_s if is_int8 else self.float_flop_per_s
        return None if rate is None else max(num_bytes / self.read_bytes_per_s, flop / rate)


class Machine:
    """Probes of one device.

    Args:
        device: The device.
        dtype: The type of the weights.
        read_bytes: Size of the matrix whose reading gives the bandwidth; more than all caches.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, read_bytes: int) -> None:
        self.best: dict[Kind, float] = {}
        if device.type == "cuda":
            self._clock = cuda_clock
            self._probes = _cuda_probes(device, dtype, read_bytes)
        else:
            self._clock = cpu_clock
            self._probes = _cpu_probes(read_bytes)
        for probe in self._probes:
            probe.call()

    def measure(self) -> None:
        """Run each probe once."""
        for probe in self._probes:
            rate = probe.amount / self._clock(probe.call)
            self.best[probe.kind] = max(rate, self.best.get(probe.kind, 0.0))

    @property
    def rates(self) -> Rates:
        """The best so far."""
        return Rates(self.best["read"], self.best["float"], self.best.get("int8"))


def _cpu_probes(read_bytes: int) -> list[Probe]:
    """Each limit in more than one way: which one is the fastest depends on the maker of the CPU.

    The dot product of one half of the matrix with the other reads what one row through the matrix
    reads, and up to 1.4 times as fast (AMD EPYC, torch 2.13).
    """
    side = math.isqrt(read_bytes // 4) // 2 * 2
    matrix, row = torch.randn(side, side), torch.randn(1, side)
    halves = matrix.view(2, -1)
    left, right = torch.randn(M, K), torch.randn(N, K)
    flop = 2 * M * N * K
    probes = [
        Probe("read", 4 * side * side, lambda: linear(row, matrix)),
        Probe("read", 4 * side * side, lambda: torch.dot(halves[0], halves[1])),
        Probe("float", flop, lambda: linear(left, right)),
    ]
    if torch.backends.mkldnn.is_available():
        # As moe_lightning/experts/packed_weights.py calls them (torch 2.13).
        packed = torch.ops.mkldnn._reorder_linear_weight(right, M)
        whole_left = torch.randint(0, 255, (M, K), dtype=torch.uint8)
        whole = torch.ops.onednn.qlinear_prepack(
            torch.randint(-127, 127, (N, K), dtype=torch.int8), [M, K]
        )
        scale_N, zero_N = torch.ones(N), torch.zeros(N, dtype=torch.int64)

        def multiply() -> Tensor:
            product: Tensor = torch.ops.mkldnn._linear_pointwise(left, packed, None, "none", [], "")
            return product

        def multiply_int8() -> Tensor:
            product: Tensor = torch.ops.onednn.qlinear_pointwise(
                *(whole_left, 1.0, 128, whole, scale_N, zero_N, None),
                *(1.0, 0, torch.float32, "none", [], ""),
            )
            return product

        probes += [
            Probe("float", flop, multiply),
            Probe("int8", flop, multiply_int8),
        ]
    return probes


def _cuda_probes(device: torch.device, dtype: torch.dtype, read_bytes: int) -> list[Probe]:
    source = torch.randint(0, 255, (read_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(CUDA_SIDE, CUDA_SIDE, device=device, dtype=dtype) for _ in "lr")
    return [
        Probe("read", 2 * read_bytes, lambda: target.copy_(source)),
        Probe("float", 2 * CUDA_SIDE**3, lambda: left @ right),
    ]


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Name of the hardware, threads and versions."""
    versions = {"python": platform.python_version()}
    for name in ("moe-lightning", "torch", "transformers", "triton", "moe-ops"):
        with contextlib.suppress(ImportError):
            versions[name] = version(name)
    return {
        "cpu": _cpu_name(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
