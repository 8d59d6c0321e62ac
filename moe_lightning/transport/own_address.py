"""Which of this machine's addresses another machine sees."""

import socket

from moe_lightning.transport.addresses import split

LOOPBACK = "127.0.0.1"


def own_address(*, towards: str) -> str:
    """The address of this machine from which another one is reached.

    Args:
        towards: The other one's address, tcp or ipc.

    Returns:
        The address; loopback for ipc.
    """
    if towards.startswith("ipc://"):
        return LOOPBACK
    host, port = split(towards)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port or 1))  # sends nothing: the kernel only picks the way
        return str(probe.getsockname()[0])


def host_towards(other: str, *, listening: str) -> str:
    """The host on which a process that listens somewhere is reached by another machine.

    Args:
        other: The other machine's host.
        listening: The address that is listened on; it may be that of all interfaces.

    Returns:
        A host of this machine.
    """
    if listening.startswith("ipc://"):
        return LOOPBACK
    host, _ = split(listening)
    is_any = host in ("*", "0.0.0.0", "::")
    return own_address(towards=f"tcp://{other}:1") if is_any else host
