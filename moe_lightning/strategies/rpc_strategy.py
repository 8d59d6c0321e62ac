"""RPCStrategy: one process runs the model, workers on this or other machines hold the experts.

master: router, attention, dense layers ── rows ──▶ worker 0: experts    worker 1: experts    ...
"""

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from typing_extensions import override

from moe_lightning.dispatch import Interleaver, RemoteDispatcher
from moe_lightning.errors import UsageError
from moe_lightning.experts import ExpertShard
from moe_lightning.modeling.checkpoint import CheckpointView
from moe_lightning.modeling.loading import build_on_meta, load_experts, load_model
from moe_lightning.modeling.seam import MoELayer, attach, find_moe_layers
from moe_lightning.placement import ExpertPlacement
from moe_lightning.strategies.hosting import HostedModel, HostingOptions
from moe_lightning.strategies.one_process import OneProcessStrategy
from moe_lightning.strategies.placing import (
    PlacementOptions,
    PolicyName,
    SlotRoom,
    choose_placement,
)
from moe_lightning.strategies.rpc_launcher import RPCLauncher
from moe_lightning.strategies.rpc_meeting import LOCAL_WORKERS, RPCMeeting
from moe_lightning.strategies.worker_slots import free_by_pool, worker_slots
from moe_lightning.transport.wire import WireDtypeName
from moe_lightning.workers.fleet import Fleet
from moe_lightning.workers.joining import world_from_environment
from moe_lightning.workers.question import WireOptions
from moe_lightning.workers.session import memory_pool

INTERLEAVE_TOKENS = 256


class RPCStrategy(OneProcessStrategy):
    """Expert parallelism by messages: experts on workers, of this machine or others.

    For inference. The router and the dense layers are in this process, the master. Without workers
    it starts some on this machine; under torchrun and SLURM rank 0 is the master and the other
    ranks are workers.

    Args:
        workers: Addresses of workers that were started by hand, such as [tcp://10.0.0.5:7000].
        num_workers: How many workers to start on this machine. The default is 2.
        transport: How rows travel: zmq, or tensorpipe (torch.distributed.rpc), which is slower and
            cannot be secured.
        keys: Directory of the keys that workers beyond this machine need (python -m moe_lightning
            worker --new-keys DIR).
        policy: How experts are given to workers: linear (blocks of equal size), round_robin,
            balanced (by recorded loads), or file. The default is balanced if loads are given, file
            if a file is, and linear otherwise.
        loads: For balanced, the routing_balance.json of an earlier run.
        replicas: For balanced, how many extra copies of busy experts each layer gets. Replicas also
            take over at once when a worker is lost.
        file: For the policy file, a placement as an earlier run wrote it (placement.json).
        experts_on_master: Whether the master holds experts too, as the last slot.
        master_adopts: Whether the master may load the experts of lost workers if no other worker
            has room for them.
        dispatch_dtype: Dtype of rows on their way to workers; working leaves them as they are.
            bfloat16 and float16 halve float32, int8 quarters it with one scale per row.
        combine_dtype: The same for the sums that come back.
        micro_batches: Into how many parts a batch is split, so that one is computed while others
            are on their way. 1 splits nothing.
        timeout_s: After how many seconds of silence a worker is taken for lost.
        join_timeout_s: Longest wait for workers to be there, in seconds.
        threads: CPU threads of the master and of each worker started here. The default divides
            PyTorch's threads among the workers.
        listen: Address that the ranks of torchrun or SLURM listen on. The default is the loopback
            interface if all are on one machine, and the machine's own address otherwise.
        insecure_network: Whether tensorpipe may be used without keys on a private network.
    """

    strategy_name = "moe_rpc"

    def __init__(
        self,
        workers: list[str] | None = None,
        *,
        num_workers: int | None = None,
        transport: Literal["zmq", "tensorpipe"] = "zmq",
        keys: str | Path | None = None,
        policy: PolicyName | None = None,
        loads: str | Path | None = None,
        replicas: int = 0,
        file: str | Path | None = None,
        experts_on_master: bool = False,
        master_adopts: bool = False,
        dispatch_dtype: WireDtypeName = "working",
        combine_dtype: WireDtypeName = "working",
        micro_batches: int = 2,
        timeout_s: float = 15.0,
        join_timeout_s: float = 120.0,
        threads: int | None = None,
        listen: str | None = None,
        insecure_network: bool = False,
    ) -> None:
        super().__init__()
        for name, number in (
            ("num_workers", num_workers),
            ("threads", threads),
            ("micro_batches", micro_batches),
        ):
            if number is not None and number < 1:
                raise UsageError(f"trainer.strategy.{name}={number} must be at least 1.")
        for name, seconds in (("timeout_s", timeout_s), ("join_timeout_s", join_timeout_s)):
            if seconds <= 0:
                raise UsageError(f"trainer.strategy.{name}={seconds} must be more than 0.")
        for name, dtype in (("dispatch", dispatch_dtype), ("combine", combine_dtype)):
            if dtype not in get_args(WireDtypeName):
                raise UsageError(
                    f"trainer.strategy.{name}_dtype={dtype!r} does not exist; choose from "
                    f"{', '.join(get_args(WireDtypeName))}."
                )
        self.workers = workers
        self.num_workers = num_workers
        self.transport = transport
        self.keys = keys
        policy = policy or ("file" if file else "balanced" if loads else "linear")
        self.options = PlacementOptions(policy, loads, replicas, file)
        self.options.check()
        self.experts_on_master = experts_on_master
        self.master_adopts = master_adopts
        self.wire = WireOptions(dispatch_dtype, combine_dtype)
        self.micro_batches = micro_batches
        self.timeout_s = timeout_s
        self.join_timeout_s = join_timeout_s
        self.threads = threads
        self.listen = listen
        self.insecure_network = insecure_network
        self.placement: ExpertPlacement | None = None
        self._meeting = RPCMeeting(self)
        self._threads_before: int | None = None
        self._num_runs = 0

    @property
    @override
    def root_device(self) -> torch.device:
        return (self.parallel_devices or [torch.device("cpu")])[0]

    @property
    @override
    def global_rank(self) -> int:
        # The other ranks of torchrun and SLURM run no model, but scripts ask who they are.
        world = world_from_environment()
        return 0 if world is None else world.rank

    @property
    @override
    def is_global_zero(self) -> bool:
        return self.global_rank == 0

    @override
    def _configure_launcher(self) -> None:
        self._launcher = RPCLauncher(self)

    @property
    def fleet(self) -> Fleet | None:
        """The workers, while a run has them."""
        return self._meeting.fleet

    @override
    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = {"transport": self.transport}
        if self.fleet is not None:
            report |= self.fleet.report()
        if self.wire.errors:
            report["wire_relative_error"] = dict(self.wire.errors)
        return report

    # Loading.

    @property
    @override
    def hosting_key(self) -> Hashable:
        # Workers are given back when a run ends: the next run loads anew.
        return (id(self), self._num_runs)

    @override
    def host(self, view: CheckpointView, options: HostingOptions) -> HostedModel:
        self.check_is_inference(options)
        meta = build_on_meta(view.config, dtype=options.dtype)
        layers = find_moe_layers(meta)
        fleet = self._meeting.meet(view, threads=self._threads())
        here = self.root_device
        offers = [offer for _, offer in sorted(fleet.roster.offers.items())]
        slots = worker_slots(fleet.names, offers, experts_backend=options.experts_backend)
        if self.experts_on_master:
            slots.append(SlotRoom("master", memory_pool(here), here.type, options.experts_backend))
        placement = choose_placement(
            meta,
            slots,
            self.options,
            free_bytes=free_by_pool(offers, here=here),
            home=memory_pool(here),
            more_room="Start more workers, or some that have more memory",
        )
        self.placement = placement

        def add(layer: MoELayer, ids: Sequence[int]) -> None:
            if ids:
                fleet.held_at_home(layer.layer).add(options.make_shard(layer, ids))

        def adopt(experts: Mapping[int, Sequence[int]]) -> None:
            load_experts(
                view,
                device=self.root_device,
                dtype=options.dtype,
                experts=experts,
                on_layer=lambda layer: add(layer, experts[layer.layer]),
            )

        wait = fleet.start_loading(
            placement,
            dtype=options.dtype,
            experts_backend=options.experts_backend,
            expert_bytes=[slot.expert_bytes(layers) for slot in slots],
            load_at_home=adopt if self.master_adopts else None,
        )
        at_home = placement.experts_by_layer(fleet.home)
        model = load_model(
            view,
            device=self.root_device,
            dtype=options.dtype,
            experts=at_home,
            on_layer=lambda layer: add(layer, at_home[layer.layer]),
        )
        wait()
        interleaver = None
        if self.micro_batches > 1:
            interleaver = Interleaver(min_tokens=INTERLEAVE_TOKENS, num_parts=self.micro_batches)
        padding = attach(
            model,
            lambda layer: RemoteDispatcher(
                fleet,
                num_experts=placement.num_experts(layer.layer),
                layer=layer.layer,
                log=options.log,
                interleaver=interleaver,
            ),
        )
        at_home_shards: list[ExpertShard] = [
            shard for layer in placement.layers for shard in fleet.held_at_home(layer).shards
        ]
        return HostedModel(
            model,
            padding,
            at_home_shards,
            is_whole=False,
            interleaver=interleaver,
            placement=placement,
            hosted_by=self.hosting_key,
        )

    # Beginning and end.

    @override
    def setup_environment(self) -> None:
        if "mixed" in str(self.precision_plugin.precision):
            raise UsageError(
                f"--trainer.precision {self.precision_plugin.precision} does not go with moe_rpc: "
                "experts on workers compute in the dtype of the weights. Use --model.dtype."
            )
        super().setup_environment()
        if self.root_device.type == "cpu":
            before = torch.get_num_threads()
            torch.set_num_threads(self._threads())
            self._threads_before = before

    def _threads(self) -> int:
        threads = self._threads_before or torch.get_num_threads()
        starts_none = self.workers is not None or world_from_environment() is not None
        if self.threads is not None or starts_none:
            return self.threads or threads
        return max(1, threads // (self.num_workers or LOCAL_WORKERS))

    @override
    def teardown(self) -> None:
        self._num_runs += 1
        self._meeting.close()
        if self._threads_before is not None:
            torch.set_num_threads(self._threads_before)
            self._threads_before = None
        super().teardown()
