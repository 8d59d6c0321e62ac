"""Speeds: how long a step takes at least, from what devices and links can do. No torch.

    step = dense layers + experts + bytes / bandwidth + messages * latency

Weights are read once for a step or multiplied, whichever takes longer; only experts that a row
goes to are read. Not counted: attention's products of queries, keys and values, reading caches,
the optimizer, and what a host needs to start the work. Nothing is taken to overlap.
"""

from dataclasses import dataclass

from moe_lightning.placement.cluster import Cluster
from moe_lightning.placement.footprint import ModelSizes


@dataclass(frozen=True, slots=True)
class Rates:
    """What the devices of a cluster can do; CPU processes of one machine share what it can.

    Attributes:
        flops: FLOP/s of a device in matrix products.
        memory_bytes_per_s: What it reads from its memory.
        link_bytes_per_s: What arrives at a device from others of its machine; None if not known.
        network_bytes_per_s: What arrives at a device from other machines; None if not known.
        latency_s: Seconds of an empty message.
    """

    flops: float
    memory_bytes_per_s: float
    link_bytes_per_s: float | None = None
    network_bytes_per_s: float | None = None
    latency_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Spread:
    """How a strategy spreads a step.

    Attributes:
        sources: Processes that have rows of their own.
        dense_parts: Devices that share each dense layer of a row.
        expert_parts: Devices that share the experts of a layer.
        met: Processes whose rows meet at the same experts.
        rounds: Messages of a step that wait for one another.
        near_bytes: Bytes of a token, over all layers, that come to the busiest device from its own
            machine.
        far_bytes: Those that come from other machines, if there are any.
        stays: Whether nothing leaves the machine.
    """

    sources: int = 1
    dense_parts: int = 1
    expert_parts: int = 1
    met: int = 1
    rounds: int = 0
    near_bytes: float = 0.0
    far_bytes: float = 0.0
    stays: bool = False


def tokens_per_s(
    sizes: ModelSizes,
    cluster: Cluster,
    rates: Rates,
    spread: Spread,
    tokens: int,
    *,
    makes_logits: bool,
    training: bool = False,
) -> float | None:
    """Tokens per second of all devices together, at most.

    Args:
        sizes: The model.
        cluster: The devices.
        rates: What they can do.
        spread: How a step is spread.
        tokens: Tokens of a step, on each process with rows of its own.
        makes_logits: Whether every token gets logits.
        training: Whether there is a backward.

    Returns:
        The rate; None if a rate is needed that is not known.
    """
    seconds = rates.latency_s * spread.rounds
    far = spread.far_bytes if cluster.num_nodes > 1 else 0.0
    near = spread.near_bytes + spread.far_bytes - far
    for num_bytes, speed in ((near, rates.link_bytes_per_s), (far, rates.network_bytes_per_s)):
        if num_bytes:
            if speed is None:
                return None
            seconds += num_bytes * tokens / speed
    head = (sizes.head_bytes or sizes.embedding_bytes) if makes_logits else 0
    dense = sum(layer.dense_bytes for layer in sizes.layers) + head
    passes = 1 if not training else 3 if sizes.trains_all else 2

    def phase(num_bytes: float, num_flops: float, devices: int) -> float:
        shared = min(devices, cluster.devices_per_node) if cluster.kind == "cpu" else 1
        once = max(num_bytes / rates.memory_bytes_per_s, num_flops / rates.flops)
        return passes * shared * once

    here = dense / spread.dense_parts
    seconds += phase(here, 2 * tokens * here / sizes.itemsize, spread.sources * spread.dense_parts)
    met = tokens * spread.met
    itemsize = sizes.expert_itemsize or sizes.itemsize
    for layer in sizes.layers:
        if layer.num_experts:
            share = sizes.top_k / layer.num_experts
            read = layer.expert_bytes * (1 - (1 - share) ** met) / spread.expert_parts
            met_weights = layer.expert_bytes / itemsize * share * met / spread.expert_parts
            devices = spread.expert_parts * spread.sources // spread.met
            seconds += phase(read, 2 * met_weights, devices)
    return spread.sources * tokens / seconds
