"""Estimate: what one strategy needs on some devices, and whether it fits. No torch.

:func:`estimate` makes the table behind the strategy ``moe_auto`` and the verb ``plan``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from moe_lightning.placement import footprint, traffic
from moe_lightning.placement.cluster import Cluster, in_gb, room_of
from moe_lightning.placement.footprint import ModelSizes
from moe_lightning.placement.traffic import DECODE_TOKENS, PREFILL_TOKENS

TOO_MUCH = "too much"
FEW_DEVICES = 8  # as many as one process is to drive
Options = Mapping[str, int | str | list[str]]


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one strategy needs.

    Attributes:
        name: What ``--trainer.strategy`` calls it.
        options: Its options, where they are not the defaults.
        device_bytes: Weights on the fullest device, in training with gradients and optimizer.
        bytes_per_token: What travels for a token and layer: when decoding, when reading prompts; in
            training, in both places, for a step.
        why_not: Why it cannot be used; empty if it can.
    """

    name: str
    device_bytes: int
    options: Options = field(default_factory=dict)
    bytes_per_token: tuple[float, float] = (0.0, 0.0)
    why_not: str = ""

    @property
    def fits(self) -> bool:
        """Whether it can be used."""
        return not self.why_not

    @property
    def is_too_large(self) -> bool:
        """Whether it cannot be used for nothing but its size."""
        return self.why_not.endswith(TOO_MUCH)

    @property
    def label(self) -> str:
        """Name and options, for a table."""
        words = [f"{name}={_short(value)}" for name, value in self.options.items()]
        return " ".join([self.name, *words])

    @property
    def command(self) -> str:
        """Name and options, for a command line."""
        words = [f"--trainer.strategy {self.name}"]
        for name, value in self.options.items():
            text = f'"[{",".join(value)}]"' if isinstance(value, list) else value
            words.append(f"--trainer.strategy.{name} {text}")
        return " ".join(words)


def estimate(
    sizes: ModelSizes, cluster: Cluster, *, training: bool = False, is_mixed: bool = False
) -> dict[str, Estimate]:
    """What every strategy needs.

    Args:
        sizes: The model.
        cluster: The devices.
        training: Whether it trains, with AdamW.
        is_mixed: Whether training computes in half precision on float32 weights.

    Returns:
        The estimates by a short name each, those of strategies that train if it does.
    """
    table = _Table(sizes, cluster, training, is_mixed)
    rows = {"single": table.single(), "ddp": table.ddp()}
    if not training:
        rows |= {"copies": table.copies(), "placement": table.placement(), "rpc": table.rpc()}
    rows |= {"fsdp": table.fsdp(), "ep": table.expert_parallel(shards_dense=training)}
    if not training:
        rows["sharded ep"] = table.expert_parallel(shards_dense=True)
    rows["tp"] = table.tensor_parallel()
    if not training:
        rows["pp"] = table.pipeline()
    return rows


@dataclass(frozen=True, slots=True)
class _Table:
    """The rows of the table."""

    sizes: ModelSizes
    cluster: Cluster
    training: bool
    is_mixed: bool

    def single(self) -> Estimate:
        need = footprint.copy_bytes(self.sizes, training=self.training, is_mixed=self.is_mixed)
        return self._checked(Estimate("auto", need))

    def ddp(self) -> Estimate:
        ranks = self.cluster.num_devices
        need = footprint.copy_bytes(
            self.sizes, training=self.training, is_mixed=self.is_mixed, is_ddp=True
        )
        step = traffic.gradient_traffic(self.sizes, PREFILL_TOKENS, ranks)
        sent = step if self.training else 0.0
        return self._checked(Estimate("ddp", need, bytes_per_token=(sent, sent)), several=True)

    def copies(self) -> Estimate:
        """As ddp, for inference: ranks need nothing from one another, and batches are shared out
        as they were planned."""
        ranks = self.cluster.num_devices
        options: dict[str, int | str | list[str]] = {"fsdp_size": 1, "dense": "replicated"}
        options["dp_replicate_size"] = ranks
        return self._checked(
            Estimate("moe_fsdp", footprint.copy_bytes(self.sizes), options), several=True
        )

    def placement(self) -> Estimate:
        """On the GPUs of one machine; with its CPU as well if they are too small."""
        number, room = self.cluster.devices_per_node, self.cluster.room_bytes
        rooms = [room] * number
        needed = footprint.placed_bytes(self.sizes, rooms)
        has_gpus = self.cluster.kind == "cuda"
        slots = [f"cuda:{index}" if has_gpus else "cpu" for index in range(number)]
        if has_gpus and self.cluster.host_bytes and any(n > room for n in needed):
            with_host = [*rooms, room_of(self.cluster.host_bytes)]
            on_all = footprint.placed_bytes(self.sizes, with_host)
            if all(n <= r for n, r in zip(on_all, with_host, strict=True)):
                needed, slots = on_all[:-1], [*slots, "cpu"]
        row = traffic.row_traffic(self.sizes, len(slots), has_home=True)
        made = Estimate("moe_placement", max(needed), {"slots": slots}, (row, row))
        if len(slots) < 2:
            why_not = "one device: nothing to place"
        elif number > FEW_DEVICES:
            why_not = f"more than {FEW_DEVICES} devices for one process"
        else:
            why_not = ""
        return self._checked(made, why_not)

    def rpc(self) -> Estimate:
        workers = max(1, self.cluster.num_devices - 1)
        row = traffic.row_traffic(self.sizes, workers, has_home=False)
        master, worker = footprint.rpc_bytes(self.sizes, workers)
        need = max(master, worker) if self.cluster.num_devices > 1 else master + worker
        return self._checked(Estimate("moe_rpc", need, bytes_per_token=(row, row)), several=True)

    def fsdp(self) -> Estimate:
        return self._sharded("moe_fsdp", {}, ep=1)

    def expert_parallel(self, *, shards_dense: bool) -> Estimate:
        """Rows stay within a machine, whose links are fast."""
        ep = self.ep_size
        why_not = "one device in a machine: rows would travel between" if ep == 1 else ""
        if self.training:
            return self._sharded("moe_fsdp", {"ep_size": ep}, ep=ep, why_not=why_not)
        options: dict[str, int | str] = {}
        if ep != self.cluster.num_devices:
            options["ep_size"] = ep
        if shards_dense:
            options["dense"] = "sharded"
        return self._sharded("moe_ep", options, ep=ep, shards_dense=shards_dense, why_not=why_not)

    @property
    def ep_size(self) -> int:
        """Most ranks of a machine that experts can be shared by, such that all have the same."""
        ranks = self.cluster.devices_per_node
        divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
        return max(n for n in divisors if n <= max(1, self.sizes.num_experts))

    def _sharded(
        self,
        name: str,
        options: Mapping[str, int | str],
        *,
        ep: int,
        shards_dense: bool = True,
        why_not: str = "",
    ) -> Estimate:
        ranks = self.cluster.num_devices
        need = footprint.sharded_bytes(
            self.sizes,
            fsdp=ranks,
            ep=ep,
            shards_dense=shards_dense,
            training=self.training,
            is_mixed=self.is_mixed,
        )
        rows = 0.0
        if ep > 1:
            rows = traffic.row_traffic(self.sizes, ep, has_home=True, training=self.training)
        decode, prefill = (
            rows
            + traffic.weight_traffic(
                self.sizes,
                tokens,
                fsdp=ranks,
                ep=ep,
                shards_dense=shards_dense,
                training=self.training,
            )
            for tokens in (DECODE_TOKENS, PREFILL_TOKENS)
        )
        sent = (prefill if self.training else decode, prefill)
        return self._checked(Estimate(name, need, {**options}, sent), why_not, several=True)

    def tensor_parallel(self) -> Estimate:
        ranks = self.cluster.num_devices
        need = footprint.tensor_parallel_bytes(
            self.sizes, ranks, training=self.training, is_mixed=self.is_mixed
        )
        sent = traffic.tensor_parallel_traffic(self.sizes, ranks, training=self.training)
        odd = [number for number in self.sizes.num_heads if number % ranks]
        why_not = f"{ranks} ranks do not divide {odd[0]} heads of attention" if odd else ""
        made = Estimate("moe_tp", need, bytes_per_token=(sent, sent))
        return self._checked(made, why_not, several=True)

    def pipeline(self) -> Estimate:
        stages, layers = self.cluster.num_devices, len(self.sizes.layers)
        need = footprint.pipeline_bytes(self.sizes, min(stages, layers))
        sent = traffic.pipeline_traffic(self.sizes, stages)
        why_not = f"more ranks than the {layers} layers" if stages > layers else ""
        made = Estimate("moe_pp", need, bytes_per_token=(sent, sent))
        return self._checked(made, why_not, several=True)

    def _checked(self, made: Estimate, why_not: str = "", *, several: bool = False) -> Estimate:
        """The estimate with the first reason why it cannot be used."""
        too_much = made.device_bytes - self.cluster.room_bytes
        if several and self.cluster.num_devices == 1:
            why_not = "one device only"
        elif too_much > 0 and not why_not:
            why_not = f"{in_gb(too_much)} {TOO_MUCH}"
        return Estimate(made.name, made.device_bytes, made.options, made.bytes_per_token, why_not)


def _short(value: int | str | list[str]) -> str:
    if not isinstance(value, list):
        return str(value)
    shown = value if len(value) < 4 else [value[0], "...", value[-1]]
    return f"[{','.join(shown)}]"
