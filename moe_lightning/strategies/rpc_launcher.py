"""RPCLauncher: makes rank 0 the master and the other ranks workers, under torchrun and SLURM.

rank 0       ──▶ the trainer's function
other ranks  ──▶ serve experts until rank 0 is done with that ──▶ no rows
"""

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers.launcher import _Launcher
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from typing_extensions import override

from moe_lightning.errors import UsageError, WorkersLostError
from moe_lightning.transport import addresses
from moe_lightning.workers.joining import World, world_from_environment
from moe_lightning.workers.worker import WorkerOptions, serve_experts

if TYPE_CHECKING:
    from moe_lightning.strategies.rpc_strategy import RPCStrategy

LOOK_S = 1.0  # between looks whether rank 0 is done


class RPCLauncher(_Launcher):
    """Runs what a trainer is called for where it belongs. Lightning 2.6.6's private interface.

    Args:
        strategy: Its options.
    """

    def __init__(self, strategy: "RPCStrategy") -> None:
        self._strategy = strategy
        world = world_from_environment()
        if world is not None:
            rank_zero_only.rank = world.rank  # type: ignore[attr-defined]

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
        """Run the function on the master; serve experts elsewhere.

        Args:
            function: What the trainer runs.
            *args: Its arguments, the module first.
            trainer: The trainer.
            **kwargs: More of its arguments.

        Returns:
            What the function returns; an empty list on ranks that served.

        Raises:
            UsageError: On all ranks, if this is not what the strategy is for or its options do not
                go with the launcher; nothing has begun then.
            WorkersLostError: On a worker, if the master is gone.
        """
        assert trainer is not None, "Lightning's trainer comes along"
        if trainer.state.fn == TrainerFn.FITTING:
            raise UsageError(
                "the strategy moe_rpc is for inference and does not train. For fit, use "
                "--trainer.strategy auto, or ddp."
            )
        world = world_from_environment()
        if world is None:
            return function(*args, **kwargs)
        self._check_options(world)
        checkpoint = _checkpoint_of(trainer)
        world.begin(self._strategy.join_timeout_s)
        if world.rank == 0:
            try:
                return function(*args, **kwargs)
            finally:
                world.end()
        self._serve(world, checkpoint)
        trainer.state.status = TrainerStatus.FINISHED
        trainer.state.stage = None
        return []

    @override
    def kill(self, signum: Any) -> None:
        """Nothing was started here."""

    def _check_options(self, world: World) -> None:
        strategy = self._strategy
        ranks = f"ranks 1 to {world.size - 1} of {world.place.launcher} are the workers"
        if strategy.workers is not None:
            raise UsageError(
                f"trainer.strategy.workers names workers, but {ranks}. Leave it out, or start the "
                "command as one process."
            )
        if strategy.num_workers not in (None, world.size - 1):
            raise UsageError(
                f"trainer.strategy.num_workers={strategy.num_workers}, but {ranks}. Leave it out."
            )

    def _serve(self, world: World, checkpoint: str) -> None:
        """Serve experts until rank 0 is done with this launch, or gone."""
        next_look_s = 0.0

        def is_wanted() -> bool:
            nonlocal next_look_s
            if time.monotonic() < next_look_s:
                return True
            next_look_s = time.monotonic() + LOOK_S
            return not world.is_over()

        try:
            code = serve_experts(
                self._options(world, checkpoint),
                on_listening=lambda address: world.publish(_seen(address, world)),
                is_wanted=is_wanted,
            )
        except KeyboardInterrupt:  # whoever tells a worker to leave has reasons, and it has no rows
            sys.exit(0)
        except Exception as error:
            world.publish_failure(str(error))
            raise
        if code and not world.is_over():
            raise WorkersLostError(
                f"rank {world.rank}: the master, rank 0, has been silent for "
                f"{self._strategy.timeout_s:.0f} s. The same command continues."
            )

    def _options(self, world: World, checkpoint: str) -> WorkerOptions:
        strategy = self._strategy
        insecure = strategy.insecure_network and strategy.transport == "tensorpipe"
        listen = _listen_address(strategy.listen, world)
        addresses.check_address(
            listen,
            option="trainer.strategy.listen",
            keys=strategy.keys is not None,
            insecure=insecure,
        )
        return WorkerOptions(
            checkpoint,
            listen=listen,
            keys=None if strategy.keys is None else str(strategy.keys),
            device=_device(strategy.root_device, world),
            threads=strategy.threads,
            insecure_network=insecure,
            ends_with_master=True,
        )


def _device(of_trainer: torch.device, world: World) -> str:
    """This rank's own GPU, if the trainer would use one: SLURM sets no LOCAL_RANK."""
    if of_trainer.type != "cuda":
        return of_trainer.type
    return f"cuda:{world.place.local_rank % torch.cuda.device_count()}"


def _checkpoint_of(trainer: Trainer) -> str:
    checkpoint = getattr(trainer.lightning_module, "checkpoint", None)
    if not isinstance(checkpoint, str):
        raise UsageError(
            f"{type(trainer.lightning_module).__name__} has no checkpoint that workers could read. "
            "The strategy moe_rpc runs MoELightningModule and what is derived from it."
        )
    return checkpoint


def _listen_address(listen: str | None, world: World) -> str:
    """Where this rank listens: a port of its own for each rank of a machine, each taking two."""
    if listen is None:
        return addresses.join(world.own_host(), 0)
    host, port = addresses.split(listen, option="trainer.strategy.listen")
    return addresses.join(host, port + 2 * world.place.local_rank if port else 0)


def _seen(address: str, world: World) -> str:
    """The address by which the master reaches a worker that may listen on all interfaces."""
    host, port = addresses.split(address)
    return addresses.join(world.own_host(), port) if host in ("0.0.0.0", "::", "*") else address
