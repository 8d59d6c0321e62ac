"""One MoE layer over ranks: this package's exchange of rows against transformers' all_to_all.

    python scripts/bench_collective.py --out result.json

Every contestant computes the same layer with the same weights on the same rows; rows differ from
rank to rank. Contestants take turns, and a time is that of the slowest rank. "experts alone" is the
limit: the products of the rows that arrive, with nothing exchanged.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoConfig
from transformers.distributed.expert_parallel import AllToAllEP

from moe_lightning.dispatch import CollectiveDispatcher, RoutingLog
from moe_lightning.experts import ExpertShard
from moe_lightning.modeling.loading import build_on_meta
from moe_lightning.modeling.seam import find_moe_layers

TRANSFORMERS, ALONE = "transformers all_to_all", "experts alone"
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Settings:
    """What is measured; every option of the command line.

    Attributes:
        tokens: Rows of each rank, one measurement each.
        hidden: D.
        expert: F.
        experts: E.
        top_k: K.
        ranks: Processes, one thread each.
        repeats: Times that each contestant is measured.
        dtype: Of rows and weights.
        chunks: Contestants with so many chunks beside the one without.
        narrow_wire: Whether one contestant sends bfloat16.
    """

    tokens: list[int]
    hidden: int
    expert: int
    experts: int
    top_k: int
    ranks: int
    repeats: int
    dtype: str
    chunks: list[int]
    narrow_wire: bool


@dataclass(frozen=True)
class Result:
    """One contestant in one measurement.

    Attributes:
        routing: ``uniform`` or ``zipf``.
        tokens: Rows of each rank.
        does: ``forward`` or ``forward+backward``.
        name: The contestant.
        times_ms: Of the slowest rank, one each repeat.
        median_ms: Their median.
        speedup: The median of transformers over this one.
        mib_sent: MiB of rows and sums that cross between ranks in a forward, over all ranks.
        difference: Largest difference from transformers' output, over its largest value.
    """

    routing: str
    tokens: int
    does: str
    name: str
    times_ms: list[float]
    median_ms: float
    speedup: float
    mib_sent: float
    difference: float


@dataclass(frozen=True)
class PlainExperts:
    """transformers' own computation of the experts, for this package's exchange."""

    experts: nn.Module
    compute: Layer
    layer: int = 0


def make_experts(settings: Settings, num_experts: int) -> nn.Module:
    """The experts of a rank, random."""
    config = AutoConfig.for_model(
        "qwen3_moe",
        hidden_size=settings.hidden,
        moe_intermediate_size=settings.expert,
        num_experts=num_experts,
        num_experts_per_tok=min(settings.top_k, num_experts),
        num_hidden_layers=1,
        vocab_size=16,
    )
    experts = find_moe_layers(build_on_meta(config))[0].experts
    experts.config._experts_implementation = "grouped_mm"
    experts = experts.to_empty(device="cpu").to(getattr(torch, settings.dtype))
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return experts


def make_rows(settings: Settings, num_tokens: int, routing: str) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's rows and where they go."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    likely_E = torch.ones(settings.experts)
    if routing == "zipf":
        order = torch.randperm(settings.experts, generator=torch.Generator().manual_seed(7))
        likely_E = 1.0 / (order + 1)
    hidden_TD = torch.randn(num_tokens, settings.hidden, generator=generator)
    index_TK = torch.multinomial(
        likely_E.expand(num_tokens, -1), settings.top_k, generator=generator
    )
    weights_TK = torch.rand(num_tokens, settings.top_k, generator=generator).softmax(1)
    return hidden_TD.to(getattr(torch, settings.dtype)), index_TK, weights_TK


class Contestants:
    """The ways of one rank to compute the layer, and what they send."""

    def __init__(self, settings: Settings) -> None:
        each = settings.experts // settings.ranks
        rank = dist.get_rank()
        self.settings = settings
        self.each = each
        self.log = RoutingLog()
        torch.manual_seed(rank)
        experts = make_experts(settings, each)
        mesh = init_device_mesh("cpu", (settings.ranks, 1), mesh_dim_names=("ep", "tp"))
        ids = range(rank * each, (rank + 1) * each)
        self.shard = ExpertShard(experts, layer=0, expert_ids=ids, backend="grouped_mm")
        theirs = AllToAllEP(experts, mesh["ep"], mesh["tp"])
        self.layers: dict[str, Layer] = {
            TRANSFORMERS: theirs,
            "moe_lightning": self.dispatcher(self.shard),
            "moe_lightning, transformers' experts": self.dispatcher(
                PlainExperts(experts, self.without_elsewhere(theirs.experts_forward))
            ),
        }
        for chunks in settings.chunks:
            self.layers[f"moe_lightning, {chunks} chunks"] = self.dispatcher(
                self.shard, num_chunks=chunks, chunk_rows=1
            )
        if settings.narrow_wire:
            self.layers["moe_lightning, bfloat16 wire"] = self.dispatcher(
                self.shard, wire_dtype=torch.bfloat16
            )
        self.layers[ALONE] = self.alone
        self.arrived: tuple[Tensor, Tensor, Tensor] | None = None

    def dispatcher(self, shard: ExpertShard | PlainExperts, **options) -> CollectiveDispatcher:
        experts_of_slot = {
            slot: range(slot * self.each, (slot + 1) * self.each)
            for slot in range(self.settings.ranks)
        }
        return CollectiveDispatcher(
            shard,
            num_experts=self.settings.experts,
            experts_of_slot=experts_of_slot,
            group=dist.group.WORLD,
            log=self.log,
            **options,
        )

    def without_elsewhere(self, forward: Layer) -> Layer:
        def compute(rows_RD: Tensor, index_RK: Tensor, weights_RK: Tensor) -> Tensor:
            return forward(rows_RD, index_RK, weights_RK.masked_fill(index_RK == self.each, 0.0))

        return compute

    def alone(self, hidden_TD: Tensor, *_: Tensor) -> Tensor:
        """The experts of the rows that arrived, as if they had been here."""
        rows_RD, index_RK, weights_RK = self.arrived
        if hidden_TD.requires_grad:
            rows_RD = rows_RD.clone().requires_grad_()
        return self.shard.compute(rows_RD, index_RK, weights_RK)

    def prepare(self, rows: tuple[Tensor, Tensor, Tensor]) -> dict[str, tuple[float, Tensor]]:
        """One pass of each: MiB sent by this rank, and the output."""
        compute, kept = self.shard.compute, []
        self.shard.compute = lambda *a: kept.append([t.detach().clone() for t in a]) or compute(*a)
        passes, traces = {}, []
        self.log.subscribe(traces.append)
        for name, layer in self.layers.items():
            if name == ALONE:
                continue
            traces.clear()
            with torch.no_grad():
                out_TD = layer(*rows)
            num_bytes = sum(span.num_bytes for trace in traces for span in trace.spans)
            if name == TRANSFORMERS:  # a row for each expert, there and back
                num_away = int((rows[1] // self.each != dist.get_rank()).sum())
                num_bytes = 2 * num_away * rows[0].shape[1] * rows[0].element_size()
            if name == "moe_lightning":
                self.arrived = tuple(kept[-1])
            passes[name] = num_bytes / 2**20, out_TD
        self.log.unsubscribe(traces.append)
        self.shard.compute = compute
        return passes | {ALONE: (0.0, passes[TRANSFORMERS][1])}


def slowest(seconds: float) -> float:
    return over_ranks(seconds, dist.ReduceOp.MAX)


def over_ranks(value: float, operation: dist.ReduceOp.RedOpType) -> float:
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, operation)
    return float(tensor)


def run_once(layer: Layer, rows: tuple[Tensor, Tensor, Tensor], has_backward: bool) -> None:
    if not has_backward:
        with torch.no_grad():
            layer(*rows)
        return
    hidden_TD, index_TK, weights_TK = rows
    layer(hidden_TD.requires_grad_(), index_TK, weights_TK.requires_grad_()).sum().backward()


def measure(contestants: Contestants, num_tokens: int, routing: str) -> list[Result]:
    settings, results = contestants.settings, []
    rows = make_rows(settings, num_tokens, routing)
    passes = contestants.prepare(rows)
    reference_TD = passes[TRANSFORMERS][1].double()
    num_calls = max(1, 128 // num_tokens)
    for has_backward in (False, True):
        times: dict[str, list[float]] = {name: [] for name in contestants.layers}
        for repeat in range(settings.repeats + 1):  # the first is the warm-up
            for name, layer in contestants.layers.items():
                dist.barrier()
                start_s = time.perf_counter()
                for _ in range(num_calls):
                    run_once(layer, rows, has_backward)
                passed_ms = slowest(time.perf_counter() - start_s) * 1000 / num_calls
                if repeat > 0:
                    times[name].append(passed_ms)
        for name, each_ms in times.items():
            mib, out_TD = passes[name]
            difference = (out_TD.double() - reference_TD).abs().max() / reference_TD.abs().max()
            results.append(
                Result(
                    routing,
                    num_tokens,
                    "forward+backward" if has_backward else "forward",
                    name,
                    each_ms,
                    statistics.median(each_ms),
                    statistics.median(times[TRANSFORMERS]) / statistics.median(each_ms),
                    over_ranks(mib, dist.ReduceOp.SUM),
                    slowest(float(difference)),
                )
            )
    return results


def serve(rank: int, settings: Settings, port: int, results) -> None:
    """One rank."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=settings.ranks)
    contestants = Contestants(settings)
    for routing in ("uniform", "zipf"):
        for num_tokens in settings.tokens:
            measured = measure(contestants, num_tokens, routing)
            if rank == 0:
                results.put(measured)
    dist.destroy_process_group()


def markdown(results: list[Result]) -> str:
    """The results as a table."""
    lines = [
        "| routing | rows a rank | | | median ms (least to most) | times transformers' speed "
        "| MiB sent | largest difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        lines.append(
            f"| {r.routing} | {r.tokens} | {r.does} | {r.name} | {r.median_ms:.2f} "
            f"({min(r.times_ms):.2f} to {max(r.times_ms):.2f}) | {r.speedup:.2f} "
            f"| {r.mib_sent:.2f} | {r.difference:.0e} |"
        )
    return "\n".join(lines)


def parse() -> tuple[Settings, Path | None]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 256, 2048])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--expert", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=32, help="a multiple of the ranks")
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--chunks", type=int, nargs="*", default=[2])
    parser.add_argument("--narrow-wire", action="store_true")
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    options = vars(parser.parse_args())
    out = options.pop("out")
    settings = Settings(**options)
    if settings.experts % settings.ranks:
        parser.error("transformers needs --experts to be a multiple of --ranks")
    return settings, out


def main() -> None:
    """Measure, print, write."""
    settings, out = parse()
    context = get_context("spawn")
    results = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        context.Process(target=serve, args=(rank, settings, port, results), daemon=True)
        for rank in range(settings.ranks)
    ]
    for process in ranks:
        process.start()
    measured: list[Result] = []
    for _ in range(2 * len(settings.tokens)):
        measured += results.get(timeout=1800)
    for process in ranks:
        process.join()
    machine = {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(markdown(measured))
    if out is not None:
        report = {"machine": machine, "settings": asdict(settings)}
        out.write_text(json.dumps(report | {"results": [asdict(r) for r in measured]}, indent=1))


if __name__ == "__main__":
    main()
