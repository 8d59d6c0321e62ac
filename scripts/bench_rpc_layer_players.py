"""The processes of bench_rpc.py --layer: ways to ask two workers about one layer's rows.

    ours     RemoteDispatcher or NaiveDispatcher, over zmq or tensorpipe; workers are those of
             `moe_lightning worker`, but their experts give the rows back
    guide    torch.distributed.rpc as guides have it: init_rpc, rpc_async(expert, rows)
    echo     plain sockets, and as many bytes as ours send and receive

Nobody computes anything in a worker: this is about what asking costs.

    python bench_rpc_layer_players.py ours-master '{"addresses": [...], ...}'
"""

import json
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from bench_rpc_guide import mirror, serve_guide, start_guide
from bench_rpc_naive import NaiveDispatcher
from bench_rpc_player import play
from torch import Tensor
from torch.distributed import rpc
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
Turn = Callable[[dict[str, Any]], dict[str, Any]]
SIZES = struct.Struct("<QQ")
LAYER = 0


class MirrorHost(ExpertHost):
    """Experts of which any number fits in, and that give back what they get."""

    @override
    def load(self, experts: Any, **_: Any) -> None:
        pass

    @override
    def compute(self, layer: int, rows_RD: Tensor, *_: Tensor) -> Tensor:
        return rows_RD


class Rows:
    """The rows of the layer, the same in every process.

    Args:
        options: Sizes and the seed.
    """

    def __init__(self, options: Options) -> None:
        generator = torch.Generator().manual_seed(options["seed"])
        shape = (options["tokens"], options["num_experts"])
        self.hidden_TD = torch.randn(shape[0], options["width"], generator=generator)
        self.index_TK = torch.rand(shape, generator=generator).topk(options["top_k"]).indices
        self.weights_TK = torch.rand(self.index_TK.shape, generator=generator).softmax(1)
        num_workers = len(options["addresses"])
        self.slot_of = [e * num_workers // shape[1] for e in range(shape[1])]


def ours_worker(options: Options) -> None:
    """A worker of moe_lightning with other experts."""
    worker.ExpertHost = MirrorHost  # type: ignore[misc]: everything else is to be the real thing
    sys.exit(worker.serve_experts(worker.WorkerOptions(**options)))


def ours_master(options: Options) -> tuple[dict[str, Any], Turn]:
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


def guide_master(options: Options) -> tuple[dict[str, Any], Turn]:
    """A call for each expert; a turn is one layer, the calls all at once or one by one."""
    start_guide(options, rank=0)
    rows = Rows(options)

    def layer(is_async: bool) -> Tensor:
        flights = []
        for expert, slot in enumerate(rows.slot_of):
            token_R, choice_R = (rows.index_TK == expert).nonzero(as_tuple=True)
            if token_R.numel() == 0:
                continue
            flight = rpc.rpc_async(
                f"worker{slot + 1}", mirror, args=(expert, rows.hidden_TD[token_R])
            )
            if not is_async:
                flight.wait()
            flights.append((token_R, rows.weights_TK[token_R, choice_R], flight))
        out_TD = torch.zeros_like(rows.hidden_TD)
        for token_R, weights_R, flight in flights:
            out_TD.index_add_(0, token_R, flight.wait() * weights_R[:, None])
        return out_TD

    def turn(question: dict[str, Any]) -> dict[str, Any]:
        is_async = question["how"] == "at once"
        if question["do"] == "time":
            return {"seconds": seconds_of(partial(layer, is_async))}
        return {"mean": float((layer(is_async) / rows.hidden_TD).mean())}

    return {}, turn


def echo_worker(options: Options) -> None:
    """Gives back as many bytes as it is told, after as many as it is told."""
    with socket.create_server(tuple(options["address"])) as server:
        connection, _ = server.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    buffer = bytearray(1 << 30)
    while header := connection.recv(SIZES.size, socket.MSG_WAITALL):
        num_in, num_out = SIZES.unpack(header)
        _receive(connection, memoryview(buffer)[:num_in])
        connection.sendall(memoryview(buffer)[:num_out])


def echo_master(options: Options) -> tuple[dict[str, Any], Turn]:
    """Sends all, then receives all; a turn names the bytes there and back for each worker."""
    sockets = [_connect(tuple(address)) for address in options["addresses"]]
    buffer = bytearray(1 << 30)

    def layer(amounts: Sequence[tuple[int, int]]) -> None:
        for connection, (num_there, num_back) in zip(sockets, amounts, strict=True):
            connection.sendall(SIZES.pack(num_there, num_back))
            connection.sendall(memoryview(buffer)[:num_there])
        for connection, (_, num_back) in zip(sockets, amounts, strict=True):
            _receive(connection, memoryview(buffer)[:num_back])

    return {}, lambda question: {"seconds": seconds_of(partial(layer, question["amounts"]))}


def seconds_of(call: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s


def _connect(address: tuple[str, int], *, patience_s: float = 60.0) -> socket.socket:
    end_s = time.monotonic() + patience_s
    while True:
        try:
            connection = socket.create_connection(address, timeout=patience_s)
        except OSError:
            if time.monotonic() > end_s:
                raise
            time.sleep(0.1)
        else:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection


def _receive(connection: socket.socket, into: memoryview) -> None:
    while into:
        num_bytes = connection.recv_into(into)
        if not num_bytes:
            raise ConnectionError("the other end has closed")
        into = into[num_bytes:]


ROLES = {
    "ours-worker": ours_worker,
    "guide-worker": serve_guide,
    "echo-worker": echo_worker,
    "ours-master": ours_master,
    "guide-master": guide_master,
    "echo-master": echo_master,
}


def main() -> None:
    """The role that the command line names, with its options."""
    role, options = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(1)
    if role.endswith("worker"):
        ROLES[role](options)
    else:
        with torch.inference_mode():
            play(partial(ROLES[role], options))


if __name__ == "__main__":
    main()
