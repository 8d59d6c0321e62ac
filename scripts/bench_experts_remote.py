"""Peers of bench_experts.py that need an environment of their own; see peers/serve.py."""

import json
import os
import select
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_experts_layers import Layer, Point
from torch import Tensor, nn

PEERS = Path(__file__).resolve().parent / "peers"
ANSWER_TIMEOUT_S = 900.0  # packing gigabytes takes a minute or two


class PeerError(Exception):
    """A peer that cannot take part, or that broke down."""


class Peer:
    """A process that computes the same layer in another Python.

    Args:
        python: The interpreter of its environment.
        script: Name of its script in `peers/`, or the path of another one.
        threads: Threads to compute with.
    """

    def __init__(self, python: str, script: str, threads: int) -> None:
        self.name = script
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment |= {"OMP_NUM_THREADS": str(threads), "VLLM_LOGGING_LEVEL": "ERROR"}
        try:
            self._process = subprocess.Popen(
                [python, str(PEERS / script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                env=environment,
            )
        except OSError as error:
            self._log.close()
            raise PeerError(f"{python} does not start: {error.strerror}") from None

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            PeerError: If the peer reports an error, dies, or does not answer.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
        except BrokenPipeError:
            raise PeerError(self._last_words()) from None
        # One answer a request: nothing else can be waiting in the buffer of stdout.
        if not select.select([stdout], [], [], ANSWER_TIMEOUT_S)[0]:
            raise PeerError(f"no answer to {request} within {ANSWER_TIMEOUT_S:.0f} s")
        line = stdout.readline()
        if not line:
            raise PeerError(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def _last_words(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        return f"it ended with code {code}" + (f": {lines[-1]}" if lines else "")


def write_layer(directory: Path, layer: Layer, experts: nn.Module, threads: int) -> None:
    """Write the weights for peers, in one layout for all families: `[E, out, in]`."""
    is_interleaved = not experts.is_concatenated
    sizes = {
        "num_experts": layer.num_experts,
        "top_k": layer.top_k,
        "is_interleaved": is_interleaved,
        # Of the five families only gpt-oss interleaves, and only gpt-oss has another gate.
        "gate_alpha": experts.alpha if is_interleaved else 1.0,
        "gate_limit": experts.limit if is_interleaved else None,
        "up_offset": 1.0 if is_interleaved else 0.0,
        "threads": threads,
    }
    (directory / "layer.json").write_text(json.dumps(sizes))
    for name in ("gate_up", "down"):
        weight: Any = getattr(experts, f"{name}_proj")
        weight = weight.transpose(1, 2) if experts.is_transposed else weight
        np.save(directory / f"{name}.npy", weight.contiguous().numpy())
        if experts.has_bias:
            bias: Any = getattr(experts, f"{name}_proj_bias")
            np.save(directory / f"{name}_bias.npy", bias.numpy())


def write_point(directory: Path, point: Point) -> None:
    """Write the rows and the routing of a point."""
    arrays: dict[str, Tensor] = {
        "hidden": point.hidden_TD,
        "index": point.index_TK,
        "weights": point.weights_TK,
    }
    for name, array in arrays.items():
        np.save(directory / f"point{point.number}_{name}.npy", array.numpy())


def read_output(answer: dict[str, Any]) -> Tensor:
    """The rows that a peer computed."""
    return torch.from_numpy(np.load(answer["output"]))
