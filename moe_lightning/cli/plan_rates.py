"""What devices can do, as ``plan`` is told or finds out."""

import re
from collections.abc import Mapping

import torch

from moe_lightning.errors import UsageError
from moe_lightning.placement.cluster import Cluster
from moe_lightning.placement.speeds import Rates
from moe_lightning.strategies.measured_rates import measure_rates

PREFIXES = {
    "n": 1e-9,
    "u": 1e-6,
    "m": 1e-3,
    "": 1.0,
    "K": 1e3,
    "M": 1e6,
    "G": 1e9,
    "T": 1e12,
    "P": 1e15,
}
# The options, the fields of Rates that they are, and their help.
OPTIONS = {
    "flops": ("flops", "400T", "FLOP/s of a device in matrix products."),
    "memory_bandwidth": ("memory_bytes_per_s", "3.35TB/s", "What a device reads from its memory."),
    "bandwidth": ("link_bytes_per_s", "900GB/s", "What a device gets from others of its machine."),
    "network": ("network_bytes_per_s", "25GB/s", "What a device gets from other machines."),
    "latency": ("latency_s", "10us", "Time of an empty message. The default is 0."),
}


def choose_rates(
    given: Mapping[str, str | None], cluster: Cluster, dtype: torch.dtype, *, measures: bool
) -> Rates | None:
    """The rates: those given, and of this machine's devices what is found by trying.

    Args:
        given: What the user says, by option; None where nothing.
        cluster: The devices.
        dtype: Of weights.
        measures: Whether the devices are this machine's.

    Returns:
        The rates; None if there are none.

    Raises:
        UsageError: If an option is not understood, or others belong to it.
    """
    told = {
        OPTIONS[name][0]: _number(name, text) for name, text in given.items() if text is not None
    }
    if measures and not {"flops", "memory_bytes_per_s", "link_bytes_per_s"} <= {*told}:
        found = measure_rates(torch.device(cluster.kind), dtype)
        fields = ("flops", "memory_bytes_per_s", "link_bytes_per_s", "latency_s")
        return Rates(**{name: getattr(found, name) for name in fields} | told)
    if not told:
        return None
    if not {"flops", "memory_bytes_per_s"} <= {*told}:
        raise UsageError(
            "speeds of --devices need --flops and --memory_bandwidth: give both, or no rates. Of "
            "this machine's devices (--devices auto) they are measured."
        )
    return Rates(**told)


def _number(name: str, text: str) -> float:
    number, prefix, unit = r"(\d+(?:\.\d+)?) *", "([KMGTP]?)", "B/s"
    if name == "latency":
        prefix, unit = "([num])", "s"
    elif name == "flops":
        unit = "(?:FLOP/?s)?"
    found = re.fullmatch(number + prefix + unit, text.strip())
    if found is not None and float(found[1]) > 0:
        return float(found[1]) * PREFIXES[found[2]]
    raise UsageError(
        f"--{name} {text!r} is not understood. Write a number with its unit, such as "
        f"{OPTIONS[name][1]}."
    )
