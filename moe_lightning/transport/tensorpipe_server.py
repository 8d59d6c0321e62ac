"""The worker's half of the tensorpipe transport: it joins a master's session and answers.

    master ── control message "join" (over zmq) ──> TensorPipeJoin ──> join_tensorpipe
           ── rpc_async(answer, frames) ──────────> one thread ──> handle(frames)

torch.distributed.rpc executes any Python and any operator that a peer asks for, and unpickles what
it is sent, so this transport is for networks whose every machine is trusted.
"""

import ipaddress
import logging
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from typing_extensions import Buffer

from moe_lightning.transport import tensorpipe_agent
from moe_lightning.transport.drop_log import DropLog
from moe_lightning.transport.tensorpipe_joining import (
    TensorPipeJoin,
    arrival_key,
    connect_store,
    process_name,
)

# Frames up to this size travel inside the call, which costs less than a tensor of their own.
SMALL_BYTES = 4096
Parts = list[bytes | Tensor]
Handle = Callable[[list[memoryview]], Sequence[Buffer] | None]


def pack(frames: Sequence[Buffer]) -> Parts:
    """Frames as torch.distributed.rpc carries them.

    Args:
        frames: The message. Tensors share the memory of large frames.

    Returns:
        One part a frame.
    """
    parts: Parts = []
    for frame in frames:
        view = memoryview(frame).cast("B")
        if view.nbytes <= SMALL_BYTES:
            parts.append(bytes(view))
        else:
            # A copy where the memory is read-only: a tensor can't share it without a warning.
            shared = bytearray(view) if view.readonly else view
            parts.append(torch.frombuffer(shared, dtype=torch.uint8))
    return parts


def unpack(parts: Parts) -> list[memoryview]:
    """What :func:`pack` packed, as writable memory; large frames without a copy."""
    return [
        memoryview(bytearray(part)) if isinstance(part, bytes) else part.numpy().data
        for part in parts
    ]


class TensorPipeEndpoint:
    """A worker in a master's session: it answers, one request at a time, in order of arrival.

    Made by :func:`join_tensorpipe`. Requests are handled in a thread of torch's, in which modes of
    the caller's thread, such as inference mode, do not hold.

    Args:
        handle: Gets the frames of a request and returns those of the answer, whose memory must
            stay as it is, or ``None`` to drop the request. What it raises is logged, and the
            request dropped: torch would send the exception, mangle its text, and fail to rebuild
            one whose constructor is its own.
    """

    def __init__(self, handle: Handle) -> None:
        self._handle = handle
        self._dropped = DropLog(logging.getLogger("moe_lightning.worker"))

    def answer(self, parts: Parts) -> Parts | None:
        """Handle a request.

        Args:
            parts: Its packed frames.

        Returns:
            The packed frames of the answer; ``None`` if the request was dropped.
        """
        try:
            frames = self._handle(unpack(parts))
            return None if frames is None else pack(frames)
        except Exception as error:
            self._dropped("Dropped a request that could not be handled", repr(error))
            return None

    def close(self) -> None:
        """Leave the session; waits for the request in computation, but for nobody else."""
        global _endpoint
        if _endpoint is self:
            _endpoint = None
            tensorpipe_agent.stop_agent()


# A call names a function that the worker imports, and can carry no object of the worker's, so what
# the function works with can only be found in the module.
_endpoint: TensorPipeEndpoint | None = None


def answer(parts: Parts) -> Parts | None:
    """What a master calls on a worker, see :meth:`TensorPipeEndpoint.answer`."""
    endpoint = _endpoint
    # Requests that were waiting when the session ended are dropped, so that leaving is quick.
    return None if endpoint is None else endpoint.answer(parts)


def join_tensorpipe(
    body: dict[str, object], handle: Handle, *, host: str = "127.0.0.1", timeout_s: float
) -> TensorPipeEndpoint:
    """Join the session of a master.

    Args:
        body: The body of the master's control message "join".
        handle: Answers requests, see :class:`TensorPipeEndpoint`.
        host: The address of this machine to listen on, and on no other.
        timeout_s: Longest wait for the master and the other workers.

    Returns:
        What answers until it is closed.

    Raises:
        ValueError: If ``body`` is malformed, or names a master elsewhere while ``host`` is
            loopback.
        UsageError: If ``host`` cannot be listened on.
        RuntimeError: If this process is in a session, or the others did not come in time.
    """
    global _endpoint
    join = TensorPipeJoin.parse(body)
    host = tensorpipe_agent.address_of(host)
    if join.is_elsewhere and ipaddress.IPv4Address(host).is_loopback:
        raise ValueError(
            f"join: store_host = {join.store_host}, but this worker serves this machine only"
        )
    # What this process alone can know is refused before the others start to wait for it.
    tensorpipe_agent.check_free()
    tensorpipe_agent.interface_of(host)
    deadline = time.monotonic() + timeout_s
    store = connect_store(join.store_host, join.store_port, timeout_s=timeout_s)
    store.set(arrival_key(join.rank), "")
    endpoint = TensorPipeEndpoint(handle)
    # Before the agent starts: the first call may come at once.
    _endpoint = endpoint
    try:
        tensorpipe_agent.start_agent(
            store,
            host=host,
            name=process_name(join.rank),
            rank=join.rank,
            world_size=join.world_size,
            # One thread computes one request at a time, in order, with one OpenMP team.
            num_threads=1,
            timeout_s=max(deadline - time.monotonic(), 0.001),
        )
    except BaseException:
        _endpoint = None
        raise
    return endpoint
