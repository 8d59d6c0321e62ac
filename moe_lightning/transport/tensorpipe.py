"""TensorPipeTransport: the master's half of requests over torch.distributed.rpc.

    ask ── rpc_async(answer, frames) ──> worker
    result <── an Event that the call's future sets <── answer

Control messages travel over zmq, whatever carries the requests. Where a process listens is told in
``tensorpipe_agent``, how a session starts in ``tensorpipe_joining``, what a worker does in
``tensorpipe_server``.

What torch.distributed.rpc does when things break (seen in torch 2.13), and what is made of it:

- A killed worker fails its calls at once with a text that names nobody: ``give_up`` is told, and
  ``WorkerLost`` raised.
- A stopped worker fails nothing until a call's own timeout, so waits are in slices between which
  ``lost`` is asked. A call that nobody waits for any more is executed later; its answer is dropped.
- A graceful shutdown waits for the dead for ever; ours waits for nobody.
- The master unpickles what workers answer: a worker that is not trusted owns the master.
- Every connection that ends is a warning of C++ on stderr, which only TORCH_CPP_LOG_LEVEL=ERROR in
  the environment, before torch is imported, turns off.
"""

import threading
import time
from collections.abc import Callable, Sequence

from torch.distributed import DistStoreError, rpc
from torch.futures import Future
from typing_extensions import override

from moe_lightning.transport import tensorpipe_agent
from moe_lightning.transport.tensorpipe_joining import (
    MAX_WORKERS,
    Gathering,
    Join,
    connect_store,
    process_name,
    serve_store,
)
from moe_lightning.transport.tensorpipe_server import Parts, answer, pack, unpack
from moe_lightning.transport.transport import ExpertTransport, Frames, Pending, WorkerLost

SLICE_S = 0.05


class TensorPipeTransport(ExpertTransport):
    """Carries requests over torch.distributed.rpc. Made by :meth:`open`.

    Args:
        names: Of the workers, for messages.
        lost: Tells why a worker is known to be gone, or ``None``.
        give_up: Is told of a worker whose connection broke, and how.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        lost: Callable[[int], str | None],
        give_up: Callable[[int, str], None],
    ) -> None:
        self.names = tuple(names)
        self._lost = lost
        self._give_up = give_up
        self._closing = threading.Lock()
        self._is_closed = False

    @classmethod
    def open(
        cls,
        host: str,
        names: Sequence[str],
        *,
        join: Join,
        lost: Callable[[int], str | None],
        give_up: Callable[[int, str], None],
        timeout_s: float,
    ) -> "TensorPipeTransport":
        """Start a session with workers.

        Args:
            host: The address of this machine that workers reach; nothing listens on another.
            names: Of the workers, for messages.
            join: Sends a worker, by its number, the body of the control message "join", and waits
                for its reply. Is called in a thread for each worker.
            lost: Tells why a worker is known to be gone, or ``None``.
            give_up: Is told of a worker whose connection broke, and how.
            timeout_s: Longest wait for all workers together.

        Returns:
            The transport; every worker has been reached through it.

        Raises:
            UsageError: If ``host`` can't be listened on.
            WorkersLostError: If a worker did not join; it is named.
            RuntimeError: If this process is in a session of torch.distributed.rpc already.
        """
        assert 1 <= len(names) <= MAX_WORKERS, f"{len(names)} workers"
        host = tensorpipe_agent.address_of(host)
        # Before anybody is asked to join.
        tensorpipe_agent.check_free()
        tensorpipe_agent.interface_of(host)
        # It listens until this function ends; after that nobody needs it.
        server = serve_store(host, timeout_s=timeout_s)
        store = connect_store(host, server.port, timeout_s=timeout_s)
        gathering = Gathering(join, host=host, port=server.port, names=names, timeout_s=timeout_s)
        gathering.wait_for_arrivals(store)
        try:
            tensorpipe_agent.start_agent(
                store,
                host=host,
                name=process_name(0),
                rank=0,
                world_size=len(names) + 1,
                num_threads=2,  # an answer is taken in while another one is waited for
                timeout_s=gathering.remaining_s(),
            )
        except DistStoreError:  # somebody died between arriving and starting
            raise gathering.failure(gathering.errors or range(len(names))) from None
        try:
            gathering.reach()
        except BaseException:
            tensorpipe_agent.stop_agent()
            raise
        return cls(names, lost=lost, give_up=give_up)

    @override
    def ask(self, worker: int, request: int, frames: Frames) -> Pending:
        reason = self.why_lost(worker)
        if reason is not None:
            raise WorkerLost(worker, reason)
        try:
            call = rpc.rpc_async(
                process_name(worker + 1),
                answer,
                args=(pack(frames),),
                timeout=tensorpipe_agent.CALL_TIMEOUT_S,
            )
        except RuntimeError as error:  # closed by another thread meanwhile
            raise self.give_up(worker, f"it cannot be asked ({error})") from error
        return _Call(self, worker, call)

    def why_lost(self, worker: int) -> str | None:
        """Why a worker cannot be asked, or ``None``.

        Args:
            worker: Its number.
        """
        return "the transport was closed" if self._is_closed else self._lost(worker)

    def give_up(self, worker: int, reason: str) -> WorkerLost:
        """Ask a worker nothing any more.

        Args:
            worker: Its number.
            reason: What went wrong, unless more is known.

        Returns:
            What is to be raised.
        """
        known = self.why_lost(worker)
        if known is None:
            self._give_up(worker, reason)
        return WorkerLost(worker, known or reason)

    @override
    def close(self) -> None:
        with self._closing:
            if not self._is_closed:
                self._is_closed = True
                tensorpipe_agent.stop_agent()


class _Call(Pending):
    """A call in flight."""

    def __init__(
        self, transport: TensorPipeTransport, worker: int, call: "Future[Parts | None]"
    ) -> None:
        self.transport = transport
        self.worker = worker
        self.parts: Parts | None = None
        self.error: Exception | None = None
        self.done = threading.Event()
        call.add_done_callback(self._take)

    def _take(self, call: "Future[Parts | None]") -> None:
        """Take the outcome, in torch's thread: after a shutdown it can't be had any more."""
        try:
            self.parts = call.value()
        except Exception as error:
            self.error = error
        # None is a request that was dropped, and its answer one that never comes.
        if self.parts is not None or self.error is not None:
            self.done.set()

    @override
    def result(self, timeout_s: float) -> list[memoryview]:
        deadline = time.monotonic() + timeout_s
        while not self.done.wait(min(SLICE_S, max(deadline - time.monotonic(), 0.0))):
            reason = self.transport.why_lost(self.worker)
            if reason is not None:
                raise WorkerLost(self.worker, reason)
            if time.monotonic() >= deadline:
                name = self.transport.names[self.worker]
                raise TimeoutError(f"worker {self.worker} ({name}): no answer in {timeout_s:g} s")
        if self.error is not None:
            reason = f"its connection broke ({self.error})"  # the text names no worker
            raise self.transport.give_up(self.worker, reason) from self.error
        assert self.parts is not None, "done without an outcome"
        return unpack(self.parts)
