"""RPCMeeting: how a master comes to its workers.

by their addresses ── or as ranks of torchrun or SLURM ── or started here ──▶ roster ──▶ fleet
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from moe_lightning.errors import UsageError
from moe_lightning.modeling.checkpoint import CheckpointView
from moe_lightning.modeling.manifest import manifest_hash
from moe_lightning.transport.addresses import check_address
from moe_lightning.transport.keys import Keys
from moe_lightning.transport.tensorpipe_towards import tensorpipe_towards
from moe_lightning.workers.fleet import Fleet
from moe_lightning.workers.joining import world_from_environment
from moe_lightning.workers.local_processes import LocalWorkers
from moe_lightning.workers.roster import Roster
from moe_lightning.workers.worker import WorkerOptions

if TYPE_CHECKING:
    from moe_lightning.strategies.rpc_strategy import RPCStrategy

LOCAL_WORKERS = 2


class RPCMeeting:
    """The workers of a run, from when they are met until they are given back.

    Args:
        strategy: Its options.

    Attributes:
        fleet: The workers; None before and after.

    Raises:
        UsageError: If the options that say where workers are do not go together.
    """

    def __init__(self, strategy: "RPCStrategy") -> None:
        self._strategy = strategy
        self._insecure = strategy.insecure_network and strategy.transport == "tensorpipe"
        self._local: LocalWorkers | None = None
        self.fleet: Fleet | None = None
        if strategy.workers is not None and strategy.num_workers is not None:
            raise UsageError(
                "trainer.strategy.workers names workers that are there, num_workers starts some: "
                "give one of them."
            )
        if strategy.workers is not None and not strategy.workers:
            raise UsageError("trainer.strategy.workers is empty: name at least one address.")
        if strategy.transport not in ("zmq", "tensorpipe"):
            raise UsageError(
                f"trainer.strategy.transport={strategy.transport!r}: zmq or tensorpipe."
            )
        for address in strategy.workers or ():
            check_address(
                address,
                option="trainer.strategy.workers",
                keys=strategy.keys is not None,
                insecure=self._insecure,
            )

    def meet(self, view: CheckpointView, *, threads: int) -> Fleet:
        """Find the workers, or start them, and wait until all are there.

        Args:
            view: The checkpoint that they must have.
            threads: CPU threads of each worker that is started here.

        Returns:
            The fleet, which holds nothing yet.

        Raises:
            UsageError: If keys or the checkpoints do not match.
            WorkersLostError: If workers do not come.
        """
        strategy = self._strategy
        keys = None if strategy.keys is None else Keys.load(strategy.keys, role="master")
        world = world_from_environment()
        check: Callable[[], None] = lambda: None  # noqa: E731
        if strategy.workers is not None:
            addresses = strategy.workers
        elif world is not None:
            addresses = world.collect(
                strategy.join_timeout_s, keys=strategy.keys is not None, insecure=self._insecure
            )
        else:
            self._local = LocalWorkers(
                [
                    WorkerOptions(str(view.path), device=device, threads=threads)
                    for device in self._local_devices()
                ]
            )
            addresses, check, keys = self._local.addresses, self._local.check, None
        roster = Roster(addresses, keys=keys, timeout_s=strategy.timeout_s)
        fleet = self.fleet = Fleet(roster, wire=strategy.wire, device=strategy.root_device)
        timeout_s = strategy.join_timeout_s
        roster.meet(manifest_hash(view), join_timeout_s=timeout_s, still_starting=check)
        if strategy.transport == "tensorpipe":
            insecure = strategy.insecure_network
            fleet.use(tensorpipe_towards(addresses, insecure_network=insecure, timeout_s=timeout_s))
        return fleet

    def _local_devices(self) -> list[str]:
        num_workers = self._strategy.num_workers or LOCAL_WORKERS
        master = self._strategy.root_device
        if master.type != "cuda":
            return ["cpu"] * num_workers
        # The master's GPU comes last: the router and the dense layers are there.
        own, num_gpus = master.index or 0, torch.cuda.device_count()
        return [f"cuda:{(own + 1 + n) % num_gpus}" for n in range(num_workers)]

    def close(self) -> None:
        """Give the workers back, and end those that were started here."""
        if self.fleet is not None:
            self.fleet.close()
            self.fleet = None
        if self._local is not None:
            self._local.close()
            self._local = None
