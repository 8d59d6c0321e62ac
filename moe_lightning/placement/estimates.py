"""What every strategy needs: the table behind ``moe_auto`` and ``plan``. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from moe_lightning.placement import footprint, traffic
from moe_lightning.placement.cluster import Cluster, in_gb, room_of
from moe_lightning.placement.estimate import TOO_MUCH, Estimate
from moe_lightning.placement.footprint import ModelSizes
from moe_lightning.placement.speeds import Rates, Spread, tokens_per_s
from moe_lightning.placement.visits import GPU_SELECTS_FROM, visits
from moe_lightning.placement.workload import Workload

FEW_DEVICES = 8  # as many as one process is to drive
_USUAL = Workload()
__all__ = ["Estimate", "estimate"]


def estimate(
    sizes: ModelSizes,
    cluster: Cluster,
    *,
    training: bool = False,
    is_mixed: bool = False,
    workload: Workload = _USUAL,
    rates: Rates | None = None,
) -> dict[str, Estimate]:
    """What every strategy needs.

    Args:
        sizes: The model.
        cluster: The devices.
        training: Whether it trains, with AdamW.
        is_mixed: Whether training computes in half precision on float32 weights.
        workload: What a step is, and how its rows are routed.
        rates: What the devices can do; None predicts no speeds.

    Returns:
        The estimates by a short name each, those of strategies that train if it does.

    Raises:
        UsageError: If the recorded routing is of another model.
    """
    table = _Table(sizes, cluster, training, is_mixed, workload, rates)
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
    workload: Workload
    rates: Rates | None

    def single(self) -> Estimate:
        need = footprint.copy_bytes(self.sizes, training=self.training, is_mixed=self.is_mixed)
        return self._checked(Estimate("auto", need), Spread())

    def ddp(self) -> Estimate:
        ranks = self.cluster.num_devices
        need = footprint.copy_bytes(
            self.sizes, training=self.training, is_mixed=self.is_mixed, is_ddp=True
        )
        step = traffic.gradient_traffic(self.sizes, self.workload.prefill_tokens, ranks)
        sent = step if self.training else 0.0
        made = Estimate("ddp", need, bytes_per_token=(sent, sent))
        return self._checked(made, Spread(ranks, rounds=int(self.training)), several=True)

    def copies(self) -> Estimate:
        """As ddp, for inference: ranks need nothing from one another, and batches are shared out
        as they were planned."""
        ranks = self.cluster.num_devices
        options: dict[str, int | str | list[str]] = {"fsdp_size": 1, "dense": "replicated"}
        options["dp_replicate_size"] = ranks
        made = Estimate("moe_fsdp", footprint.copy_bytes(self.sizes), options)
        return self._checked(made, Spread(ranks), several=True)

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
        seen = visits(self.sizes, len(slots), self.workload.routing)
        rows = traffic.placement_traffic(self.sizes, seen)
        every = traffic.placement_traffic(self.sizes, [1.0] * len(slots))
        is_small = has_gpus and self.workload.decode_tokens < GPU_SELECTS_FROM
        sent = (every if is_small else rows, rows)
        made = Estimate("moe_placement", max(needed), {"slots": slots}, sent)
        if len(slots) < 2:
            why_not = "one device: nothing to place"
        elif number > FEW_DEVICES:
            why_not = f"more than {FEW_DEVICES} devices for one process"
        else:
            why_not = ""
        spread = Spread(expert_parts=len(slots), rounds=2 * self._num_moe, stays=True)
        # A host's CPU beside GPUs has other rates, which nobody has measured.
        return self._checked(made, spread if len(slots) == number else None, why_not)

    def rpc(self) -> Estimate:
        workers = max(1, self.cluster.num_devices - 1)
        seen = visits(self.sizes, workers, self.workload.routing)
        decode, prefill = (
            traffic.rpc_traffic(self.sizes, seen, tokens)
            for tokens in (self.workload.decode_tokens, self.workload.prefill_tokens)
        )
        master, worker = footprint.rpc_bytes(self.sizes, workers)
        need = max(master, worker) if self.cluster.num_devices > 1 else master + worker
        made = Estimate("moe_rpc", need, bytes_per_token=(decode, prefill))
        spread = Spread(expert_parts=workers, rounds=2 * self._num_moe)
        return self._checked(made, spread, several=True)

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
            seen = visits(self.sizes, ep, self.workload.routing)
            rows = traffic.exchange_traffic(self.sizes, seen, training=self.training)
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
            for tokens in (self.workload.decode_tokens, self.workload.prefill_tokens)
        )
        sent = (prefill if self.training else decode, prefill)
        gathers = len(self.sizes.layers) if shards_dense or ep < ranks else 0
        rounds = gathers + (3 * self._num_moe if ep > 1 else 0)  # numbers of rows, rows, sums
        spread = Spread(
            ranks,
            expert_parts=ep,
            met=ep,
            rounds=rounds,
            near_bytes=rows * len(self.sizes.layers),
        )
        return self._checked(Estimate(name, need, {**options}, sent), spread, why_not, several=True)

    def tensor_parallel(self) -> Estimate:
        ranks, plan = self.cluster.num_devices, self.sizes.tensor_parallel
        need = footprint.tensor_parallel_bytes(
            self.sizes, ranks, training=self.training, is_mixed=self.is_mixed
        )
        decode, prefill = (
            traffic.tensor_parallel_traffic(
                self.sizes, ranks, makes_logits=makes_logits, training=self.training
            )
            for makes_logits in (True, self.training)
        )
        odd = [number for number in self.sizes.num_heads if number % ranks]
        why_not = f"{ranks} ranks do not divide {odd[0]} heads of attention" if odd else ""
        if plan is None:
            why_not = "the family has no plan for it"
        made = Estimate("moe_tp", need, bytes_per_token=(decode, prefill))
        rounds = 0 if plan is None else 2 * (ranks - 1) * plan.num_sums
        spread = Spread(1, ranks, ranks, rounds=rounds)
        return self._checked(made, spread, why_not, several=True)

    def pipeline(self) -> Estimate:
        stages, layers = self.cluster.num_devices, len(self.sizes.layers)
        need = footprint.pipeline_bytes(self.sizes, min(stages, layers))
        sent = traffic.pipeline_traffic(self.sizes, stages)
        why_not = f"more ranks than the {layers} layers" if stages > layers else ""
        made = Estimate("moe_pp", need, bytes_per_token=(sent, sent))
        return self._checked(made, Spread(rounds=stages), why_not, several=True)

    @property
    def _num_moe(self) -> int:
        return len(self.sizes.experts_by_layer)

    def _checked(
        self, made: Estimate, spread: Spread | None, why_not: str = "", *, several: bool = False
    ) -> Estimate:
        """The estimate with the first reason why it cannot be used, or else its speeds."""
        too_much = made.device_bytes - self.cluster.room_bytes
        if several and self.cluster.num_devices == 1:
            why_not = "one device only"
        elif too_much > 0 and not why_not:
            why_not = f"{in_gb(too_much)} {TOO_MUCH}"
        if why_not or self.rates is None or spread is None:
            return replace(made, why_not=why_not)
        return replace(made, tokens_per_s=self._speeds(made, spread, self.rates))

    def _speeds(
        self, made: Estimate, spread: Spread, rates: Rates
    ) -> tuple[float | None, float | None]:
        tokens = self.workload.decode_tokens, self.workload.prefill_tokens
        if self.training:
            tokens = tokens[1], tokens[1]
        speeds = []
        for number, travels, is_decode in zip(
            tokens, made.bytes_per_token, (True, False), strict=True
        ):
            # A token's bytes come to the busiest device, or to all that share its layers alike.
            total = travels * len(self.sizes.layers) / spread.dense_parts
            near = total if spread.stays else spread.near_bytes
            speeds.append(
                tokens_per_s(
                    self.sizes,
                    self.cluster,
                    rates,
                    replace(spread, near_bytes=near, far_bytes=max(0.0, total - near)),
                    number,
                    makes_logits=is_decode or self.training,
                    training=self.training,
                )
            )
        return speeds[0], speeds[1]
