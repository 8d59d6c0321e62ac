"""Who takes part in bench_placement.py: one checkpoint, hosted in several ways."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from bench_experts_layers import Layer, RoutingName, draw_experts
from bench_placement_clock import PartClock, progress, seconds_of
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from moe_lightning.devices import parse_devices
from moe_lightning.dispatch import LayerTrace, RoutingLog
from moe_lightning.dispatch.bookkeeping import Part
from moe_lightning.errors import UsageError
from moe_lightning.modeling.checkpoint import CheckpointView, open_checkpoint
from moe_lightning.modeling.runner import ModelRunner
from moe_lightning.modeling.seam import dispatcher_of, find_moe_layers
from moe_lightning.modeling.tokenizer import load_tokenizer
from moe_lightning.strategies import HostingOptions, PlacementStrategy, host_on_one_device

LOCAL, ONE_SLOT = "local", "1 slot"


@dataclass(frozen=True)
class Pass:
    """A forward that everybody computes.

    The experts of its tokens are drawn, not chosen by the router, which runs all the same: the
    router of a random model knows no busy experts, and rounding could make it choose differently
    for two contestants.

    Attributes:
        name: What the report calls it.
        rows: Token ids; all rows have one length.
        index_TK: Experts of each token, for each MoE layer.
    """

    name: str
    rows: list[list[int]]
    index_TK: dict[int, Tensor]

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return sum(map(len, self.rows))


def draw_passes(
    names: Sequence[str],
    sizes: Layer,
    layers: Sequence[int],
    *,
    routing: RoutingName,
    shape: tuple[int, int],
    vocab_size: int,
    device: torch.device,
    generator: torch.Generator,
) -> list[Pass]:
    """Draw passes of one shape whose busy experts are the same.

    Args:
        names: Names of the passes.
        sizes: Sizes of every MoE layer.
        layers: Numbers of the MoE layers.
        routing: How experts are drawn.
        shape: Rows, and tokens of each.
        vocab_size: How many token ids there are.
        device: Where the routing is needed.
        generator: Source of the draws.

    Returns:
        The passes, in the order of the names.
    """
    num_tokens = shape[0] * shape[1]
    # In one draw, since each draw chooses its own busy experts.
    drawn = {
        layer: draw_experts(sizes, num_tokens * len(names), routing, generator).to(device)
        for layer in layers
    }
    passes = []
    for number, name in enumerate(names):
        ids = torch.randint(0, vocab_size, shape, generator=generator).tolist()
        here = slice(number * num_tokens, (number + 1) * num_tokens)
        passes.append(Pass(name, ids, {layer: drawn[layer][here] for layer in layers}))
    return passes


class Forward(NamedTuple):
    """Seconds of one forward, and of the experts' part of it."""

    total_s: float
    experts_s: float


@dataclass(frozen=True)
class SlotParts:
    """Where the time of one slot went in one forward, all layers together.

    On a GPU these are the times in which the work was queued, not those in which it was done.

    Attributes:
        slot: The slot.
        ms: Milliseconds of each part. What a slot waited for is counted at the slot waited for.
        num_bytes: Bytes moved to it and from it.
    """

    slot: str
    ms: dict[Part, float]
    num_bytes: int


class Contestant:
    """One way of hosting the checkpoint.

    Args:
        name: What the report calls it.
        view: The checkpoint.
        tokenizer: Its tokenizer.
        strategy: Where its experts are; None for all of them under LocalDispatchers.
        devices: Device of every slot; the first one is home.
        dtype: Dtype of the weights.
        backend: How experts are computed.
    """

    def __init__(
        self,
        name: str,
        view: CheckpointView,
        tokenizer: PreTrainedTokenizerBase,
        *,
        strategy: PlacementStrategy | None,
        devices: Sequence[torch.device],
        dtype: torch.dtype,
        backend: Any,
    ) -> None:
        self.name = name
        self.devices = devices
        self.log = RoutingLog()
        options = HostingOptions(dtype, backend, self.log, packs_while_loading=True)
        if strategy is None:
            self.hosted = host_on_one_device(view, devices[0], options)
        else:
            self.hosted = strategy.host(view, options)
        self.hosted.pack()
        model = self.hosted.model
        self.runner = ModelRunner(model, tokenizer, self.hosted.padding, self.log)
        layers = find_moe_layers(model)
        self.dispatchers: dict[int, Any] = {i.layer: dispatcher_of(i) for i in layers}
        self._clock = PartClock(devices[0])
        self._pass: Pass | None = None
        for layer in layers:
            layer.router.register_forward_hook(partial(self._route, layer.layer))
            layer.experts.register_forward_pre_hook(self._mark)
            layer.experts.register_forward_hook(self._mark)

    def _mark(self, *_: Any) -> None:
        self._clock.mark()

    def _route(self, layer: int, router: nn.Module, args: Any, output: Any) -> Any:
        logits, weights_TK, _ = output
        assert self._pass is not None, "a forward is one of a pass"
        return logits, weights_TK, self._pass.index_TK[layer]

    def logits(self, which: Pass) -> Tensor:
        """Logits of every position, ``[B, S, V]``."""
        self._pass = which
        return self.runner.logits(self.runner.pad(which.rows, side="right"))

    def time(self, which: Pass) -> Forward:
        """Run a pass once on the clock."""
        self._clock.take_s()
        total_s = seconds_of(lambda: self.logits(which), self.devices)
        return Forward(total_s, self._clock.take_s())

    def loads(self, which: Pass) -> dict[int, list[int]]:
        """Rows that each expert gets in a pass, as a run with RoutingBalance records them."""
        traces: list[LayerTrace] = []
        self._trace(which, traces)
        return {
            trace.layer: trace.index_TK.reshape(-1).bincount(minlength=trace.num_experts).tolist()
            for trace in traces
        }

    def parts(self, which: Pass, *, runs: int) -> list[SlotParts]:
        """Where the time goes in the fastest of some runs with bookkeeping."""
        best_s, best = float("inf"), list[LayerTrace]()
        for _ in range(runs):
            traces: list[LayerTrace] = []
            total_s = seconds_of(partial(self._trace, which, traces), self.devices)
            if total_s < best_s:
                best_s, best = total_s, traces
        ms: dict[str, dict[Part, float]] = defaultdict(lambda: dict.fromkeys(get_args(Part), 0.0))
        num_bytes: dict[str, int] = defaultdict(int)
        for span in (span for trace in best for span in trace.spans):
            ms[span.slot][span.part] += 1e3 * (span.end_s - span.start_s)
            num_bytes[span.slot] += span.num_bytes
        return [SlotParts(slot, ms[slot], num_bytes[slot]) for slot in sorted(ms)]

    def _trace(self, which: Pass, traces: list[LayerTrace]) -> None:
        self.log.subscribe(traces.append)
        try:
            self.logits(which)
        finally:
            self.log.unsubscribe(traces.append)


class Hosting:
    """Hosts the checkpoint in one way after the other.

    Args:
        checkpoint: The checkpoint.
        slots: Names of all slots.
        threads: Threads of a CPU slot.
        dtype: Dtype of the weights.
        backend: How experts are computed.
    """

    def __init__(
        self, checkpoint: Path, slots: list[str], threads: int, dtype: torch.dtype, backend: str
    ) -> None:
        self.slots, self.threads, self.dtype = slots, threads, dtype
        self.devices = parse_devices(slots)
        self.view = open_checkpoint(str(checkpoint))
        tokenizer = load_tokenizer(self.view)
        self._make = partial(
            Contestant, view=self.view, tokenizer=tokenizer, dtype=dtype, backend=backend
        )

    def local(self) -> Contestant:
        """No placement."""
        progress(f"loading: {LOCAL}")
        return self._make(LOCAL, strategy=None, devices=self.devices[:1])

    def placed(self, num_slots: int, name: str = "", **options: Any) -> Contestant:
        """The first slots, with options of PlacementStrategy."""
        name = name or (ONE_SLOT if num_slots == 1 else f"{num_slots} slots")
        progress(f"loading: {name}")
        strategy = PlacementStrategy(self.slots[:num_slots], threads=self.threads, **options)
        return self._make(name, strategy=strategy, devices=self.devices[:num_slots])

    def balanced(self, loads: Path, replicas: int) -> list[Contestant]:
        """All slots, balanced by loads, without and with replicas."""
        num = len(self.slots)
        names = {0: "balanced"} | ({replicas: f"{replicas} replicas"} if replicas else {})
        return [
            self.placed(num, f"{num} slots, {name}", policy="balanced", loads=loads, replicas=extra)
            for extra, name in names.items()
        ]


def check_same(what: str, answers: Mapping[str, Tensor], tolerance: float) -> dict[str, float]:
    """Check that everybody gives the local answer.

    Args:
        what: What was computed.
        answers: The answers; the first is the local one.
        tolerance: How far they may be apart, relative to the largest value.

    Returns:
        How far they are apart.

    Raises:
        UsageError: If that is too far.
    """
    expected = next(iter(answers.values()))
    most = expected.abs().max()
    differences = {n: float((got - expected).abs().max() / most) for n, got in answers.items()}
    for name, difference in differences.items():
        if not difference <= tolerance:  # NaN as well
            raise UsageError(
                f"{what}: {name} differs from {next(iter(answers))} by {difference:.1e} of the "
                f"largest value, more than {tolerance:g}. There is nothing to compare: one of them "
                "is wrong."
            )
    return differences
