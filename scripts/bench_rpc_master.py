"""The process that runs the model in bench_rpc.py: a master with workers, or one device alone.

    python bench_rpc_master.py '{"checkpoint": ..., "workers": [...], ...}'

It computes the same rows in whichever way it is asked to. What changes between the ways is who
dispatches the rows of a layer, and in which dtype they travel; model and workers stay.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from bench_rpc_naive import NaiveDispatcher
from bench_rpc_player import Turn, play, seconds_of
from torch import Tensor
from transformers.utils import logging as transformers_logging
from typing_extensions import override

from moe_lightning.data.records import Row, RowOptions
from moe_lightning.dispatch import Dispatcher, LayerTrace, RemoteDispatcher, RoutingLog
from moe_lightning.modeling.checkpoint import open_checkpoint
from moe_lightning.modeling.runner import ModelRunner
from moe_lightning.modeling.seam import MoELayer, attach, dispatcher_of, find_moe_layers
from moe_lightning.modeling.tokenizer import load_tokenizer
from moe_lightning.strategies import HostingOptions, RPCStrategy, host_on_one_device
from moe_lightning.tasks import Generate, Score, Task

DISPATCHERS = ("naive", "one call", "overlap", "dense")


@dataclass(frozen=True)
class Way:
    """How rows get to their experts.

    Attributes:
        dispatcher: One of :data:`DISPATCHERS`.
        wire: Dtype of rows on the wire, both directions.
    """

    dispatcher: str
    wire: Any = "working"


class Switch(Dispatcher):
    """Hands a layer's rows to one of several dispatchers.

    Args:
        choices: The dispatchers by name; those that overlap nothing are not told of work that
            could be done meanwhile.
        log: Where the layer's work is recorded while somebody looks.
    """

    sends_rows_away = True

    def __init__(self, choices: Mapping[str, Dispatcher], *, log: RoutingLog) -> None:
        any_one = next(iter(choices.values()))
        super().__init__(layer=any_one.layer, num_experts=any_one.num_experts, log=log)
        self._choices = choices
        self.chosen = next(iter(choices))

    @override
    def __call__(
        self,
        hidden_TD: Tensor,
        index_TK: Tensor,
        weights_TK: Tensor,
        meanwhile: Callable[[], None] | None = None,
    ) -> Tensor:
        if self.chosen != "overlap":
            meanwhile = None
        return self._choices[self.chosen](hidden_TD, index_TK, weights_TK, meanwhile)


class NoExperts(Dispatcher):
    """What is left of a layer without its experts: the dense part."""

    @override
    def __call__(self, hidden_TD: Tensor, *_: object) -> Tensor:
        return torch.zeros_like(hidden_TD)


class Master:
    """A model whose experts are on workers.

    Args:
        options: As bench_rpc.py gives them.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        view = open_checkpoint(options["checkpoint"])
        self.log = RoutingLog()
        hosting = HostingOptions(
            torch.float32, options["backend"], self.log, packs_while_loading=True
        )
        self.strategy: RPCStrategy | None = None
        if options["workers"]:
            self.strategy = RPCStrategy(
                options["workers"],
                transport=options["transport"],
                keys=options["keys"],
                insecure_network=options["transport"] == "tensorpipe",
                micro_batches=options["micro_batches"],
            )
            self.hosted = self.strategy.host(view, hosting)
        else:
            self.hosted = host_on_one_device(view, torch.device("cpu"), hosting)
        self.hosted.pack()
        model = self.hosted.model
        self.padding = self.hosted.padding
        self.switches: list[Switch] = []
        if self.strategy is not None:
            overlapping = {layer.layer: dispatcher_of(layer) for layer in find_moe_layers(model)}
            self.padding = attach(model, lambda layer: self._switch(layer, overlapping))
        self._tokenizer = load_tokenizer(view)
        self._passes = options["passes"]

    def _switch(self, layer: MoELayer, overlapping: Mapping[int, Dispatcher]) -> Switch:
        assert self.strategy is not None, "nobody else has workers"
        fleet, placement = self.strategy.fleet, self.strategy.placement
        assert fleet is not None, "it hosted the model"
        assert placement is not None, "it hosted the model"
        slots = placement.slots[layer.layer]
        sizes: Any = {"layer": layer.layer, "log": self.log}
        choices = (
            NaiveDispatcher(fleet, slot_of=[slot for (slot,) in slots], **sizes),
            RemoteDispatcher(fleet, num_experts=len(slots), **sizes),
            overlapping[layer.layer],
            NoExperts(num_experts=len(slots), **sizes),
        )
        switch = Switch(dict(zip(DISPATCHERS, choices, strict=True)), log=self.log)
        self.switches.append(switch)
        return switch

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """One turn: a pass, computed in one way, and how long it took."""
        runner = self._runner(Way(**question["way"]) if question["way"] else None)
        run = partial(self._run, question["pass"], runner)
        if question["do"] == "time":
            return {"seconds": seconds_of(run)}
        if question["do"] == "answers":
            return {"answers": run()}
        traces: list[LayerTrace] = []
        self.log.subscribe(traces.append)
        try:
            seconds = seconds_of(run)
        finally:
            self.log.unsubscribe(traces.append)
        return {"seconds": seconds, "spans": self._spans(traces)}

    def _runner(self, way: Way | None) -> ModelRunner:
        interleaver = None
        if way is not None:
            assert self.strategy is not None, "only workers can be asked in different ways"
            self.strategy.wire.dispatch_dtype = self.strategy.wire.combine_dtype = way.wire
            for switch in self.switches:
                switch.chosen = way.dispatcher
            if way.dispatcher == "overlap":
                interleaver = self.hosted.interleaver
        return ModelRunner(
            self.hosted.model, self._tokenizer, self.padding, self.log, interleaver=interleaver
        )

    def _run(self, name: str, runner: ModelRunner) -> list[Any]:
        """The answers of a pass: log-probabilities, or new tokens."""
        rows = [
            Row(n, n + 1, f"row-{n}", ids, RowOptions())
            for n, ids in enumerate(self._passes[name]["rows"])
        ]
        new_tokens = self._passes[name]["new_tokens"]
        task: Task = Score()
        if new_tokens:
            task = Generate(max_new_tokens=new_tokens, ignore_eos=True)
        budget_tokens = sum(len(row.token_ids) + new_tokens for row in rows)
        answers: Sequence[Any] = task.run(
            runner, rows, budget_tokens=budget_tokens, progress=lambda *_: None
        )
        return [each["token_ids"] if new_tokens else each["logprob"] for each in answers]

    def _spans(self, traces: Sequence[LayerTrace]) -> list[tuple[int, str, int, float, int]]:
        """Layer, part, worker, seconds and bytes of every span, in the order of the run."""
        if self.strategy is None or self.strategy.fleet is None:
            return []
        names = self.strategy.fleet.names
        return [
            (
                number,
                span.part,
                names.index(span.slot),
                span.end_s - span.start_s,
                span.num_bytes,
            )
            for number, trace in enumerate(traces)
            for span in trace.spans
        ]


def start(options: Mapping[str, Any]) -> tuple[dict[str, Any], Turn]:
    """Load the model."""
    master = Master(options)
    return {"layers": len(master.switches)}, master.answer


def main() -> None:
    """Be a player."""
    options = json.loads(sys.argv[1])
    torch.set_num_threads(options["threads"])
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with torch.inference_mode():
        play(partial(start, options))


if __name__ == "__main__":
    main()
