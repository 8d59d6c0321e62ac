"""From what a user names to devices that are there, and how much room is on them."""

from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from moe_lightning.errors import UsageError

CGROUP = Path("/sys/fs/cgroup")


def parse_devices(
    names: Sequence[str], *, option: str = "trainer.strategy.slots"
) -> list[torch.device]:
    """Devices of this machine by name.

    Args:
        names: ``cpu``, ``cuda:N``, or ``cuda`` for the first GPU.
        option: The option that names them, for messages.

    Returns:
        The devices.

    Raises:
        UsageError: If a name is no device, or the device is not there.
    """
    there = _devices_there()
    devices = []
    for name in names:
        try:
            device = torch.device(str(name).strip())
        except RuntimeError:
            device = None
        if device is not None and device.type == "cuda" and device.index is None:
            device = torch.device("cuda", 0)
        if device is not None and device.type == "cpu":
            device = torch.device("cpu")
        if device is None or str(device) not in there:
            raise UsageError(
                f"{option} names {name!r}, which this machine does not have. It has "
                f"{', '.join(there)}; each may be named several times."
            )
        devices.append(device)
    return devices


def _devices_there() -> list[str]:
    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]


def free_bytes(device: torch.device) -> int:
    """Bytes that a device has room for.

    Args:
        device: A GPU, or the host, where the limit of the container counts as well.

    Returns:
        Free bytes now.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = int(psutil.virtual_memory().available)
    limit, used = (_read_number(CGROUP / f"memory.{name}") for name in ("max", "current"))
    if limit is None or used is None:
        return available
    cache = 0  # pages of files that the kernel gives up before it refuses memory
    for line in (CGROUP / "memory.stat").read_text().splitlines():
        if line.startswith("inactive_file "):
            cache = int(line.split()[1])
    return min(available, limit - used + cache)


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no control groups, or "max"
        return None
