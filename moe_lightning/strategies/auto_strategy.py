"""AutoStrategy: stands in for the strategy that suits, until the model is known.

    Trainer(strategy="moe_auto")     .predict(module)
      AutoStrategy ─────────────────▶ AutoLauncher: chooses ──▶ the chosen strategy takes its place

Lightning wants a strategy when a trainer is made, before there is a model. A launcher is the first
that a trainer calls with both, so ours exchanges the strategy there. Private names of Lightning
used here, as of 2.6.6: ``_accelerator_connector`` with ``strategy``, ``_strategy_flag``,
``_parallel_devices``, ``_num_nodes_flag``, ``_validate_precision_choice`` and
``_lazy_init_strategy``; ``_Launcher``, ``_lightning_module``, ``_configure_launcher``.
"""

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.strategies.launchers.launcher import _Launcher
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from moe_lightning.errors import UsageError
from moe_lightning.modeling.checkpoint import CheckpointView
from moe_lightning.strategies.choosing import choose, say_why
from moe_lightning.strategies.hosting import HostedModel, HostingOptions
from moe_lightning.strategies.moe_strategy import MoEStrategy
from moe_lightning.strategies.one_process import OneProcessStrategy
from moe_lightning.strategies.selection import Choice
from moe_lightning.strategies.surroundings import num_launched


class AutoStrategy(OneProcessStrategy):
    """Chooses a strategy by the checkpoint's size, the devices and the ranks, and says why.

    The choice is made when the trainer is first called, and holds for that trainer.
    """

    strategy_name = "moe_auto"

    def __init__(self) -> None:
        super().__init__()
        self.num_nodes = 1  # Lightning sets it to the trainer's

    @property
    @override
    def root_device(self) -> torch.device:
        return (self.parallel_devices or [torch.device("cpu")])[0]

    @property
    @override
    def global_rank(self) -> int:
        return int(rank_zero_only.rank or 0)  # type: ignore[attr-defined]

    @property
    @override
    def is_global_zero(self) -> bool:
        return self.global_rank == 0

    @override
    def check_ckpt_path(self) -> None:
        """The chosen strategy will say."""

    @override
    def _configure_launcher(self) -> None:
        self._launcher = AutoLauncher()

    @property
    @override
    def hosting_key(self) -> Hashable:
        raise AssertionError("the chosen strategy takes its place before a model is loaded")

    @override
    def host(self, view: CheckpointView, options: HostingOptions) -> HostedModel:
        raise AssertionError("the chosen strategy takes its place before a model is loaded")


class AutoLauncher(_Launcher):
    """Puts the chosen strategy into the trainer, and launches with that."""

    @property
    @override
    def is_interactive_compatible(self) -> bool:
        return True

    @override
    def launch(
        self,
        function: Callable[..., Any],
        *args: Any,
        trainer: Trainer | None = None,
        **kwargs: Any,
    ) -> Any:
        """Choose, say why, and run the function as the chosen strategy does.

        Args:
            function: What the trainer runs.
            *args: Its arguments, the module first.
            trainer: The trainer.
            **kwargs: More of its arguments.

        Returns:
            What the function returns.

        Raises:
            UsageError: If nothing fits, or the chosen strategy cannot do what is asked.
        """
        assert trainer is not None, "Lightning's trainer comes along"
        choice = choose_for(trainer)
        say_why(choice)
        strategy = exchange_strategy(trainer, choice)
        if isinstance(strategy, MoEStrategy) and _has_ckpt_path(args, kwargs):
            strategy.check_ckpt_path()
        launcher = strategy.launcher
        if launcher is None:
            return function(*args, **kwargs)
        return launcher.launch(function, *args, trainer=trainer, **kwargs)

    @override
    def kill(self, signum: Any) -> None:
        """Nothing was started here."""


def choose_for(trainer: Trainer) -> Choice:
    """Choose for what a trainer has been called to do.

    Args:
        trainer: The trainer, its module known.

    Returns:
        The choice.

    Raises:
        UsageError: If the module is not this package's, or nothing fits.
        CheckpointError: If the checkpoint cannot be used.
    """
    module: Any = trainer.lightning_module
    view = getattr(module, "view", None)
    if not isinstance(view, CheckpointView):
        raise UsageError(
            f"the strategy moe_auto goes by a checkpoint's size, and {type(module).__name__} has "
            "none. Use it with MoELightningModule, or name a strategy."
        )
    training = trainer.state.fn == TrainerFn.FITTING
    num_nodes = trainer.num_nodes
    if num_nodes > 1 and not training and num_launched() == 1:
        raise UsageError(
            f"--trainer.num_nodes {num_nodes}, but neither torchrun nor SLURM started this "
            "process. For inference on several machines, start the same command on each of them by "
            "one of these."
        )
    return choose(
        view.config,
        _devices(trainer._accelerator_connector),
        training=training,
        num_nodes=num_nodes,
        dtype=module.dtype_name,
        precision=str(trainer.precision),
        experts_backend=module.experts_backend,
        lora_rank=getattr(getattr(module, "lora", None), "rank", None),
    )


def exchange_strategy(trainer: Trainer, choice: Choice) -> Strategy:
    """Put the chosen strategy in the place of the trainer's.

    Args:
        trainer: The trainer.
        choice: The choice.

    Returns:
        The new strategy, which knows all that Lightning tells one when a trainer is made.
    """
    connector: Any = trainer._accelerator_connector
    before = connector.strategy
    if num_launched() > 1:  # the launcher has decided, whatever the trainer was told
        indices = range(choice.cluster.devices_per_node)
        of_rank = [torch.device("cuda", index) for index in indices]
        is_cpu = choice.cluster.kind == "cpu"
        connector._parallel_devices = [torch.device("cpu") for _ in indices] if is_cpu else of_rank
        connector._num_nodes_flag = choice.cluster.num_nodes
    strategy = choice.build(_devices(connector))
    connector.strategy = connector._strategy_flag = strategy
    try:
        connector._validate_precision_choice()
    except ValueError as error:
        raise UsageError(f"moe_auto chose {choice.estimate.label}: {error}") from error
    connector._lazy_init_strategy()
    strategy._lightning_module = before._lightning_module
    return strategy


def _devices(connector: Any) -> list[torch.device]:
    """The devices of the trainer; Lightning's for the CPU are one for each process."""
    return [torch.device(device) for device in connector._parallel_devices]


def _has_ckpt_path(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a checkpoint is among the arguments: the only path or string."""
    return any(isinstance(value, str | Path) for value in (*args, *kwargs.values()))
