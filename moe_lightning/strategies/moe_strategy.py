"""MoEStrategy: what the strategies of this package have in common."""

from abc import abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.strategies import Strategy

from moe_lightning.modeling.checkpoint import CheckpointView
from moe_lightning.strategies.hosting import HostedModel, HostingOptions


class MoEStrategy(Strategy):
    """A Lightning strategy that decides where a model's experts are.

    Attributes:
        strategy_name: What ``--trainer.strategy`` calls it.
    """

    strategy_name: ClassVar[str]

    @staticmethod
    def select(
        checkpoint: str,
        *,
        training: bool = False,
        devices: Sequence[torch.device] | None = None,
        num_nodes: int = 1,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        precision: str = "32-true",
        experts_backend: str = "auto",
    ) -> Strategy:
        """The strategy that suits a checkpoint and devices, for ``Trainer(strategy=...)``.

        The same as the name ``moe_auto``, for scripts that want to see or change the strategy.

        Args:
            checkpoint: A Hugging Face directory, a hub id, or ``demo``. Its weights are not read.
            training: Whether the trainer is going to fit.
            devices: The devices of this machine to use; None is every GPU, or the CPU.
            num_nodes: Machines.
            dtype: Precision of the weights, as for the module.
            precision: The trainer's precision.
            experts_backend: How experts are computed in inference.

        Returns:
            A new strategy; why it was chosen is on stderr.

        Raises:
            UsageError: If nothing fits.
            CheckpointError: If the checkpoint cannot be used.
        """
        # It makes the strategies that are derived from this class.
        from moe_lightning.strategies.choosing import select_strategy

        return select_strategy(
            checkpoint,
            training=training,
            devices=devices,
            num_nodes=num_nodes,
            dtype=dtype,
            precision=precision,
            experts_backend=experts_backend,
        )

    def check_ckpt_path(self) -> None:
        """Refuse to start from a training checkpoint, before anything is read, if it cannot.

        Raises:
            UsageError: If the strategy loads no training checkpoints.
        """

    def report(self) -> dict[str, Any]:
        """What ``run.json`` says of the strategy besides its name; a dict of plain values."""
        return {}

    @property
    @abstractmethod
    def hosting_key(self) -> Hashable:
        """What tells the strategy and its options from others, which would place otherwise."""

    @abstractmethod
    def host(self, view: CheckpointView, options: HostingOptions) -> HostedModel:
        """Load a checkpoint and give its experts to dispatchers.

        Args:
            view: The opened checkpoint.
            options: How it is loaded.

        Returns:
            The hosted model.

        Raises:
            UsageError: If the strategy's options do not fit the checkpoint or the machine; nothing
                has been read then.
        """


def hosting_key(strategy: Strategy | None) -> Hashable:
    """The key of any strategy; all that keep a model on one device are alike."""
    return strategy.hosting_key if isinstance(strategy, MoEStrategy) else None
