"""Addresses of workers, and the rule of who may listen where: without keys, only for oneself.

tcp://HOST:PORT    tcp://[IPv6]:PORT    tcp://*:PORT (all interfaces)    ipc://PATH
"""

import ipaddress
import re
import socket

from moe_lightning.errors import UsageError

_TCP = re.compile(
    r"tcp://(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<host>[A-Za-z0-9._*-]+)):(?P<port>[0-9]{1,5})"
)
_HOW_KEYS = (
    "Make keys with `python -m moe_lightning worker --new-keys DIR`, copy DIR to every machine, "
    "and give `--keys DIR` to the workers and `--trainer.strategy.keys DIR` to the master"
)
_MAX_IPC_PATH = 107  # bytes, of sockaddr_un


def check_address(text: str, *, option: str, keys: bool, insecure: bool = False) -> str:
    """Check an address that was given by the user.

    Args:
        text: The address.
        option: Where it was given, for messages.
        keys: Whether both sides have keys.
        insecure: Whether private addresses may go without keys, on the user's own demand.

    Returns:
        The address.

    Raises:
        UsageError: If it is no address, or if anybody could reach it.
    """
    if text.startswith("ipc://"):
        if not 0 < len(text.removeprefix("ipc://").encode()) < _MAX_IPC_PATH:
            raise UsageError(
                f"{option}: the path in {text!r} must have 1 to {_MAX_IPC_PATH - 1} bytes. Give a "
                "shorter one."
            )
        return text
    host, _port = split(text, option=option)
    if keys or is_loopback(host):
        return text
    if not insecure:
        raise UsageError(
            f"{option}: {text} can be reached from other machines, and without keys anybody there "
            f"could use and stop the workers. {_HOW_KEYS}; or use a loopback address "
            "(tcp://127.0.0.1:PORT)."
        )
    if not _is_private(host):
        raise UsageError(
            f"{option}: {text} is not one private address, so `--insecure-network` cannot be used "
            f"for it: anybody could run code here. {_HOW_KEYS} (transport `zmq`), or give an "
            "address of a private network (10/8, 172.16/12, 192.168/16)."
        )
    return text


def split(text: str, *, option: str = "the address") -> tuple[str, int]:
    """Split a TCP address.

    Args:
        text: The address.
        option: Where it was given, for messages.

    Returns:
        Host (an IPv6 address without brackets) and port.

    Raises:
        UsageError: If it is none.
    """
    match = _TCP.fullmatch(text)
    port = int(match["port"]) if match else 0
    if match is None or port > 65535:
        raise UsageError(
            f"{option}: {text!r:.200} is no address. Write tcp://HOST:PORT, with a port "
            "up to 65535."
        )
    return match["v6"] or match["host"], port


def join(host: str, port: int) -> str:
    """Make a TCP address.

    Args:
        host: A name or number.
        port: The port.

    Returns:
        The address.
    """
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def pulse_address(address: str) -> str:
    """Return where the pulse of a worker listens: at the next port, or beside its ipc file.

    Args:
        address: Where the worker listens for requests.

    Returns:
        The address; with port 0 (any that is free) if the worker's port is 0 or the last.
    """
    if address.startswith("ipc://"):
        return f"{address}.pulse"
    host, port = split(address)
    return join(host, port + 1 if 0 < port < 65535 else 0)


def seen_from(master_view: str, address: str) -> str:
    """Return a worker's other address as its master must dial it.

    Args:
        master_view: How the master reaches the worker.
        address: What the worker listens on too, perhaps on all interfaces.

    Returns:
        The port of the second at the host of the first; ipc addresses are the same everywhere.
    """
    if address.startswith("ipc://"):
        return address
    return join(split(master_view)[0], split(address)[1])


def is_loopback(host: str) -> bool:
    """Whether only processes of the same machine reach a host's ports.

    Args:
        host: A name or number; of names only `localhost` is trusted, a resolver's word is not.

    Returns:
        The answer.
    """
    if host == "localhost":
        return True
    number = _number(host)
    return number is not None and number.is_loopback


def numeric(address: str) -> str:
    """Resolve the host of an address to listen on, which libzmq does not.

    Args:
        address: The address.

    Returns:
        The address with the host's number; as it is if it has one, or for ipc.

    Raises:
        UsageError: If nobody knows the host.
    """
    if address.startswith("ipc://"):
        return address
    host, port = split(address)
    if host == "*" or _number(host) is not None:
        return address
    return join(_resolve(host)[0], port)


def _is_private(host: str) -> bool:
    if host == "*":
        return False
    hosts = [host] if _number(host) is not None else _resolve(host)
    numbers = [_number(each) for each in hosts]
    return all(n is not None and n.is_private and not n.is_unspecified for n in numbers)


def _number(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        number = ipaddress.ip_address(host)
    except ValueError:
        return None
    return getattr(number, "ipv4_mapped", None) or number


def _resolve(host: str) -> list[str]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UsageError(
            f"The host {host!r} is not known here ({error}). Check its name."
        ) from error
    hosts = [str(entry[4][0]) for entry in found]
    return sorted(set(hosts), key=lambda each: (":" in each, hosts.index(each)))  # IPv4 first
