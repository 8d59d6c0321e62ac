"""torch.distributed.rpc's agent of this process: how it starts, where it listens, how it ends.

The agent is made directly, as ``rpc.init_rpc`` makes it, without the process group that
``init_rpc`` makes first (seen in torch 2.13). That group:

- connects every process with every other, so workers would have to reach each other;
- listens on a second socket, on whatever address the machine's name resolves to;
- waits 24 days for a process that never comes, whatever ``rpc_timeout`` says;
- counts the sessions of a process: one that was in a session before and one that was not wait for
  different keys, for ever (pytorch#46491).

What remains is a star: the master reads the workers' addresses from its store and connects to them.
Every wait is one of the store's, which have a deadline. A process that has stopped its agent can
start another, in any session and with any rank.

Where the agent listens, as tried: the ``uv`` transport takes the first address of the interface
named by the environment's TP_SOCKET_IFNAME, else what the machine's name resolves to (which may be
127.0.1.1, or a public address), else 127.0.0.1 with a warning; an unknown interface is that last
case. It is looked up once in the life of a process. An arbitrary address can't be given, so the
interface that has the wanted address is found, and what the agent then listens on is checked. The
``uv`` transport with the ``basic`` channel opens one listening socket; the default opens 17.

No device maps: rows on an accelerator go through the host's memory, since TensorPipe's CUDA
channels have open crashes (pytorch#57136, #95487).
"""

import atexit
import ipaddress
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import psutil
from torch._C._distributed_c10d import Store
from torch._C._distributed_rpc import (
    TensorPipeAgent,
    _is_current_rpc_agent_set,
    _set_and_start_rpc_agent,
)
from torch.distributed import rpc
from torch.distributed.autograd import _init as _init_autograd  # type: ignore[attr-defined]

from moe_lightning.errors import UsageError

INTERFACE_VARIABLE = "TP_SOCKET_IFNAME"
# A call that nobody waits for any more is forgotten after this; liveness is judged elsewhere, and
# 0 would mean for ever.
CALL_TIMEOUT_S = 3600.0


def address_of(host: str) -> str:
    """The IPv4 address of a host that TensorPipe may use: of this machine or of a private network.

    Args:
        host: A name or an address.

    Returns:
        The address.

    Raises:
        UsageError: If there is none, or it is neither loopback nor private: whoever reaches
            torch.distributed.rpc runs code as this user.
    """
    try:
        address = socket.gethostbyname(host)
    except OSError as error:
        raise UsageError(
            f"tensorpipe: {host!r} has no IPv4 address ({error}), and TensorPipe is used with IPv4 "
            "only. Give an address, or use the zmq transport."
        ) from error
    if not ipaddress.IPv4Address(address).is_private:
        raise UsageError(
            f"tensorpipe: {address} is a public address. Whoever reaches torch.distributed.rpc "
            "runs code as this user. Use a private network, or the zmq transport with keys."
        )
    return address


def interface_of(address: str) -> str:
    """The network interface that TensorPipe has to be told for it to listen on an address.

    Args:
        address: An IPv4 address of this machine.

    Returns:
        The interface's name.

    Raises:
        UsageError: If no interface has it, or not as its first address.
    """
    of_interface: dict[str, list[str]] = {
        name: [entry.address for entry in entries if entry.family == socket.AF_INET]
        for name, entries in psutil.net_if_addrs().items()
    }
    for name, addresses in of_interface.items():
        if addresses and addresses[0] == address:
            return name
    raise UsageError(
        f"tensorpipe: cannot listen on {address}: it must be the first IPv4 address of a network "
        f"interface, and this machine has {of_interface}."
    )


def check_free() -> None:
    """Refuse a second session beside the first.

    Raises:
        RuntimeError: If this process has an agent.
    """
    if _is_current_rpc_agent_set():
        raise RuntimeError(
            "tensorpipe: this process is in a session of torch.distributed.rpc already, and can be "
            "in one at a time. Close that first."
        )


def start_agent(
    store: Store,
    *,
    host: str,
    name: str,
    rank: int,
    world_size: int,
    num_threads: int,
    timeout_s: float,
) -> None:
    """Start the agent of this process and wait until all others have told their address.

    Args:
        store: Where the processes find each other.
        host: The address to listen on, and on no other.
        name: This process in the session.
        rank: Its number.
        world_size: Number of processes.
        num_threads: Threads that take requests and answers.
        timeout_s: Longest wait for each of the others' names and addresses.

    Raises:
        UsageError: If it cannot listen on ``host``.
        RuntimeError: If this process has an agent, or the others did not come in time.
    """
    check_free()
    store.set_timeout(timedelta(seconds=timeout_s))
    options = rpc.TensorPipeRpcBackendOptions(
        num_worker_threads=num_threads,
        rpc_timeout=CALL_TIMEOUT_S,
        _transports=["uv"],
        _channels=["basic"],
    )
    # Every call asks for its number, though nothing here has gradients. It can't change in the life
    # of a process, so it is not the rank, which may be another in the next session.
    _init_autograd(0)
    listening_before = _listening()
    with _listening_on(interface_of(host)):
        agent = TensorPipeAgent(store, name, rank, world_size, options, {}, [])
        # Left to itself, a process that ends with an agent aborts.
        atexit.register(stop_agent)
        try:
            _set_and_start_rpc_agent(agent)
        except BaseException:
            stop_agent()
            raise
    strangers = {address for address, _ in _listening() - listening_before} - {host}
    if strangers:
        stop_agent()
        raise UsageError(
            f"tensorpipe: torch listens on {sorted(strangers)} instead of {host}. A process keeps "
            "the address of its first session: start a new process."
        )


def stop_agent() -> None:
    """End the agent at once, without waiting for anybody but a request in computation here."""
    atexit.unregister(stop_agent)
    # Not graceful: that is a barrier, and hangs when somebody is dead.
    rpc.shutdown(graceful=False)


@contextmanager
def _listening_on(interface: str) -> Iterator[None]:
    """Tell TensorPipe an interface, by the only way there is."""
    before = os.environ.get(INTERFACE_VARIABLE)
    os.environ[INTERFACE_VARIABLE] = interface
    try:
        yield
    finally:
        if before is None:
            del os.environ[INTERFACE_VARIABLE]
        else:
            os.environ[INTERFACE_VARIABLE] = before


def _listening() -> set[tuple[str, int]]:
    """Addresses and ports on which this process listens."""
    return {
        (connection.laddr.ip, connection.laddr.port)
        for connection in psutil.Process().net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
