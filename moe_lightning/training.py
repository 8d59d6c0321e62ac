"""TrainingHooks: the half of MoELightningModule that Lightning calls in fit and validate."""

from functools import cached_property

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel
from typing_extensions import override

from moe_lightning.collectives import RankGroup, SharingRanks
from moe_lightning.errors import UsageError
from moe_lightning.finetune.adaptation import Adaptation
from moe_lightning.finetune.fine_tuning import FineTuning, RouterBalance
from moe_lightning.finetune.losses import language_model_losses
from moe_lightning.strategies import HostedModel


class TrainingHooks(L.LightningModule):
    """Trains a hosted model.

    Attributes:
        model: This rank's share of the model, once it is loaded.
        hosted: The same, and what is known of it.
        router_balance: What keeps routers balanced.
        optimizer_factory: Makes the optimizer.
        lr_scheduler_factory: Makes its schedule; None for none.
    """

    model: PreTrainedModel | None
    hosted: HostedModel | None
    router_balance: RouterBalance
    optimizer_factory: OptimizerCallable
    lr_scheduler_factory: LRSchedulerCallable | None
    _adaptation: Adaptation | None

    @override
    def on_fit_start(self) -> None:
        assert self.model is not None, "configure_model has not run"
        assert self.hosted is not None, "it comes with the model"
        self.hosted.has_own_weights = True
        self.model.train()  # checkpoints load in eval mode, and Lightning leaves modes alone

    @cached_property
    def fine_tuning(self) -> FineTuning:
        """The steps of a fit of the hosted model."""
        assert self.hosted is not None, "configure_model has not run"
        hosted = self.hosted
        return FineTuning(
            hosted.model,
            self.router_balance,
            ranks=self._ranks(),
            rows=hosted.rows,
            num_holders=hosted.num_holders(),
            chosen=None if self._adaptation is None else self._adaptation.chosen,
        )

    def _ranks(self) -> SharingRanks:
        """The ranks that have different rows; those of Lightning's ddp have whole models."""
        assert self.hosted is not None, "configure_model has not run"
        trainer = self._trainer
        if (
            trainer is not None
            and trainer.world_size > 1
            and isinstance(trainer.strategy, DDPStrategy)
        ):
            return SharingRanks(data=RankGroup(torch.distributed.group.WORLD))
        return self.hosted.ranks

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Next-token loss, plus what keeps the routers balanced.

        Args:
            batch: ``input_ids``, ``labels`` (-100: no loss), ``position_ids`` and optionally
                ``attention_mask``, each ``[B, S]``.
            batch_idx: Number of the batch.

        Returns:
            The loss, of which the mean over the data ranks is that of all their rows.
        """
        losses = self.fine_tuning.losses(batch)
        self.log("train_loss", losses.next_token, prog_bar=True)
        if losses.aux is not None:
            self.log("train_aux_loss", losses.aux)
        if losses.z is not None:
            self.log("train_z_loss", losses.z)
        return losses.share

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        imbalance = self.fine_tuning.finish_gradients()
        if imbalance is not None:
            self.log("train_imbalance", imbalance)

    @override
    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if gradient_clip_val is None:
            return
        norm = self.fine_tuning.clip(gradient_clip_val, gradient_clip_algorithm or "norm")
        if norm is not None:
            self.log("grad_norm", norm)

    @override
    def validation_step(
        self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Next-token loss of held-out text, weighted by tokens.

        Args:
            batch: As for training.
            batch_idx: Number of the batch.
            dataloader_idx: Number of the dataloader.
        """
        # A batch without targets (padding of a rank with less data) weighs nothing, but every rank
        # takes part in the forward and in the sum.
        assert self.model is not None, "configure_model has not run"
        losses = language_model_losses(self.model, batch, ranks=self._ranks().data)
        num_targets = int(losses.num_targets)
        self.log("val_loss", losses.next_token, prog_bar=True, batch_size=num_targets)

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer and schedule over the parameters that train."""
        try:
            optimizer = self.optimizer_factory(self.fine_tuning.parameter_groups())
        except (ValueError, TypeError) as error:
            raise UsageError(f"--model.optimizer: {error}.") from error
        self.fine_tuning.watch(optimizer)
        if self.lr_scheduler_factory is None:
            return optimizer
        try:
            scheduler = self.lr_scheduler_factory(optimizer)
        except (ValueError, TypeError) as error:
            raise UsageError(f"--model.lr_scheduler: {error}.") from error
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }
