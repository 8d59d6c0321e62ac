"""The most that computing on several slots can gain: their experts one by one, and all at once.

    slot 0's experts ── alone ──▶ ms ┐
    slot 1's experts ── alone ──▶ ms ┴─ sum / all at once ──▶ scaling

Each slot has rows of its own that need no expert of another: nothing is planned, picked or added
up. What is lost is lost in the machine: memory bandwidth, caches, clock rates, other programs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from bench_experts_layers import Layer, draw_experts
from bench_placement_clock import Times, seconds_of
from bench_placement_contestants import Contestant
from torch import Tensor

Start = Callable[[], Callable[[], Tensor]]


@dataclass(frozen=True)
class Rows:
    """Random rows of one layer and their routing."""

    hidden_TD: Tensor
    index_TK: Tensor
    weights_TK: Tensor

    @classmethod
    def draw(
        cls,
        sizes: Layer,
        num_tokens: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> "Rows":
        """Draw rows whose experts are spread evenly."""
        hidden_TD = torch.randn(num_tokens, sizes.hidden_size, generator=generator)
        index_TK = draw_experts(sizes, num_tokens, "uniform", generator)
        weights_TK = torch.randn(num_tokens, sizes.top_k, generator=generator).softmax(dim=-1)
        return cls(hidden_TD.to(device, dtype), index_TK.to(device), weights_TK.to(device, dtype))


@dataclass(frozen=True)
class Limit:
    """What the slots of a contestant gain at most.

    Attributes:
        name: The contestant.
        alone: Times of each slot by itself.
        together: Times of all at once.
        scaling: The sum of the least times alone over the least time together.
    """

    name: str
    alone: list[Times]
    together: Times
    scaling: float

    def speedup(self, *, total_ms: float, experts_ms: float) -> float:
        """By how much a forward can gain whose experts gain that much, and the rest nothing."""
        return total_ms / (total_ms - experts_ms + experts_ms / self.scaling)


class LimitProbe:
    """One layer of a contestant with several slots, to be run in turns with whole forwards.

    Args:
        contestant: The contestant.
        sizes: Sizes of the layer.
        num_tokens: Rows of all slots together, spread evenly, each with all its experts on one
            slot.
        dtype: Dtype of the rows.
        generator: Source of the draws.
    """

    def __init__(
        self,
        contestant: Contestant,
        sizes: Layer,
        num_tokens: int,
        *,
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> None:
        self.name = contestant.name
        self._devices = contestant.devices
        dispatcher = next(iter(contestant.dispatchers.values()))
        self._starts: dict[str, Start] = {}
        for number, shard in sorted(dispatcher.shards.items()):
            num_here = len(shard.expert_ids)
            top_k = min(sizes.top_k, num_here)
            local = Layer(sizes.family, sizes.hidden_size, sizes.expert_size, num_here, top_k)
            rows = Rows.draw(
                local,
                -(-num_tokens // len(dispatcher.shards)),
                device=self._devices[0],
                dtype=dtype,
                generator=generator,
            )
            slot = dispatcher.slots[number]
            self._starts[slot.name] = partial(
                slot.start, shard.compute, rows.hidden_TD, rows.index_TK, rows.weights_TK
            )

    @property
    def turns(self) -> dict[str, Callable[[], float]]:
        """What is to be timed, by names that no contestant has."""
        groups = {name: [start] for name, start in self._starts.items()}
        groups["together"] = list(self._starts.values())
        return {
            f"{self.name}: {name}": partial(seconds_of, partial(_run, starts), self._devices)
            for name, starts in groups.items()
        }

    def limit(self, times_s: Mapping[str, Sequence[float]]) -> Limit:
        """Sum up the times of :attr:`turns`."""
        *alone, together = (Times.of(times_s[name]) for name in self.turns)
        scaling = sum(times.min_ms for times in alone) / together.min_ms
        return Limit(self.name, alone, together, scaling)


def _run(starts: Sequence[Start]) -> None:
    for finish in [start() for start in starts]:  # home comes first: it computes in finish
        finish()
