"""WorkerSession: what a worker answers, and to whom.

    hello ──▶ load (again when experts are adopted) ──▶ compute, compute, ... ──▶ bye

One master at a time. Everything but `load` and `bye` leaves the worker as it was, so requests may
come twice.
"""

import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from typing_extensions import Buffer

import moe_lightning
from moe_lightning.experts import BACKEND_NAMES
from moe_lightning.transport.messages import (
    PROTOCOL,
    Compute,
    Control,
    Failure,
    FailureCode,
    MalformedMessage,
    Reply,
    Sums,
    parse,
)
from moe_lightning.transport.pulse import PulseServer
from moe_lightning.transport.wire import (
    buffer_of,
    decode,
    encode,
    relative_error,
    tensor_of,
    torch_dtype,
)
from moe_lightning.workers.expert_host import ExpertHost

_log = logging.getLogger("moe_lightning.worker")
Frames = Sequence[Buffer]
DTYPES = ("float32", "float64", "bfloat16", "float16")
Leave = Callable[[], None]
Join = Callable[[dict[str, Any], Callable[[list[memoryview]], Frames]], Leave]


class WorkerSession:
    """Answers the requests of one master at a time.

    Args:
        host: The experts.
        pulse: Tells whether the master is still there.
        manifest: Hash of the worker's checkpoint.
        join: Takes part in another transport than the one that requests come by; returns what
            leaves it.
        ends_with_master: Whether to leave when the first master is done.
    """

    def __init__(
        self,
        host: ExpertHost,
        pulse: PulseServer,
        *,
        manifest: str,
        join: Join,
        ends_with_master: bool = False,
    ) -> None:
        self._host = host
        self._pulse = pulse
        self._manifest = manifest
        self._join = join
        self._ends_with_master = ends_with_master
        self._session = 0
        self._master = ""
        self._timeout_s = 0.0
        self._leave: Leave | None = None
        self.has_ended = False  # the session of a worker that is not to wait for another master
        self.has_lost_master = False

    def handle(self, frames: list[memoryview]) -> Frames | None:
        """Answer one request.

        Args:
            frames: The message.

        Returns:
            The answer; None if there is nothing to say to it.
        """
        try:
            message = parse(frames)
        except MalformedMessage as error:
            _log.warning("a malformed message was dropped: %s", error)
            return None
        if isinstance(message, Control) and message.verb == "hello":
            return self._hello(message)
        if not isinstance(message, Control | Compute):
            _log.warning("a %s was dropped: workers take requests", type(message).__name__)
            return None
        if message.session != self._session:
            return self._fail(message, FailureCode.WRONG_SESSION, "this worker serves no such run")
        if isinstance(message, Compute):
            return self.compute(message)
        return self._control(message)

    def watch_master(self) -> bool:
        """Notice that the master is gone.

        Returns:
            Whether the worker goes on.
        """
        if self._session and self._pulse.silence_s() > self._timeout_s:
            _log.warning(
                "the master (%s) has been silent for %.0f s: its experts are freed",
                self._master,
                self._pulse.silence_s(),
            )
            self.has_lost_master = True
            self._end()
        return not self.has_ended

    # Requests.

    def _hello(self, hello: Control) -> Frames:
        body = hello.body
        ours = {
            "protocol": PROTOCOL,
            "version": moe_lightning.__version__,
            "manifest": self._manifest,
        }
        differences = [
            f"{name}: the master has {str(body.get(name))[:20]}, this worker {str(value)[:20]}"
            for name, value in ours.items()
            if body.get(name) != value
        ]
        if differences:
            remedy = (
                "Install the same release of moe_lightning on both, and give both the same "
                "checkpoint."
            )
            return self._fail(hello, FailureCode.REFUSED, f"{'; '.join(differences)}. {remedy}")
        is_new = hello.session != self._session
        if self._session and is_new and self._pulse.silence_s() <= self._timeout_s:
            return self._fail(
                hello,
                FailureCode.BUSY,
                f"it serves another master ({self._master}). Wait for that run to end, or start "
                "another worker.",
            )
        timeout_s = body.get("timeout_s")
        if not isinstance(timeout_s, int | float) or not 0 < timeout_s < 1e6 or not hello.session:
            return self._fail(hello, FailureCode.MALFORMED, "timeout_s or session is wrong")
        if is_new:
            self._end()
            self._session = self._pulse.session = hello.session
            self._timeout_s = timeout_s
            self._master = str(body.get("master"))[:100]
            _log.info("serving the master %s", self._master)
        return self._reply(hello, self._welcome())

    def _welcome(self) -> dict[str, Any]:
        device = self._host.device
        return {
            "torch": str(torch.__version__),
            "device": str(device),
            "pool": self._pool(),
            "free_bytes": self._host.offered_bytes(),
            "threads": torch.get_num_threads(),
            "experts_backend": self._host.experts_backend,
            "pulse": self._pulse.address,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }

    def _pool(self) -> str:
        """The memory that experts share with others: the device's, unless this has its own part."""
        pool = memory_pool(self._host.device)
        return f"{pool} {self._pulse.address}" if self._host.has_limit else pool

    def _control(self, control: Control) -> Frames:
        try:
            if control.verb == "load":
                self._load(control.body)
                return self._reply(control, {"free_bytes": self._host.offered_bytes()})
            if control.verb == "join":
                self._leave = self._join(control.body, self.handle_compute)
                return self._reply(control, {})
            if control.verb == "bye":
                self._end()
                return self._reply(control, {})
        except Exception as error:  # whatever it is, the master must hear of it
            _log.warning("%s failed: %s", control.verb, error)
            return self._fail(control, FailureCode.LOAD, f"{type(error).__name__}: {error}")
        return self._fail(control, FailureCode.MALFORMED, f"unknown verb {control.verb!r}")

    def _load(self, body: dict[str, Any]) -> None:
        dtype, backend, experts = (body.get(k) for k in ("dtype", "experts_backend", "experts"))
        if dtype not in DTYPES or backend not in BACKEND_NAMES:
            raise ValueError(f"dtype {dtype!r} or experts_backend {backend!r} is not known")
        if not isinstance(experts, dict) or not all(
            isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids)
            for ids in experts.values()
        ):
            raise ValueError("experts must be lists of numbers by layer")
        self._host.load(
            {int(layer): sorted(set(ids)) for layer, ids in experts.items()},
            dtype=getattr(torch, dtype),
            experts_backend=backend,
        )

    def handle_compute(self, frames: list[memoryview]) -> Frames:
        """Answer a request that came by another transport, which carries nothing but these."""
        try:
            message = parse(frames)
        except MalformedMessage as error:
            return Failure(0, 0, FailureCode.MALFORMED, str(error)).frames()
        if not isinstance(message, Compute) or message.session != self._session:
            text = "this worker serves no such run"
            return Failure(0, 0, FailureCode.WRONG_SESSION, text).frames()
        return self.compute(message)

    def compute(self, question: Compute) -> Frames:
        """The weighted sums of a request's rows, or why there are none."""
        with self._pulse.busy():
            try:
                return self._sums(question)
            except Exception as problem:  # whatever it is, the master must hear of it
                _log.warning("a request of layer %d failed: %s", question.layer, problem)
                text = f"{type(problem).__name__}: {problem}"
                return self._fail(question, FailureCode.COMPUTE, text)

    def _sums(self, question: Compute) -> Frames:
        start_s = time.perf_counter()
        num_rows, num_choices = question.num_rows, question.num_choices
        rows_RD = decode(
            question.rows,
            question.scales,
            num_rows,
            question.width,
            question.rows_dtype,
            torch_dtype(question.dtype),
        )
        index_RK = tensor_of(question.index, torch.int16, (num_rows, num_choices)).long()
        weights_RK = tensor_of(
            question.weights, torch_dtype(question.weights_dtype), (num_rows, num_choices)
        )
        sums_RD = self._host.compute(question.layer, rows_RD, index_RK, weights_RK)
        if sums_RD is None:
            return self._fail(question, FailureCode.NOT_HELD, f"layer {question.layer}")
        sums = encode(sums_RD, question.sums_dtype)
        error = relative_error(sums_RD, sums) if question.wants_error else float("nan")
        return Sums(
            question.session,
            question.request,
            num_rows,
            question.width,
            question.sums_dtype,
            compute_us=min(int((time.perf_counter() - start_s) * 1e6), 2**32 - 1),
            waited_us=0,
            error=error,
            rows=buffer_of(sums.rows),
            scales=memoryview(b"") if sums.scales is None else buffer_of(sums.scales),
        ).frames()

    # Parts of answers.

    def _end(self) -> None:
        self.has_ended = self._ends_with_master and self._session != 0
        self._session = self._pulse.session = 0
        if self._leave is not None:
            self._leave()
            self._leave = None
        self._host.free()

    def _reply(self, control: Control, body: dict[str, Any]) -> Frames:
        return Reply(control.session, control.request, body).frames()

    def _fail(self, request: Control | Compute, code: FailureCode, text: str) -> Frames:
        return Failure(request.session, request.request, code, text).frames()


def memory_pool(device: torch.device) -> str:
    """A name of the memory that a device uses, the same in all processes that share it."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_properties(device).uuid)
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()} {boot}"
