"""PlacementStrategy: one process, its experts on several devices, all computing at once.

slot 0: router, dense layers, its experts    slot 1: experts    slot 2: experts    ...
"""

from collections.abc import Hashable
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch.accelerators import CUDAAccelerator
from typing_extensions import override

from moe_lightning.devices import free_bytes, parse_devices
from moe_lightning.dispatch import Interleaver, PlacedDispatcher, make_slots
from moe_lightning.errors import UsageError
from moe_lightning.experts import ExpertShard
from moe_lightning.modeling.checkpoint import CheckpointView
from moe_lightning.modeling.loading import build_on_meta, load_experts, load_model
from moe_lightning.modeling.seam import MoELayer, attach
from moe_lightning.placement import ExpertPlacement
from moe_lightning.strategies.hosting import HostedModel, HostingOptions
from moe_lightning.strategies.one_process import OneProcessStrategy
from moe_lightning.strategies.placing import (
    PlacementOptions,
    PolicyName,
    SlotRoom,
    choose_placement,
)

INTERLEAVE_TOKENS = 1024  # below, halves can cost more in small products than they hide


class PlacementStrategy(OneProcessStrategy):
    """Manual placement: every expert on the device that a placement names, in one process.

    For inference. The router and the dense layers are on the first slot.

    Args:
        slots: Devices that hold experts, such as [cuda:0, cuda:1, cpu]; a device may be named
            several times. "auto" is every GPU of the machine, or two slots on the CPU where there
            is none. The default is the trainer's devices.
        policy: How experts are given to slots: linear (blocks of equal size), round_robin,
            balanced (by recorded loads), or file. The default is balanced if loads are given, file
            if a file is, and linear otherwise.
        loads: For balanced, the routing_balance.json of an earlier run, or any JSON file with
            {"loads": {"0": [rows of expert 0, ...], ...}} for every MoE layer.
        replicas: For balanced, how many extra copies of busy experts each layer gets. The default
            is none.
        file: For the policy file, a placement as an earlier run wrote it (placement.json).
        interleave: Whether score and embed compute large batches as two halves in turns, the dense
            layers of one while the rows of the other are with experts on the CPU. The default is
            yes: it was 5 to 30 percent faster.
        threads: Threads of each slot on the CPU. The default divides PyTorch's threads among them.
    """

    strategy_name = "moe_placement"

    def __init__(
        self,
        slots: list[str] | Literal["auto"] | None = None,
        *,
        policy: PolicyName | None = None,
        loads: str | Path | None = None,
        replicas: int = 0,
        file: str | Path | None = None,
        threads: int | None = None,
        interleave: bool = True,
    ) -> None:
        super().__init__()
        if threads is not None and threads < 1:
            raise UsageError(f"trainer.strategy.threads={threads} must be at least 1.")
        if isinstance(slots, str) and slots != "auto":
            raise UsageError(
                f"trainer.strategy.slots={slots!r} is no list of devices: write [{slots}], or auto."
            )
        if slots is not None and not slots:
            raise UsageError("trainer.strategy.slots is empty: name at least one device.")
        self._slot_names = slots
        policy = policy or ("file" if file else "balanced" if loads else "linear")
        self.options = PlacementOptions(policy, loads, replicas, file)
        self.options.check()
        self.threads = threads
        self.interleave = interleave
        self.placement: ExpertPlacement | None = None
        self._threads_before: int | None = None

    # Where everything is.

    @property
    def devices(self) -> list[torch.device]:
        """Device of every slot."""
        if self._slot_names is None:
            return list(self.parallel_devices or [torch.device("cpu")])
        if self._slot_names == "auto":
            gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
            return parse_devices(gpus or ["cpu", "cpu"])
        return parse_devices(self._slot_names)

    @property
    @override
    def root_device(self) -> torch.device:
        return self.devices[0]

    @override
    def setup_environment(self) -> None:
        devices = self.devices
        kind = "cuda" if isinstance(self.accelerator, CUDAAccelerator) else "cpu"
        if devices[0].type != kind:
            raise UsageError(
                f"the first slot, {devices[0]}, holds the router and the dense layers, but "
                f"--trainer.accelerator is for {kind}. Name a {kind} device first, or set "
                f"--trainer.accelerator {'gpu' if devices[0].type == 'cuda' else 'cpu'}."
            )
        super().setup_environment()
        if devices[0].type == "cpu":
            # More threads in the dense layers would stand in the way of the other slots'.
            before = torch.get_num_threads()
            torch.set_num_threads(self._threads_per_slot())
            self._threads_before = before

    def _threads_per_slot(self) -> int:
        threads = self._threads_before or torch.get_num_threads()
        num_on_cpu = sum(device.type == "cpu" for device in self.devices)
        return self.threads or max(1, threads // max(1, num_on_cpu))

    @override
    def teardown(self) -> None:
        if self._threads_before is not None:
            torch.set_num_threads(self._threads_before)
            self._threads_before = None
        super().teardown()

    # Loading.

    @property
    @override
    def hosting_key(self) -> Hashable:
        return (tuple(map(str, self.devices)), self.options, self.threads, self.interleave)

    @override
    def host(self, view: CheckpointView, options: HostingOptions) -> HostedModel:
        self.check_is_inference(options)
        devices = self.devices
        meta = build_on_meta(view.config, dtype=options.dtype)
        placement = choose_placement(
            meta,
            [
                SlotRoom(f"{number}:{device}", str(device), device.type, options.experts_backend)
                for number, device in enumerate(devices)
            ],
            self.options,
            free_bytes={str(device): free_bytes(device) for device in devices},
            home=str(devices[0]),
        )
        self.placement = placement
        shards: dict[int, dict[int, ExpertShard]] = {}
        ids_of = [placement.experts_by_layer(slot) for slot in range(placement.num_slots)]

        def on_layer(layer: MoELayer, slot: int) -> None:
            ids = ids_of[slot][layer.layer]
            if ids:
                of_layer = shards.setdefault(layer.layer, {})
                of_layer[slot] = options.make_shard(layer, ids)

        model = load_model(
            view,
            device=devices[0],
            dtype=options.dtype,
            experts=ids_of[0],
            on_layer=partial(on_layer, slot=0),
        )
        for slot in range(1, len(ids_of)):
            load_experts(
                view,
                device=devices[slot],
                dtype=options.dtype,
                experts=ids_of[slot],
                on_layer=partial(on_layer, slot=slot),
            )
        slots = make_slots(devices, num_threads=self._threads_per_slot())
        interleaver = None
        # Only the host waits for the CPU; GPUs wait for each other by themselves.
        if self.interleave and any(device.type == "cpu" for device in devices[1 : len(ids_of)]):
            interleaver = Interleaver(min_tokens=INTERLEAVE_TOKENS)
        padding = attach(
            model,
            lambda layer: PlacedDispatcher(
                shards[layer.layer],
                slots,
                num_experts=len(placement.slots[layer.layer]),
                layer=layer.layer,
                log=options.log,
                interleaver=interleaver,
            ),
        )
        every = [shard for of_layer in shards.values() for shard in of_layer.values()]
        return HostedModel(
            model,
            padding,
            every,
            is_whole=len(ids_of) == 1,
            interleaver=interleaver,
            placement=placement,
            hosted_by=self.hosting_key,
        )
