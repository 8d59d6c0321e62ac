"""A worker process from its options to its exit code."""

import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from typing_extensions import Buffer

from moe_lightning.devices import free_bytes, parse_devices
from moe_lightning.dispatch.thread_modes import use_threads
from moe_lightning.errors import UsageError
from moe_lightning.experts import BackendName
from moe_lightning.modeling.checkpoint import open_checkpoint
from moe_lightning.modeling.loading import build_on_meta
from moe_lightning.modeling.manifest import manifest_hash
from moe_lightning.modeling.seam import find_moe_layers
from moe_lightning.transport.addresses import check_address, pulse_address
from moe_lightning.transport.keys import Keys
from moe_lightning.transport.own_address import host_towards
from moe_lightning.transport.pulse import PulseServer
from moe_lightning.transport.zmq_server import ZmqServer
from moe_lightning.workers.expert_host import ExpertHost
from moe_lightning.workers.session import WorkerSession

LOST_MASTER = 6
JOIN_S = 60.0
Answer = Callable[[list[memoryview]], Sequence[Buffer]]


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """How a worker serves.

    Attributes:
        checkpoint: Its own copy of the checkpoint.
        listen: Address; the port after it is for signs of life.
        keys: Directory of the keys; needed beyond loopback.
        device: Where its experts go; ``auto`` is a GPU if there is one.
        memory_gb: Most memory that experts may take; None means what is free.
        threads: CPU threads; None means PyTorch's default.
        experts_backend: How experts are computed; None leaves it to the master.
        insecure_network: Whether to serve TensorPipe without keys on a private address.
        ends_with_master: Whether to leave when the first master is done.
        parent_pipe: Whether to leave when standard input ends, as it does when the parent dies.
    """

    checkpoint: str = "demo"
    listen: str = "tcp://127.0.0.1:0"
    keys: str | None = None
    device: str = "auto"
    memory_gb: float | None = None
    threads: int | None = None
    experts_backend: BackendName | None = None
    insecure_network: bool = False
    ends_with_master: bool = False
    parent_pipe: bool = False

    def to_arguments(self) -> list[str]:
        """The command line, after the interpreter, of a worker with these options."""
        arguments = ["-m", "moe_lightning", "worker", "--model.checkpoint", self.checkpoint]
        for name in ("listen", "keys", "device", "memory_gb", "threads", "experts_backend"):
            value = getattr(self, name)
            if value is not None:
                arguments += [f"--{name}", str(value)]
        for name in ("insecure_network", "ends_with_master", "parent_pipe"):
            if getattr(self, name):
                arguments += [f"--{name}", "true"]
        return arguments


def serve_experts(
    options: WorkerOptions,
    *,
    on_listening: Callable[[str], None] | None = None,
    is_wanted: Callable[[], bool] = lambda: True,
) -> int:
    """Serve experts until told to leave.

    Args:
        options: How.
        on_listening: Called with the address once masters may come.
        is_wanted: Asked several times a second; the worker leaves when it is not.

    Returns:
        The exit code: 0, or 6 if a worker that serves only one master lost it.

    Raises:
        UsageError: If an option is wrong, or the address is taken.
        CheckpointError: If the checkpoint cannot be used.
    """
    if options.threads is not None:
        if options.threads < 1:
            raise UsageError(f"threads={options.threads} must be at least 1.")
        use_threads(options.threads)
    if options.memory_gb is not None and options.memory_gb <= 0:
        raise UsageError(f"memory_gb={options.memory_gb} must be more than 0.")
    (device,) = parse_devices([choose_device(options.device)], option="--device")
    check_address(
        options.listen,
        option="--listen",
        keys=options.keys is not None,
        insecure=options.insecure_network,
    )
    keys = None if options.keys is None else Keys.load(options.keys, role="worker")
    view = open_checkpoint(options.checkpoint)
    find_moe_layers(build_on_meta(view.config))
    host = ExpertHost(
        view,
        device=device,
        experts_backend=options.experts_backend,
        memory_bytes=None if options.memory_gb is None else options.memory_gb * 1e9,
        show_progress=not options.parent_pipe,
    )
    server = ZmqServer(options.listen, keys=keys)
    try:
        # With port 0 any port that is free: the one after the server's may be taken.
        pulse = PulseServer(
            pulse_address(options.listen), keys=keys, progress=lambda: view.bytes_read
        )
    except UsageError:
        server.close()
        raise

    def join(body: dict[str, Any], answer: Answer) -> Callable[[], None]:
        from moe_lightning.transport.tensorpipe_server import join_tensorpipe

        host = host_towards(str(body.get("store_host")), listening=server.address)
        check_address(
            f"tcp://{host}:1", option="--listen", keys=False, insecure=options.insecure_network
        )
        return join_tensorpipe(body, answer, host=host, timeout_s=JOIN_S).close

    session = WorkerSession(
        host,
        pulse,
        manifest=manifest_hash(view),
        join=join,
        ends_with_master=options.ends_with_master or options.parent_pipe,
    )
    if options.parent_pipe:
        threading.Thread(target=_leave_with_parent, daemon=True).start()
    if on_listening is not None:
        on_listening(server.address)

    try:
        server.serve(session.handle, lambda: is_wanted() and session.watch_master())
    finally:
        server.close()
        pulse.close()
    return LOST_MASTER if session.has_lost_master else 0


def choose_device(name: str) -> str:
    """The device that ``auto`` stands for: this rank's GPU, or the CPU."""
    if name != "auto":
        return name
    num_gpus = torch.cuda.device_count()
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % num_gpus}" if num_gpus else "cpu"


def offer(options: WorkerOptions) -> str:
    """What a worker offers, in words: its device and memory."""
    device = torch.device(choose_device(options.device))
    free = free_bytes(device) / 1e9
    memory_gb = free if options.memory_gb is None else min(free, options.memory_gb)
    return f"{device}, {memory_gb:.1f} GB"


def _leave_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 4096):  # not through a buffer, whose lock outlives us
        pass
    os._exit(0)  # whatever the main thread is at: nobody wants its answer
