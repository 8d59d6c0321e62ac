"""CommunicationTime: where the time of MoE layers goes, and who is waited for."""

import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from typing_extensions import override

from moe_lightning.callbacks.chrome_trace import TraceEvents, write_trace
from moe_lightning.callbacks.communication_picture import draw_communication
from moe_lightning.callbacks.communication_summary import NUMBERS, CommunicationSummary
from moe_lightning.callbacks.communication_times import CommunicationTimes, matrix_of
from moe_lightning.callbacks.link_rate import probe_link
from moe_lightning.callbacks.pass_watch import PassWatch
from moe_lightning.dispatch import LayerTrace
from moe_lightning.errors import UsageError
from moe_lightning.files import write_atomically
from moe_lightning.modeling.sharding_times import ShardingWatch


class CommunicationTime(PassWatch):
    """Times the four parts of every MoE layer in predict and fit, and writes
    ``communication_time.json``, ``communication_time.png`` and ``communication_trace.json``.

    Dispatch: rows are sent on their way to their experts' slots. Compute: this process's own
    experts. Wait: it stands still for other slots. Combine: their sums are added up. In fit these
    are the forwards' parts; FSDP's gathers and reductions are those of forward and backward. On a
    GPU times are those of its stream, by events that nothing waits for; that has not been run on
    one yet.

    Args:
        output_dir: Where the files go. The default is the trainer's ``default_root_dir``.
        trace_batches: Batches, from the first one on, whose passes go into
            ``communication_trace.json``, for Perfetto; 0 writes none.
        link_gb_per_s: What a slot's link can do, in GB/s, to report the achieved fraction of it.
            The default tries it when the run starts, but for workers on other machines.
        every_n_batches: Batches of an interval of predict, after which loggers get this rank's
            seconds. An interval of fit is the trainer's ``log_every_n_steps`` batches.
        picture: Whether to draw the picture. The default is to.

    Attributes:
        summary: After a run, on the first rank, where the time went.
    """

    wants_times: ClassVar[bool] = True

    def __init__(
        self,
        output_dir: str | None = None,
        *,
        trace_batches: int = 2,
        link_gb_per_s: float | None = None,
        every_n_batches: int = 50,
        picture: bool = True,
    ) -> None:
        super().__init__(output_dir, every_n_batches=every_n_batches)
        if trace_batches < 0:
            raise UsageError(f"trace_batches={trace_batches}, but it must be 0 or more.")
        if link_gb_per_s is not None and not link_gb_per_s > 0:
            raise UsageError(f"link_gb_per_s={link_gb_per_s}, but it must be above 0.")
        self.trace_batches = trace_batches
        self.link_gb_per_s = link_gb_per_s
        self.picture = picture
        self.summary: CommunicationSummary | None = None
        self._times = CommunicationTimes()
        self._events = TraceEvents(0)
        self._sharding: ShardingWatch | None = None
        self._layers: tuple[int, ...] = ()
        self._link: float | None = None
        self._started_s = 0.0
        self._num_batches = 0

    @override
    def start(self, trainer: Trainer, module: Any) -> None:
        self.summary, self._num_batches = None, 0
        self._layers = tuple(module.hosted.num_holders())
        self._events = TraceEvents(trainer.global_rank)
        self._times = CommunicationTimes(self._events.add if self.trace_batches else None)
        self._link = self.link_gb_per_s and self.link_gb_per_s * 1e9
        if self._link is None:
            self._link = probe_link(trainer)
        self._sharding = ShardingWatch(module.model)
        self._sharding.begin()
        self._started_s = time.monotonic()

    @override
    def see(self, trace: LayerTrace) -> None:
        self._times.add(trace)

    @override
    def end_batch(self, trainer: Trainer, num_batches: int, *, ends_interval: bool) -> None:
        self._times.read()
        self._num_batches += 1
        if self._num_batches >= self.trace_batches or self._events.is_full:
            self._times.on_trace = None
        if ends_interval and trainer.loggers and trainer.is_global_zero:
            step = trainer.global_step if trainer.training else num_batches
            self.tell_loggers(trainer, self._own_summary().scalars(), step)

    @override
    def stop(self) -> None:
        super().stop()
        if self._sharding is not None:
            self._sharding.end()

    @override
    def finish(self, trainer: Trainer) -> None:
        wall_s = time.monotonic() - self._started_s
        self._times.read()
        events = self._events.events
        if trainer.world_size == 1:
            self.summary = self._own_summary(wall_s)
        else:
            self.summary = self._summary_of_ranks(trainer, wall_s)
            every: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(every, events)
            events = [event for of_rank in every for event in of_rank]
        if not trainer.is_global_zero:
            return
        directory = self.directory(trainer)
        self.tell_loggers(trainer, self.summary.scalars(), trainer.global_step)
        write_atomically(directory / "communication_time.json", self.summary.to_json())
        if self.trace_batches:
            write_trace(directory / "communication_trace.json", events)

    @override
    def show(self, directory: Path) -> None:
        assert self.summary is not None, "the run has finished"
        if self.picture and self.summary.layers:
            draw_communication(directory / "communication_time.png", self.summary)
        print(self.summary.table(), file=sys.stderr)

    def _own_summary(self, wall_s: float | None = None) -> CommunicationSummary:
        if wall_s is None:
            wall_s = time.monotonic() - self._started_s
        return CommunicationSummary.of_process(
            self._times, wall_s=wall_s, link_bytes_per_s=self._link
        )

    def _summary_of_ranks(self, trainer: Trainer, wall_s: float) -> CommunicationSummary:
        world, rank, times = trainer.world_size, trainer.global_rank, self._times
        names = [f"rank {number}" for number in range(world)]
        num_layers, num_numbers = len(self._layers), len(NUMBERS)
        # All in one tensor, each rank's numbers in its own row: the sum brings them together.
        own = [getattr(times.layers[n], name) for n in self._layers for name in NUMBERS]
        own += [float(number) for row in matrix_of(times.links, names) for number in row]
        own.append(sum(times.under_way_s.values()))
        assert self._sharding is not None, "the run has started"
        sharding = self._sharding.read()
        own += [sharding.gather_s, sharding.gather_bytes, sharding.reduce_s, sharding.reduce_bytes]
        numbers_WN = torch.zeros(world, len(own), dtype=torch.float64)
        numbers_WN[rank] = torch.tensor(own, dtype=torch.float64)
        device = trainer.strategy.root_device
        every_WN = torch.as_tensor(
            trainer.strategy.reduce(numbers_WN.to(device), reduce_op="sum")
        ).cpu()
        layers_WN, links_WN, under_way_W1, sharding_W4 = torch.split(
            every_WN, [num_layers * num_numbers, world * world, 1, 4], dim=1
        )
        return CommunicationSummary.of_ranks(
            layers_WN.view(world, num_layers, num_numbers),
            links_WN.view(world, world, world),
            under_way_W1.view(-1),
            self._layers,
            wall_s=wall_s,
            link_bytes_per_s=self._link,
            sharding=_as_sharding(sharding_W4.mean(0).tolist(), on_gpu=device.type == "cuda"),
        )


def _as_sharding(means: list[float], *, on_gpu: bool) -> dict[str, Any] | None:
    gather_s, gather_bytes, reduce_s, reduce_bytes = means
    if not gather_bytes and not reduce_bytes:
        return None
    return {
        "gather_s": round(gather_s, 6),
        "gather_bytes": int(gather_bytes),
        "reduce_s": round(reduce_s, 6),
        "reduce_bytes": int(reduce_bytes),
        # On the host nothing else runs meanwhile. A GPU's stream does not say who waits for it.
        "exposed_s": None if on_gpu else round(gather_s + reduce_s, 6),
    }
