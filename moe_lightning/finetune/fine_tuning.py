"""FineTuning: the steps of a fit, over the ranks that share a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from moe_lightning.collectives import SharingRanks
from moe_lightning.finetune.balancing import BiasBalancing
from moe_lightning.finetune.clipping import clip_by_norm, clip_by_value, gradient_norm
from moe_lightning.finetune.holders import held_parameters
from moe_lightning.finetune.kept_rows import KeptRows
from moe_lightning.finetune.losses import Losses, aux_loss_weight_of, language_model_losses
from moe_lightning.finetune.optimizers import parameter_groups
from moe_lightning.finetune.replicas import sum_replica_gradients
from moe_lightning.finetune.router_watch import RouterWatch
from moe_lightning.modeling.expert_rows import ExpertRows
from moe_lightning.modeling.seam import find_moe_layers


@dataclass(frozen=True, slots=True)
class RouterBalance:
    """What keeps routers from sending all rows to a few experts.

    Args:
        aux_loss_weight: Weight of the family's own load-balancing loss. The default is the
            checkpoint's router_aux_loss_coef, or 0 for families that have none.
        z_loss_weight: Weight of the router z-loss, which keeps the routers' logits small.
        bias_update_rate: How far each step moves the routers' correction biases towards an even
            load, without a loss (DeepSeek-V3 took 0.001). 0 leaves them alone.
    """

    aux_loss_weight: float | None = None
    z_loss_weight: float = 0.0
    bias_update_rate: float = 0.0


class FineTuning:
    """Losses, gradients and clipping of a model that ranks share.

        losses ─▶ backward ─▶ finish_gradients ─▶ clip ─▶ optimizer ─▶ rows kept are put back

    Args:
        model: This rank's share of the model.
        balance: What keeps routers balanced.
        ranks: The ranks.
        rows: Which experts the rows of its parameters are, by name.
        num_holders: For each MoE layer and logical expert, on how many places along ``ep`` it is.
        chosen: The experts of each layer that train; None if all do.

    Raises:
        UsageError: If the family has no such loss, or no such bias.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        balance: RouterBalance,
        *,
        ranks: SharingRanks,
        rows: Mapping[str, ExpertRows],
        num_holders: Mapping[int, Sequence[int]],
        chosen: Mapping[int, Sequence[int]] | None,
    ) -> None:
        self.model = model
        self.ranks = ranks
        self._rows = rows
        layers = find_moe_layers(model)
        self._num_holders = {
            f"{layer.name}.{name}": num_holders[layer.layer]
            for layer in layers
            for name, _ in layer.experts.named_parameters(recurse=False)
        }
        self._aux_loss_weight = aux_loss_weight_of(model, balance.aux_loss_weight)
        self._z_loss_weight = balance.z_loss_weight
        self._balancing = None
        if balance.bias_update_rate:
            self._balancing = BiasBalancing(model, rate=balance.bias_update_rate)
        needs_routers = self._aux_loss_weight or self._z_loss_weight or self._balancing
        self._routers = RouterWatch(model) if needs_routers else None
        self._kept = None if chosen is None else KeptRows.of(layers, rows, chosen)

    def losses(self, batch: Mapping[str, Tensor]) -> Losses:
        """Run a training micro-batch; all data ranks call this together.

        Args:
            batch: As for :func:`~moe_lightning.finetune.losses.language_model_losses`.

        Returns:
            The losses; ``share`` is what this rank differentiates.
        """
        losses = language_model_losses(
            self.model,
            batch,
            ranks=self.ranks.data,
            routers=self._routers,
            aux_loss_weight=self._aux_loss_weight,
            z_loss_weight=self._z_loss_weight,
        )
        if self._balancing is not None:
            self._balancing.count(losses.passes, batch.get("attention_mask"))
        return losses

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The parameters that train, grouped for an optimizer."""
        return parameter_groups(self.model.named_parameters(), expert_names=self._rows)

    def watch(self, optimizer: Optimizer) -> None:
        """Keep the rows of experts that were not chosen as they are, whatever it does."""
        if self._kept is not None:
            optimizer.register_step_post_hook(self._kept.restore)

    def finish_gradients(self) -> Tensor | None:
        """After backward and before clipping; all ranks call this together.

        Returns:
            How uneven the experts' load is, if biases are moved: the largest over the mean.
        """
        for parameter in self.model.parameters():
            grad = parameter.grad
            if isinstance(grad, DTensor) and grad.placements != parameter.placements:
                # Tensor parallelism leaves the embedding's gradient whole on every rank.
                parameter.grad = grad.redistribute(placements=parameter.placements)
        sum_replica_gradients(
            self.model.named_parameters(),
            self._rows,
            self._num_holders,
            group=self.ranks.experts,
        )
        if self._kept is not None:
            self._kept.hold()
        return None if self._balancing is None else self._balancing.update(self.ranks.data)

    def clip(self, value: float, algorithm: str) -> Tensor | None:
        """Clip the gradients.

        Args:
            value: The largest norm, or the largest absolute value.
            algorithm: ``norm`` or ``value``.

        Returns:
            The norm before clipping; None if values are clipped.
        """
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if algorithm == "value":
            clip_by_value(trained, max_value=value)
            return None
        held = held_parameters(
            self.model.named_parameters(),
            world_size=self.ranks.world.size,
            ep_size=self.ranks.ep_size,
            rows=self._rows,
            num_holders=self._num_holders,
        )
        norm = gradient_norm(held, world=self.ranks.world)
        clip_by_norm(trained, max_norm=value, norm=norm)
        return norm
