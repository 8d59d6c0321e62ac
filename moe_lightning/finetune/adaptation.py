"""Adaptation: what a run changes of a checkpoint's model while it is loaded."""

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from moe_lightning.finetune.adapter_values import initialise_adapters
from moe_lightning.finetune.lora import LoRA, add_adapters
from moe_lightning.finetune.trainable import Trainable, freeze_others
from moe_lightning.modeling.expert_rows import ExpertRows


class Adaptation:
    """Adds adapters, and freezes what does not train.

        on meta: add ──▶ sharded ──▶ fill ──▶ the checkpoint's tensors are read ──▶ finish

    Args:
        lora: The adapters; None for none.
        trainable: What trains; None leaves everything as it is, for inference.

    Attributes:
        chosen: The experts of each layer that train; None if all do. Known after ``add``.
    """

    def __init__(self, lora: LoRA | None, trainable: Trainable | None) -> None:
        self.lora = lora
        self.trainable = trainable
        self.chosen: Mapping[int, tuple[int, ...]] | None = None
        self._names: set[str] = set()

    @property
    def has_adapters(self) -> bool:
        """Whether adapters are added."""
        return self.lora is not None

    def add(self, model: PreTrainedModel, num_experts: Mapping[int, int]) -> None:
        """Add adapters and freeze, before the model is sharded.

        Args:
            model: The model on meta, its MoE layers cut down to the experts of this rank.
            num_experts: Logical experts of each layer of the whole model.

        Raises:
            UsageError: If nothing is left to train, or what is named does not exist.
        """
        if self.lora is not None:
            add_adapters(model, self.lora)
        if self.trainable is not None:
            self.chosen = freeze_others(model, self.trainable, num_experts)
        self._names = {name for name, p in model.named_parameters() if p.requires_grad}

    def fill(
        self, model: PreTrainedModel, rows: Mapping[str, ExpertRows], *, device: torch.device
    ) -> None:
        """Give adapters their first values.

        Args:
            model: The model on meta, sharded.
            rows: Which experts the rows of its parameters are.
            device: Where adapters go.

        Raises:
            CheckpointError: If an adapter to start from cannot be read or does not fit.
        """
        if self.lora is not None:
            initialise_adapters(model, self.lora, rows, device=device)

    def finish(self, model: PreTrainedModel) -> None:
        """Freeze again what loading has made anew."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self._names and parameter.is_floating_point())
