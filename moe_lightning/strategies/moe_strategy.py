"""MoEStrategy: what the strategies of this package have in common."""

from abc import abstractmethod
from collections.abc import Hashable
from typing import Any, ClassVar

from lightning.pytorch.strategies import Strategy

from moe_lightning.modeling.checkpoint import CheckpointView
from moe_lightning.strategies.hosting import HostedModel, HostingOptions


class MoEStrategy(Strategy):
    """A Lightning strategy that decides where a model's experts are.

    Attributes:
        strategy_name: What ``--trainer.strategy`` calls it.
    """

    strategy_name: ClassVar[str]

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
