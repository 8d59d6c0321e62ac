"""Cluster: devices of one kind, in one machine or several. No torch."""

import re
from dataclasses import dataclass
from typing import Literal

from moe_lightning.errors import UsageError
from moe_lightning.placement.footprint import HEADROOM

_UNITS = {"GiB": 2**30, "GB": 10**9, "MiB": 2**20, "MB": 10**6, "TiB": 2**40, "TB": 10**12}


@dataclass(frozen=True, slots=True)
class Cluster:
    """Devices that a model may be put on.

    Attributes:
        num_nodes: Machines.
        devices_per_node: Devices of each machine.
        device_bytes: Memory of each device.
        kind: What a device is; processes that share the memory of a host are CPUs.
        host_bytes: Memory of each machine beside its GPUs that experts may use; 0 if that is not
            known.
    """

    num_nodes: int
    devices_per_node: int
    device_bytes: int
    kind: Literal["cpu", "cuda"] = "cuda"
    host_bytes: int = 0

    @property
    def num_devices(self) -> int:
        """All devices."""
        return self.num_nodes * self.devices_per_node

    @property
    def room_bytes(self) -> int:
        """What weights may take of a device."""
        return room_of(self.device_bytes)

    def __str__(self) -> str:
        noun = "GPU" if self.kind == "cuda" else "CPU process"
        plural = ("es" if noun.endswith("s") else "s") if self.num_devices > 1 else ""
        where = "one machine" if self.num_nodes == 1 else f"{self.num_nodes} machines"
        what = f"{self.num_devices} {noun}{plural} of {in_gb(self.device_bytes)}"
        if self.kind == "cpu" and self.num_devices == 1:
            what = f"a CPU with {in_gb(self.device_bytes)}"
        return f"{what} in {where}"


def room_of(num_bytes: int) -> int:
    """What weights may take of a memory; the rest is for activations and caches."""
    return int(num_bytes * (1 - HEADROOM))


def in_gb(num_bytes: float) -> str:
    """Bytes for people, in units of 1000: ``61.1 GB``, ``3.2 MB``."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes:,.0f} B"


def parse_cluster(text: str, *, kind: Literal["cpu", "cuda"] = "cuda") -> Cluster:
    """Devices as a user writes them.

    >>> parse_cluster("2x8x80GiB").num_devices
    16

    Args:
        text: ``4x80GiB`` for four devices of one machine, ``2x8x80GiB`` for two machines of eight,
            ``80GiB`` for one device.
        kind: What a device is.

    Returns:
        The devices.

    Raises:
        UsageError: If it is not written like that.
    """
    found = re.fullmatch(r"(?:(?:(\d+)x)?(\d+)x)?(\d+(?:\.\d+)?)([KMGT]i?B)", text.replace(" ", ""))
    if found is not None and found[4] in _UNITS:
        cluster = Cluster(
            int(found[1] or 1), int(found[2] or 1), int(float(found[3]) * _UNITS[found[4]]), kind
        )
        if cluster.num_devices and cluster.device_bytes:
            return cluster
    raise UsageError(
        f"--devices {text!r} is not understood. Write DEVICESxMEMORY such as 4x80GiB, "
        "MACHINESxDEVICESxMEMORY such as 2x8x80GiB, or auto for this machine; units are "
        f"{', '.join(_UNITS)}."
    )
