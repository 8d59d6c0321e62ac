"""How long FSDP2 gathers weights and reduces gradients, and how many bytes that takes.

Each group of parameters has an object that makes its collectives; while somebody looks, one that
times stands in front of it. Private names of torch used here, as of 2.13: ``_get_fsdp_state``,
``_fsdp_param_groups``, ``_all_gather_comm`` and ``_reduce_scatter_comm``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from moe_lightning.dispatch.timeline import Mark, Timeline


@dataclass(slots=True)
class ShardingTimes:
    """What sharding has cost on this rank.

    Attributes:
        gather_s: Seconds of gathers; on a GPU those of its stream.
        gather_bytes: Bytes that came from other ranks.
        reduce_s: Seconds of reductions of gradients.
        reduce_bytes: Bytes that went to other ranks.
    """

    gather_s: float = 0.0
    gather_bytes: int = 0
    reduce_s: float = 0.0
    reduce_bytes: int = 0


class ShardingWatch:
    """Times the collectives of a model's FSDP2 groups.

    Args:
        model: The model; nothing is timed if it is not sharded.
    """

    def __init__(self, model: nn.Module) -> None:
        self._groups: list[Any] = [
            group
            for module in model.modules()
            if isinstance(module, FSDPModule)
            for group in module._get_fsdp_state()._fsdp_param_groups
        ]
        self._timeline = Timeline()
        self._times = ShardingTimes()
        self._pending: list[tuple[str, torch.device, Mark, Mark]] = []

    @property
    def is_sharded(self) -> bool:
        """Whether there is anything to time."""
        return bool(self._groups)

    def begin(self) -> None:
        """Look from now on."""
        for group in self._groups:
            group._all_gather_comm = _Timed(group._all_gather_comm, self, "gather")
            group._reduce_scatter_comm = _Timed(group._reduce_scatter_comm, self, "reduce")

    def end(self) -> None:
        """Look no longer."""
        for group in self._groups:
            for name in ("_all_gather_comm", "_reduce_scatter_comm"):
                comm = getattr(group, name)
                if isinstance(comm, _Timed):
                    setattr(group, name, comm.comm)

    def read(self) -> ShardingTimes:
        """What there has been so far; the work must have been done, or it is waited for."""
        for kind, device, start, end in self._pending:
            seconds = self._timeline.seconds(end, device) - self._timeline.seconds(start, device)
            if kind == "gather":
                self._times.gather_s += seconds
            else:
                self._times.reduce_s += seconds
        self._pending.clear()
        return self._times

    @contextmanager
    def timing(self, kind: str, device: torch.device, num_bytes: int) -> Iterator[None]:
        """Time one collective."""
        if kind == "gather":
            self._times.gather_bytes += num_bytes
        else:
            self._times.reduce_bytes += num_bytes
        start = self._timeline.mark(device)
        yield
        self._pending.append((kind, device, start, self._timeline.mark(device)))
        if len(self._pending) > 4096:
            self.read()


class _Timed:
    """A group's collective with a clock; everything else is asked of the one behind it."""

    def __init__(self, comm: Any, watch: ShardingWatch, kind: str) -> None:
        self.comm = comm
        self._watch = watch
        self._kind = kind

    def __getattr__(self, name: str) -> Any:
        return getattr(self.comm, name)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        **others: Any,
    ) -> Any:
        whole = output_tensor if self._kind == "gather" else input_tensor
        away = whole.nbytes * (group.size() - 1) // group.size()
        with self._watch.timing(self._kind, whole.device, away):
            return self.comm(
                output_tensor=output_tensor, input_tensor=input_tensor, group=group, **others
            )
