"""Which strategy suits a model and devices: the rules of ``moe_auto``, without a trainer.

    fits on one device ──────────────────────────▶ auto (a single device); with ranks a copy each
    inference, GPUs of one machine together ─────▶ moe_placement; with ranks moe_ep
    inference, several machines, or too large ───▶ moe_rpc
    training, several devices ───────────────────▶ moe_fsdp, with ep_size where experts dominate

"With ranks" means that torchrun or SLURM started several processes: they are there, and each wants
rows. A copy each, if it fits, needs no traffic at all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from moe_lightning.errors import UsageError
from moe_lightning.placement.cluster import Cluster, in_gb
from moe_lightning.placement.estimates import Estimate, estimate
from moe_lightning.placement.footprint import HEADROOM, ModelSizes

if TYPE_CHECKING:
    import torch
    from lightning.pytorch.strategies import Strategy

EXPERTS_DOMINATE = 0.5  # of the weights


@dataclass(frozen=True, slots=True)
class Choice:
    """The strategy that suits.

    Attributes:
        estimate: It, with its options and what it needs.
        cluster: The devices that it was chosen for.
        reasons: Three lines: what was found, the rule, the choice with its numbers.
    """

    estimate: Estimate
    cluster: Cluster
    reasons: tuple[str, str, str]

    @property
    def name(self) -> str:
        """What ``--trainer.strategy`` calls it; ``auto`` is a single device."""
        return self.estimate.name

    def build(self, devices: Sequence["torch.device"]) -> "Strategy":
        """Make the strategy.

        Args:
            devices: The devices of the trainer.

        Returns:
            A new strategy that no trainer has yet.
        """
        # They import the base class, whose `select` leads here.
        from lightning.pytorch.strategies import SingleDeviceStrategy

        from moe_lightning.strategies.placement_strategy import PlacementStrategy
        from moe_lightning.strategies.rpc_strategy import RPCStrategy
        from moe_lightning.strategies.sharded_strategy import ShardedStrategy

        if self.name == "auto":
            return SingleDeviceStrategy(device=devices[0])
        options = dict(self.estimate.options)
        if self.name == "moe_rpc":
            return RPCStrategy(**options)  # type: ignore[arg-type]
        if self.name == "moe_placement":
            slots = options["slots"]
            assert isinstance(slots, list)
            host = ["cpu"] if slots[-1] == "cpu" and devices[0].type == "cuda" else []
            return PlacementStrategy([*map(str, devices), *host])
        if self.name == "moe_ep":
            options = {"ep_size": "auto"} | options
        return ShardedStrategy(**options)  # type: ignore[arg-type]


def select(
    sizes: ModelSizes,
    cluster: Cluster,
    *,
    training: bool = False,
    is_mixed: bool = False,
    has_ranks: bool | None = None,
) -> Choice:
    """Choose a strategy.

    Args:
        sizes: The model.
        cluster: The devices.
        training: Whether it trains, with AdamW.
        is_mixed: Whether training computes in half precision on float32 weights.
        has_ranks: Whether a process for every device is there or will be started. None means: for
            training, and on several machines.

    Returns:
        The choice.

    Raises:
        UsageError: If nothing has room; the message has the numbers and what would help.
    """
    rows = estimate(sizes, cluster, training=training, is_mixed=is_mixed)
    if has_ranks is None:
        has_ranks = cluster.num_devices > 1 and (training or cluster.num_nodes > 1)
    if training:
        rule, order = _training_rule(sizes, cluster, rows)
    elif has_ranks:
        rule, order = _rule_for_ranks(cluster, rows)
    else:
        rule, order = _rule_for_one_process(cluster, rows)
    for key in order:
        if rows[key].fits:
            chosen = rows[key]
            if key == "rpc" and not has_ranks:
                chosen = replace(chosen, options={"num_workers": cluster.num_devices - 1})
            reasons = (_found(sizes, cluster), rule, _chosen(chosen, cluster))
            return Choice(chosen, cluster, reasons)
    raise UsageError(_nothing_fits(sizes, cluster, rows, order, training=training))


def _rule_for_one_process(
    cluster: Cluster, rows: Mapping[str, Estimate]
) -> tuple[str, tuple[str, ...]]:
    """Inference by one process: what it is called, and the rows to try."""
    if rows["single"].fits:
        return "inference, and all weights fit on one device: a single device", ("single",)
    if rows["placement"].fits:
        slots = rows["placement"].options["slots"]
        with_host = cluster.kind == "cuda" and isinstance(slots, list) and slots[-1] == "cpu"
        what = "the GPUs and the CPU" if with_host else "the devices"
        return (
            f"inference, too large for one device, and {what} of one machine have room together: "
            "placement in one process"
        ), ("placement",)
    return (
        "inference, and one process cannot drive enough devices: workers that hold the experts"
    ), ("single", "placement", "rpc")


def _rule_for_ranks(cluster: Cluster, rows: Mapping[str, Estimate]) -> tuple[str, tuple[str, ...]]:
    """Inference by several processes."""
    if rows["copies"].fits:
        return "inference by several ranks, each with room for a copy: no traffic", ("copies",)
    if cluster.num_nodes == 1:
        return (
            "inference by the ranks of one machine, none with room for a copy: they share experts"
        ), ("ep", "sharded ep", "fsdp")
    return (
        "inference on several machines, no device with room for a copy: rank 0 runs the model, "
        "the others hold experts"
    ), ("rpc", "ep", "sharded ep", "fsdp")


def _training_rule(
    sizes: ModelSizes, cluster: Cluster, rows: Mapping[str, Estimate]
) -> tuple[str, tuple[str, ...]]:
    if cluster.num_devices == 1:
        return "training on one device: a single device", ("single",)
    if cluster.devices_per_node == 1:
        return (
            "training on several machines with one device each: FSDP alone, for rows are to stay "
            "within a machine"
        ), ("fsdp",)
    share = sizes.expert_bytes / sizes.num_bytes
    if share < EXPERTS_DOMINATE:
        return (
            f"training on several devices, and experts are only {share:.0%} of the weights: FSDP "
            "alone"
        ), ("fsdp", "ep")
    gathered, sent = (in_gb(rows[name].bytes_per_token[0]) for name in ("fsdp", "ep"))
    return (
        f"training on several devices, and experts are {share:.0%} of the weights: FSDP, and "
        f"expert parallelism within a machine ({sent} travel per token and layer, {gathered} "
        "without)"
    ), ("ep", "fsdp")


def _found(sizes: ModelSizes, cluster: Cluster) -> str:
    num_layers = sum(layer.num_experts > 0 for layer in sizes.layers)
    return (
        f"found {sizes.name}, {in_gb(sizes.num_bytes)} of weights ({sizes.dtype}), "
        f"{in_gb(sizes.expert_bytes)} of them in {num_layers} x {sizes.num_experts} experts; "
        f"{cluster}"
    )


def _chosen(chosen: Estimate, cluster: Cluster) -> str:
    return (
        f"chosen {chosen.command}: {in_gb(chosen.device_bytes)} on the fullest device, which has "
        f"room for {in_gb(cluster.room_bytes)} ({HEADROOM:.0%} kept free)"
    )


def _nothing_fits(
    sizes: ModelSizes,
    cluster: Cluster,
    rows: Mapping[str, Estimate],
    order: Sequence[str],
    *,
    training: bool,
) -> str:
    too_large = [rows[name] for name in order if rows[name].is_too_large]
    needs = " and ".join(f"{row.label} needs {in_gb(row.device_bytes)}" for row in too_large)
    halves = sizes.dtype == "float32"
    if training:
        remedies = [
            "train adapters only (--model.lora)" if sizes.trains_all else "",
            "--trainer.precision bf16-true" if halves else "",
            "more devices (--trainer.devices, --trainer.num_nodes)",
        ]
    else:
        remedies = [
            "--model.dtype bfloat16" if halves else "",
            "on a CPU --model.experts_backend cpu_half or cpu_int8",
            "more ranks by torchrun or SLURM, on this or more machines",
            "--trainer.strategy moe_rpc with workers that you start on other machines",
        ]
    return (
        f"moe_auto {_found(sizes, cluster)}. Nothing fits: {in_gb(cluster.room_bytes)} of a device "
        f"may be weights{' and their optimizer' if training else ''}, but {needs}. What helps: "
        f"{'; '.join(remedy for remedy in remedies if remedy)}."
    )
