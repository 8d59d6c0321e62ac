"""Loading a model over ranks: each rank reads its share, and nothing gathers the model."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel
from typing_extensions import override

from moe_lightning.collectives import RankGroup, SharingRanks
from moe_lightning.dispatch import CollectiveDispatcher, Dispatcher, LocalDispatcher, RoutingLog
from moe_lightning.errors import UsageError
from moe_lightning.experts import ExpertShard
from moe_lightning.modeling.cache import ColumnCache
from moe_lightning.modeling.checkpoint import CheckpointView
from moe_lightning.modeling.expert_rows import ExpertRows, expert_rows
from moe_lightning.modeling.loading import build_on_meta, load_model
from moe_lightning.modeling.lock_step import LockStep
from moe_lightning.modeling.seam import MoELayer, PaddingMask, attach, find_moe_layers
from moe_lightning.modeling.sharding import (
    RankMeshes,
    ShardingOptions,
    is_sharded,
    shard_model,
)
from moe_lightning.placement import ExpertPlacement
from moe_lightning.strategies.hosting import HostedModel, HostingOptions


@dataclass(frozen=True, slots=True)
class ExchangeOptions:
    """How rows travel between the ranks that share a layer's experts.

    Attributes:
        num_chunks: Parts of the rows, the next of which travels while one is computed.
        wire_dtype: Precision of rows on their way; None is the model's own.
    """

    num_chunks: int = 1
    wire_dtype: torch.dtype | None = None


class ShardedModel(HostedModel):
    """A rank's share of a model, and what it says of itself.

    Args:
        model: The share.
        padding: The model's padding mask.
        shards: The shards of this rank.
        may_pack: Whether the rank has whole weights, which may change their layout.
        rows: Which experts the rows of this rank's parameters are, by name in the model.
        num_experts: Logical experts of every MoE layer, those of other pipeline stages included.
        ranks: The ranks that share the model.
        placement: Where the experts are, among the ranks along ``ep``; None if there is one.
        lock_step: Keeps the forwards of the ranks in step; None if no other rank is needed.
        calls_whole_model: Whether forwards must go through the model itself.
        is_alone: Whether no other rank takes part in this one's forwards.
        device: Where this rank computes.
        hosted_by: What tells the strategy and options that hosted it from others.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        padding: PaddingMask,
        shards: Sequence[ExpertShard],
        *,
        may_pack: bool,
        rows: Mapping[str, ExpertRows],
        num_experts: Mapping[int, int],
        ranks: SharingRanks,
        placement: ExpertPlacement | None,
        lock_step: LockStep | None,
        calls_whole_model: bool,
        is_alone: bool,
        device: torch.device,
        hosted_by: Hashable,
    ) -> None:
        super().__init__(
            model, padding, shards, is_whole=True, placement=placement, hosted_by=hosted_by
        )
        self.may_pack = may_pack
        self.rows = rows
        self.num_experts = num_experts
        self.ranks = ranks
        self.lock_step = lock_step
        self.calls_whole_model = calls_whole_model
        self.is_alone = is_alone
        self.device = device

    @override
    def pack(self) -> None:
        if self.may_pack:
            super().pack()

    @override
    def unpack(self) -> None:
        if self.may_pack:
            super().unpack()


class ShardLoader:
    """Loads a rank's share of a checkpoint.

    Args:
        meshes: The ranks; None for one that is alone.
        sharding: How parameters are shared.
        exchange: How rows travel.
        device: Where this rank computes.
        host_ranks: All ranks, on a group of the host's.
    """

    def __init__(
        self,
        meshes: RankMeshes | None,
        *,
        sharding: ShardingOptions,
        exchange: ExchangeOptions,
        device: torch.device,
        host_ranks: RankGroup,
    ) -> None:
        self.meshes = meshes
        self.sharding = sharding
        self.exchange = exchange
        self.device = device
        self.host_ranks = host_ranks

    def load(
        self,
        view: CheckpointView,
        options: HostingOptions,
        *,
        place: Callable[[Mapping[int, int], int], ExpertPlacement],
        hosted_by: Hashable,
    ) -> ShardedModel:
        """Load the share.

        Args:
            view: The opened checkpoint.
            options: How it is loaded.
            place: Places experts: (experts of each layer, number of slots) to a placement over the
                ranks along ``ep``.
            hosted_by: What tells the strategy and its options from others.

        Returns:
            The share.

        Raises:
            UsageError: If the ranks cannot share this model so.
            CheckpointError: If the checkpoint is bad, or its family has no plan for what is asked.
        """
        meta = build_on_meta(view.config)
        num_experts = {layer.layer: layer.num_experts for layer in find_moe_layers(meta)}
        placement, here = None, None
        if self.meshes is not None:
            self._check(meta)
            if self.meshes.config.ep_size > 1:
                placement = place(num_experts, self.meshes.config.ep_size)
                here = placement.experts_by_layer(self.meshes.rank("ep"))
        layers: list[MoELayer] = []
        rows: dict[str, ExpertRows] = {}
        weights_device = torch.device("cpu") if self.sharding.cpu_offload else self.device
        calls_whole_model = False

        def on_meta(model: PreTrainedModel) -> None:
            nonlocal calls_whole_model
            found = find_moe_layers(model)
            adaptation = options.adaptation
            if adaptation is not None:
                adaptation.add(model, num_experts)
            if self.meshes is not None:
                calls_whole_model = shard_model(model, self.meshes, self.sharding)
            layers.extend(layer for layer in found if layer.is_part_of(model))
            rows.update(expert_rows(layers, num_experts, here))
            if adaptation is not None:
                adaptation.fill(model, rows, device=weights_device)

        shards: dict[int, ExpertShard] = {}

        def on_layer(layer: MoELayer) -> None:
            ids = range(num_experts[layer.layer]) if here is None else here[layer.layer]
            has_whole_weights = not any(is_sharded(p) for p in layer.experts.parameters())
            shards[layer.layer] = replace(
                options, packs_while_loading=options.packs_while_loading and has_whole_weights
            ).make_shard(layer, ids)

        model = load_model(
            view,
            device=weights_device,
            dtype=options.dtype,
            experts=here,
            on_layer=on_layer,
            on_meta=on_meta,
            show_progress=self.host_ranks.rank == 0,
        )
        if options.adaptation is not None:
            options.adaptation.finish(model)
        padding = attach(
            model,
            lambda layer: self._dispatcher(
                shards[layer.layer], num_experts[layer.layer], placement, options.log
            ),
            layers=layers,
        )
        shares = any(is_sharded(p) for p in model.parameters())
        return ShardedModel(
            model,
            padding,
            list(shards.values()),
            may_pack=not shares,
            rows=rows,
            num_experts=num_experts,
            ranks=SharingRanks() if self.meshes is None else self.meshes.sharing_ranks(),
            placement=placement,
            lock_step=LockStep(self.host_ranks) if shares or placement is not None else None,
            calls_whole_model=calls_whole_model,
            is_alone=self.meshes is None,
            device=self.device,
            hosted_by=hosted_by,
        )

    def _dispatcher(
        self,
        shard: ExpertShard,
        num_experts: int,
        placement: ExpertPlacement | None,
        log: RoutingLog,
    ) -> Dispatcher:
        if placement is None or self.meshes is None:
            is_copy = self.meshes is not None and self.meshes.rank("tp") > 0
            # Ranks of a tensor-parallel group compute the same rows, which count once.
            return LocalDispatcher(shard, log=RoutingLog() if is_copy else log)
        config = self.meshes.config
        return CollectiveDispatcher(
            shard,
            num_experts=num_experts,
            experts_of_slot={
                slot: placement.experts_of(slot, shard.layer) for slot in range(config.ep_size)
            },
            group=self.meshes.group("ep"),
            same_rows_group=self.meshes.group("tp") if config.tp_size > 1 else None,
            num_chunks=self.exchange.num_chunks,
            wire_dtype=self.exchange.wire_dtype,
            log=log,
        )

    def _check(self, model: PreTrainedModel) -> None:
        assert self.meshes is not None
        config = self.meshes.config
        text = model.config.get_text_config()
        for name in ("num_attention_heads", "num_key_value_heads"):
            number = getattr(text, name, None)
            if number and number % config.tp_size:
                raise UsageError(
                    f"tp_size is {config.tp_size}, but this model's {name} is {number}: attention "
                    "is split by heads. Use a tp_size that divides it, or the strategy moe_ep or "
                    "moe_fsdp."
                )
        num_layers = text.num_hidden_layers
        if config.pp_size > num_layers:
            raise UsageError(
                f"pp_size is {config.pp_size}, but this model has {num_layers} layers. Use fewer "
                "stages."
            )
        if config.pp_size > 1 and not ColumnCache.supports(text):
            raise UsageError(
                f"{type(model).__name__} keeps a state beside keys and values, which pipeline "
                "stages cannot hold yet. Use the strategy moe_ep or moe_fsdp."
            )
