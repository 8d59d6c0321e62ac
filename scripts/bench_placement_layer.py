"""One layer without a model around it: what dispatchers and their planning cost.

random rows ─┬─▶ LocalDispatcher ──────────────┐
             ├─▶ PlacedDispatcher, one slot ───┤ the same weights
             ├─▶ the same, but it has to plan ─┘
             └─▶ PlacedDispatcher of each contestant with several slots
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from bench_experts_layers import Layer, draw_experts
from bench_placement_clock import Times, race, seconds_of
from bench_placement_contestants import LOCAL, ONE_SLOT, Contestant, check_same
from bench_placement_limit import Rows
from torch import Tensor

from moe_lightning.dispatch import PlacedDispatcher, RoutingLog, make_slots
from moe_lightning.dispatch.plan import LayerRoutes
from moe_lightning.experts import ExpertShard
from moe_lightning.placement import make_placement

PLANNED = "1 slot, planned"
PLANNED_SLOTS = (2, 4)


@dataclass(frozen=True)
class LayerPoint:
    """All dispatchers of one layer at one number of rows.

    Attributes:
        tokens: Rows.
        times: Times of each dispatcher.
        overhead: What each of the dispatchers with the local one's weights takes more than it.
    """

    tokens: int
    times: dict[str, Times]
    overhead: dict[str, float]


@dataclass(frozen=True)
class Plan:
    """What planning alone costs (LayerRoutes.shares).

    Attributes:
        tokens: Rows.
        slots: Slots.
        replicas: Extra copies of experts.
        min_us: The least time.
        median_us: The median.
        of_local: The least time over the local dispatcher's, which computes.
    """

    tokens: int
    slots: int
    replicas: int
    min_us: float
    median_us: float
    of_local: float


class _Renumbered:
    """A shard that says to hold its experts in another order: it has to be planned for."""

    def __init__(self, shard: ExpertShard) -> None:
        self.expert_ids = (*shard.expert_ids[1:], shard.expert_ids[0])
        self.compute = shard.compute


def measure_layer(
    contestants: Sequence[Contestant],
    sizes: Layer,
    tokens: Sequence[int],
    *,
    threads: int,
    seconds: float,
    dtype: torch.dtype,
    tolerance: float,
    generator: torch.Generator,
) -> list[LayerPoint]:
    """Compare the dispatchers of the first MoE layer.

    Args:
        contestants: The local one, and those with several slots.
        sizes: Sizes of the layer.
        tokens: Numbers of rows.
        threads: Threads of a slot on the CPU.
        seconds: How long each number of rows is measured.
        dtype: Dtype of the rows.
        tolerance: How far the answers may be apart, relative to the largest value.
        generator: Source of the draws.

    Returns:
        One point for each number of rows.

    Raises:
        UsageError: If two dispatchers do not give the same answer.
    """
    devices = [device for contestant in contestants for device in contestant.devices]
    home = devices[0]
    dispatchers: dict[str, Any] = {c.name: next(iter(c.dispatchers.values())) for c in contestants}
    shard = cast(ExpertShard, dispatchers[LOCAL].shard)
    make = partial(
        PlacedDispatcher,
        slots=make_slots([home], num_threads=threads),
        num_experts=sizes.num_experts,
        layer=shard.layer,
        log=RoutingLog(),
    )
    dispatchers[ONE_SLOT] = make({0: shard})
    dispatchers[PLANNED] = make(cast(dict[int, ExpertShard], {0: _Renumbered(shard)}))
    points = []
    for num_tokens in tokens:
        rows = Rows.draw(sizes, num_tokens, device=home, dtype=dtype, generator=generator)
        calls: dict[str, Callable[[], Tensor]] = {}
        for name, dispatcher in dispatchers.items():
            # The same weights under the numbers that the renumbered shard gives them.
            index_TK = (rows.index_TK + (name == PLANNED)) % sizes.num_experts
            calls[name] = partial(dispatcher, rows.hidden_TD, index_TK, rows.weights_TK)
        check_same(f"layer of {num_tokens} rows", {n: c() for n, c in calls.items()}, tolerance)
        times_s = race(
            {name: partial(seconds_of, call, devices) for name, call in calls.items()},
            seconds=seconds,
            title=f"layer, T = {num_tokens}",
        )
        times = {name: Times.of(times_s[name]) for name in dispatchers}
        overhead = {
            name: times[name].min_ms / times[LOCAL].min_ms - 1 for name in (ONE_SLOT, PLANNED)
        }
        points.append(LayerPoint(num_tokens, times, overhead))
    return points


def measure_plans(
    sizes: Layer,
    points: Sequence[LayerPoint],
    *,
    device: torch.device,
    replicas: int,
    seconds: float,
    generator: torch.Generator,
) -> list[Plan]:
    """Time the planning of a layer with 2 and 4 slots, without and with replicas.

    Args:
        sizes: Sizes of the layer.
        points: The layer's times at each number of rows.
        device: Device of the rows.
        replicas: Extra copies of experts where there are any.
        seconds: How long each number of rows is measured.
        generator: Source of the draws.

    Returns:
        One result for each number of rows and each placement.
    """
    plans = []
    kinds = [(slots, extra) for slots in PLANNED_SLOTS for extra in sorted({0, replicas})]
    for point in points:
        index_TK = draw_experts(sizes, point.tokens, "zipf", generator).to(device)
        weights_TK = torch.ones(index_TK.shape, device=device)
        loads = index_TK.reshape(-1).bincount(minlength=sizes.num_experts).tolist()
        calls: dict[str, Callable[[], Any]] = {}
        for slots, extra in kinds:
            placement = make_placement(
                "balanced", {0: sizes.num_experts}, slots, loads={0: loads}, num_replicas=extra
            )
            held = {slot: placement.experts_by_layer(slot)[0] for slot in range(slots)}
            routes = LayerRoutes(
                sizes.num_experts,
                {slot: experts for slot, experts in held.items() if experts},
                device=device,
            )
            calls[f"{slots}+{extra}"] = partial(routes.shares, index_TK, weights_TK)
        times_s = race(
            {name: partial(seconds_of, call, [device]) for name, call in calls.items()},
            seconds=seconds,
            title=f"planning, T = {point.tokens}",
        )
        for slots, extra in kinds:
            times = Times.of(times_s[f"{slots}+{extra}"])
            plans.append(
                Plan(
                    tokens=point.tokens,
                    slots=slots,
                    replicas=extra,
                    min_us=1e3 * times.min_ms,
                    median_us=1e3 * times.median_ms,
                    of_local=times.min_ms / point.times[LOCAL].min_ms,
                )
            )
    return plans
