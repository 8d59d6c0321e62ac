"""RoutingCounts: rows of every expert and slot, counted once a batch and not once a layer.

    layer's pass ──▶ its routing is kept ──▶ ... ──▶ end of the batch: one count for all layers

What is kept of a pass are tensors that are there anyway. Nothing is read from their device.
"""

import threading
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from moe_lightning.dispatch import LayerTrace
from moe_lightning.metrics import expert_coactivation

MAX_PENDING = 2**20
"""Pairs that are kept until they are counted: 8 MiB of them."""
MAX_INTERVALS = 128
"""Beyond these, neighbours are put together, and intervals become twice as long."""

Reduce = Callable[[Tensor, Literal["sum", "max"]], Tensor]
"""Brings tensors of all ranks together; every rank gets the result."""


class _Routing(NamedTuple):
    layer: int
    index_TK: Tensor
    slot_TK: Tensor | None
    slots: tuple[str, ...]


class RoutingCounts:
    """Counts of one rank, until they are reduced over all.

    Args:
        num_experts: Logical experts of every MoE layer of the whole model, so that the counts of
            all ranks have the same shape.
        device: Where the routing is.
        num_ranks: Ranks of the run.
        with_pairs: Whether to count experts that were chosen together, E x E numbers a layer.

    Attributes:
        num_experts: As above.
        slots: Names of the slots, the same on all ranks; none while one slot had all experts.
    """

    def __init__(
        self,
        num_experts: Mapping[int, int],
        *,
        device: torch.device,
        num_ranks: int = 1,
        with_pairs: bool = False,
    ) -> None:
        self.num_experts = dict(num_experts)
        self.slots: tuple[str, ...] = ()
        self._num_ranks = num_ranks
        self._starts: dict[int, int] = {}
        size = 0
        for layer, number in self.num_experts.items():
            self._starts[layer] = size
            size += number
        self._now_N = torch.zeros(size, dtype=torch.int64, device=device)
        self._intervals: list[Tensor] = []
        self._calls_per_interval = 1
        self._num_calls = 0
        self._slot_rows_LS: Tensor | None = None
        self._pairs: dict[int, Tensor] = {}
        if with_pairs:
            self._pairs = {
                layer: torch.zeros(number, number, dtype=torch.int64, device=device)
                for layer, number in self.num_experts.items()
            }
        self._pending: list[_Routing] = []
        self._num_pending = 0
        self._lock = threading.Lock()  # the parts of a batch may be in several threads

    def add(self, trace: LayerTrace) -> None:
        """Keep one pass of a layer."""
        with self._lock:
            self._pending.append(_Routing(trace.layer, trace.index_TK, trace.slot_TK, trace.slots))
            self._num_pending += trace.index_TK.numel()
            if self._num_pending >= MAX_PENDING:
                self._count()

    def count(self) -> None:
        """Count what is kept."""
        with self._lock:
            self._count()

    def end_interval(self) -> None:
        """Begin a new interval."""
        self.count()
        self._num_calls += 1
        if self._num_calls % self._calls_per_interval == 0:
            self._close()

    def last_interval(self, reduce: Reduce) -> dict[int, Tensor]:
        """What the interval that ended last had, over all ranks.

        Args:
            reduce: Called once.

        Returns:
            For each layer the rows of each expert, on the host.
        """
        return self._by_layer(reduce(self._intervals[-1], "sum").cpu())

    def finish(self, reduce: Reduce) -> dict[int, Tensor]:
        """Bring the counts of all ranks together; all ranks call this once, at the end.

        Args:
            reduce: As above. Called twice, and once more for each of slots and pairs.

        Returns:
            For each layer rows of each interval and expert, ``[I, E]``, on the host.
        """
        self.count()
        self._close()
        # Ranks may have had different numbers of batches.
        own = [self._calls_per_interval, len(self._intervals), len(self.slots)]
        calls, most, num_slots = reduce(
            torch.tensor(own, device=self._now_N.device), "max"
        ).tolist()
        while self._calls_per_interval < calls:
            self._coarsen()
        self._intervals += [torch.zeros_like(self._now_N)] * (most - len(self._intervals))
        counts_IN = reduce(torch.stack(self._intervals), "sum").cpu()
        has_rows_I = counts_IN.sum(1) > 0
        has_rows_I[0] = True
        if num_slots:
            if self._slot_rows_LS is None:  # a pipeline stage without MoE layers, say
                self._make_slots(_names_over_ranks((), self._num_ranks))
            assert self._slot_rows_LS is not None, "just made"
            self._slot_rows_LS = reduce(self._slot_rows_LS, "sum").cpu()
        self._pairs = {layer: reduce(both, "sum").cpu() for layer, both in self._pairs.items()}
        return self._by_layer(counts_IN[has_rows_I])

    def slot_rows(self) -> dict[int, Tensor]:
        """After the end, for each layer the rows of each slot; none if one slot had all experts."""
        if self._slot_rows_LS is None:
            return {}
        return dict(zip(self.num_experts, self._slot_rows_LS, strict=True))

    def pairs(self) -> dict[int, Tensor]:
        """After the end, for each layer the tokens that had both of two experts, ``[E, E]``."""
        return self._pairs

    def _by_layer(self, counts_XN: Tensor) -> dict[int, Tensor]:
        parts = torch.split(counts_XN, list(self.num_experts.values()), dim=-1)
        return dict(zip(self.num_experts, parts, strict=True))

    def _close(self) -> None:
        self._intervals.append(self._now_N)
        self._now_N = torch.zeros_like(self._now_N)
        if len(self._intervals) > MAX_INTERVALS:
            self._coarsen()

    def _coarsen(self) -> None:
        pairs = zip(self._intervals[::2], self._intervals[1::2], strict=False)
        odd = self._intervals[-1:] if len(self._intervals) % 2 else []
        self._intervals = [first + second for first, second in pairs] + odd
        self._calls_per_interval *= 2

    def _count(self) -> None:
        pending, self._pending, self._num_pending = self._pending, [], 0
        pending = [each for each in pending if each.index_TK.numel()]
        if not pending:
            return
        starts = [self._starts[each.layer] for each in pending]
        _add_up(self._now_N, [each.index_TK for each in pending], starts)
        for layer, both_EE in self._pairs.items():
            chosen = [each.index_TK for each in pending if each.layer == layer]
            for index_TK in chosen:
                both_EE += expert_coactivation(index_TK, len(both_EE))
        placed = [each for each in pending if each.slot_TK is not None]
        if placed:
            self._count_slots(placed)

    def _count_slots(self, placed: list[_Routing]) -> None:
        if self._slot_rows_LS is None:
            self._make_slots(_names_over_ranks(placed[0].slots, self._num_ranks))
        assert self._slot_rows_LS is not None, "just made"
        row_of = {layer: row for row, layer in enumerate(self.num_experts)}
        number_of = {name: number for number, name in enumerate(self.slots)}
        # A rank's slots are those of its own group, which may be other ranks than another's.
        number_S = torch.tensor(
            [number_of[name] for name in placed[0].slots], device=self._now_N.device
        )
        slots = [number_S[each.slot_TK] for each in placed if each.slot_TK is not None]
        starts = [row_of[each.layer] * len(self.slots) for each in placed]
        _add_up(self._slot_rows_LS.view(-1), slots, starts)

    def _make_slots(self, names: tuple[str, ...]) -> None:
        self.slots = names
        self._slot_rows_LS = torch.zeros(
            len(self.num_experts), len(names), dtype=torch.int64, device=self._now_N.device
        )


def _names_over_ranks(slots: tuple[str, ...], num_ranks: int) -> tuple[str, ...]:
    """Slots that are ranks are named over all ranks; others are those of the one process."""
    if num_ranks > 1:
        return tuple(f"rank {rank}" for rank in range(num_ranks))
    return slots


def _add_up(counts_N: Tensor, numbers: list[Tensor], starts: list[int]) -> None:
    """Count numbers, those of each tensor from a start of its own on; one operation for all."""
    lengths = torch.tensor([each.numel() for each in numbers])
    start_N = torch.repeat_interleave(torch.tensor(starts), lengths)
    index_N = torch.cat([each.reshape(-1) for each in numbers])
    index_N = index_N + start_N.to(index_N.device, non_blocking=True)
    counts_N.scatter_add_(0, index_N, torch.ones_like(index_N))
