"""Our dispatchers in bench_rpc.py --layer, and workers whose experts give the rows back.

    python bench_rpc_mirror.py master '{"addresses": [...], ...}'
    python bench_rpc_mirror.py worker '{"listen": ..., ...}'

The workers are those of `moe_lightning worker` in everything else.
"""

import json
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from bench_rpc_naive import NaiveDispatcher
from bench_rpc_player import Turn, play, seconds_of
from bench_rpc_rows import Rows
from torch import Tensor
from typing_extensions import override

from moe_lightning.dispatch import LayerTrace, RemoteDispatcher, RoutingLog
from moe_lightning.modeling.checkpoint import open_checkpoint
from moe_lightning.modeling.manifest import manifest_hash
from moe_lightning.placement import ExpertPlacement
from moe_lightning.transport.keys import Keys
from moe_lightning.transport.tensorpipe_towards import tensorpipe_towards
from moe_lightning.workers import worker
from moe_lightning.workers.expert_host import ExpertHost
from moe_lightning.workers.fleet import Fleet
from moe_lightning.workers.question import WireOptions
from moe_lightning.workers.roster import Roster

Options = Mapping[str, Any]
LAYER = 0


class MirrorHost(ExpertHost):
    """Experts of which any number fits in, and that give back what they get."""

    @override
    def load(self, experts: Any, **_: Any) -> None:
        pass

    @override
    def compute(self, layer: int, rows_RD: Tensor, *_: Tensor) -> Tensor:
        return rows_RD


def serve(options: Options) -> int:
    """A worker of moe_lightning with other experts."""
    worker.ExpertHost = MirrorHost  # type: ignore[misc]: everything else is to be the real thing
    return worker.serve_experts(worker.WorkerOptions(**options))


def ask(options: Options) -> tuple[dict[str, Any], Turn]:
    """Our dispatchers; a turn is one call of the one that it names."""
    keys = None if options["keys"] is None else Keys.load(options["keys"], role="master")
    addresses = [f"tcp://{host}:{port}" for host, port in options["addresses"]]
    roster = Roster(addresses, keys=keys, timeout_s=15.0)
    device = torch.device("cpu")
    fleet = Fleet(roster, wire=WireOptions(), device=device)
    roster.meet(
        manifest_hash(open_checkpoint("demo")), join_timeout_s=120, still_starting=lambda: None
    )
    if options["transport"] == "tensorpipe":
        fleet.use(tensorpipe_towards(addresses, insecure_network=True, timeout_s=60))
    rows = Rows(options)
    slots = {LAYER: tuple((slot,) for slot in rows.slot_of)}
    fleet.start_loading(
        ExpertPlacement(len(addresses), slots),
        dtype=torch.float32,
        experts_backend="reference",
        expert_bytes=[{LAYER: 0}] * len(addresses),
        load_at_home=None,
    )()
    log = RoutingLog()
    dispatchers = {
        "message": RemoteDispatcher(
            fleet, num_experts=len(rows.slot_of), layer=LAYER, log=log, interleaver=None
        ),
        "calls": NaiveDispatcher(fleet, slot_of=rows.slot_of, layer=LAYER, log=log),
    }

    def call(dispatcher: Any) -> Tensor:
        out_TD: Tensor = dispatcher(rows.hidden_TD, rows.index_TK, rows.weights_TK)
        return out_TD

    def turn(question: dict[str, Any]) -> dict[str, Any]:
        dispatcher = dispatchers[question["how"]]
        if question["do"] == "time":
            return {"seconds": seconds_of(partial(call, dispatcher))}
        traces: list[LayerTrace] = []
        log.subscribe(traces.append)
        out_TD = call(dispatcher)
        log.unsubscribe(traces.append)
        return {
            "spans": [
                (span.part, fleet.names.index(span.slot), span.end_s - span.start_s, span.num_bytes)
                for trace in traces
                for span in trace.spans
            ],
            "mean": float((out_TD / rows.hidden_TD).mean()),
        }

    return {}, turn


def main() -> None:
    """The role that the command line names, with its options."""
    role, options = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(1)
    with torch.inference_mode():
        if role == "worker":
            sys.exit(serve(options))
        play(partial(ask, options))


if __name__ == "__main__":
    main()
