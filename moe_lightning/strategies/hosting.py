"""HostedModel: a loaded model whose experts have been given to dispatchers, wherever they are."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import PreTrainedModel

from moe_lightning.collectives import SharingRanks
from moe_lightning.dispatch import Interleaver, LocalDispatcher, RoutingLog
from moe_lightning.errors import UsageError
from moe_lightning.experts import ExpertShard
from moe_lightning.modeling.checkpoint import CheckpointView
from moe_lightning.modeling.expert_rows import ExpertRows, expert_rows
from moe_lightning.modeling.loading import load_model
from moe_lightning.modeling.lock_step import LockStep
from moe_lightning.modeling.packing import pack_dense, unpack_dense
from moe_lightning.modeling.seam import MoELayer, PaddingMask, attach, find_moe_layers
from moe_lightning.placement import ExpertPlacement


class ModelAdaptation(Protocol):
    """What a run changes of the checkpoint's model; see ``finetune/adaptation``."""

    @property
    def has_adapters(self) -> bool:
        """Whether adapters are added."""

    def add(self, model: PreTrainedModel, num_experts: Mapping[int, int]) -> None:
        """Before the model on meta is sharded."""

    def fill(
        self, model: PreTrainedModel, rows: Mapping[str, ExpertRows], *, device: torch.device
    ) -> None:
        """After it is sharded, before anything is read."""

    def finish(self, model: PreTrainedModel) -> None:
        """Once all is read."""


@dataclass(frozen=True, slots=True)
class HostingOptions:
    """How a strategy loads a model.

    Attributes:
        dtype: Dtype of the weights.
        experts_backend: How experts are computed in inference.
        log: Where dispatchers record their work.
        packs_while_loading: Whether each layer is packed for inference as soon as it is read, so
            that no more than one layer is ever there unpacked.
        is_training: Whether the model is going to be trained.
        adaptation: What is changed of the model; None leaves it as it is.
    """

    dtype: torch.dtype
    experts_backend: str
    log: RoutingLog
    packs_while_loading: bool = False
    is_training: bool = False
    adaptation: ModelAdaptation | None = None

    def make_shard(self, layer: MoELayer, expert_ids: Sequence[int]) -> ExpertShard:
        """The shard of a layer whose experts have been filled, packed if that is to be now.

        Args:
            layer: The layer; its module holds exactly the given experts.
            expert_ids: Logical experts.

        Returns:
            The shard.
        """
        shard = ExpertShard(
            layer.experts,
            layer=layer.layer,
            expert_ids=expert_ids,
            backend=self.experts_backend,
        )
        if self.packs_while_loading:
            shard.pack()
        return shard


class HostedModel:
    """A model, its padding mask, and the shards that hold its experts.

    Args:
        model: The model; its experts are attached to dispatchers.
        padding: The model's padding mask.
        shards: All shards of this process.
        is_whole: Whether the model's own modules hold every expert.
        interleaver: Lets parts of a batch take turns; None computes batches whole.
        placement: Where the experts are; None for one device.
        hosted_by: What tells the strategy and options that hosted it from others.

    Attributes:
        lock_step: Keeps the forwards of several ranks in step; None if this rank needs no other.
        calls_whole_model: Whether forwards must go through the model itself.
        is_alone: Whether no other rank takes part in this one's forwards.
        device: Where inputs go; None is where the model's head is.
        may_train: Whether it was loaded so that it can be trained.
        ranks: The ranks that share the model.
        rows: Which experts the rows of this rank's parameters are, by name in the model.
        num_experts: Logical experts of every MoE layer, those on other ranks included.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        padding: PaddingMask,
        shards: Sequence[ExpertShard],
        *,
        is_whole: bool,
        interleaver: Interleaver | None = None,
        placement: ExpertPlacement | None = None,
        hosted_by: Hashable = None,
    ) -> None:
        self.model = model
        self.padding = padding
        self.shards = shards
        self.is_whole = is_whole
        self.interleaver = interleaver
        self.placement = placement
        self.hosted_by = hosted_by
        self.lock_step: LockStep | None = None
        self.calls_whole_model = False
        self.is_alone = True
        self.device: torch.device | None = None
        self.may_train = True
        self.ranks = SharingRanks()
        self.rows: Mapping[str, ExpertRows] = {}
        self.num_experts: Mapping[int, int] = {}
        self.has_own_weights = False  # trained, or loaded into it: not those of the checkpoint
        self._is_packed = False

    def num_holders(self) -> dict[int, tuple[int, ...]]:
        """On how many slots each logical expert of each MoE layer is."""
        if self.placement is None:
            return {layer: (1,) * number for layer, number in self.num_experts.items()}
        return {
            layer: tuple(len(slots) for slots in experts)
            for layer, experts in self.placement.slots.items()
        }

    def pack(self) -> None:
        """Bring all weights into the layouts that inference wants; once."""
        if not self._is_packed:
            for shard in self.shards:
                shard.pack()
            pack_dense(self.model)
            self._is_packed = True

    def unpack(self) -> None:
        """Give the model its weights back, for training and saving.

        Raises:
            UsageError: If the experts' layout is not exact, or not all of them are in the model.
        """
        if not self.is_whole:
            raise UsageError(
                "the experts of this model are on several devices: it can be neither trained nor "
                "saved. Use a new module under another strategy."
            )
        for shard in self.shards:
            shard.unpack()
        unpack_dense(self.model)
        self._is_packed = False

    def make_room(self) -> None:
        """Let other weights be loaded into the model; those of experts may be lost.

        Raises:
            UsageError: If not all experts are in the model.
        """
        for shard in self.shards:
            shard.make_room()
        self.unpack()
        self.has_own_weights = True


def host_on_one_device(
    view: CheckpointView, device: torch.device, options: HostingOptions
) -> HostedModel:
    """Load a whole model onto one device.

    Args:
        view: The opened checkpoint.
        device: Where it goes.
        options: How it is loaded.

    Returns:
        The hosted model, not packed unless the options say so.
    """
    shards: dict[int, ExpertShard] = {}

    def on_layer(layer: MoELayer) -> None:
        shards[layer.layer] = options.make_shard(layer, range(layer.num_experts))

    num_experts: dict[int, int] = {}
    rows: dict[str, ExpertRows] = {}

    def on_meta(model: PreTrainedModel) -> None:
        layers = find_moe_layers(model)
        num_experts.update({layer.layer: layer.num_experts for layer in layers})
        if options.adaptation is not None:
            options.adaptation.add(model, num_experts)
        rows.update(expert_rows(layers, num_experts))
        if options.adaptation is not None:
            options.adaptation.fill(model, rows, device=device)

    model = load_model(view, device=device, dtype=options.dtype, on_layer=on_layer, on_meta=on_meta)
    if options.adaptation is not None:
        options.adaptation.finish(model)
    padding = attach(model, lambda layer: LocalDispatcher(shards[layer.layer], log=options.log))
    hosted = HostedModel(model, padding, list(shards.values()), is_whole=True)
    hosted.rows, hosted.num_experts = rows, num_experts
    return hosted
