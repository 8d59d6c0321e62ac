"""Who takes part, and why others do not."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from moe_lightning.errors import UsageError
from moe_lightning.placement.cluster import Cluster
from moe_lightning.placement.estimates import Estimate, estimate
from moe_lightning.placement.footprint import ModelSizes

Reach = Literal["one device", "one machine", "several machines"]
PLAIN, VLLM, DATA_PARALLEL = "transformers", "vllm", "DataParallel"
REFERENCE = "single"  # whose answers the others are compared with


@dataclass(frozen=True)
class Contestant:
    """One row of the table.

    Attributes:
        name: What ``--only`` and the table call it.
        reach: How far it can be spread.
        moves: What travels, by which means.
        strategy: What ``--trainer.strategy`` calls it; empty if it is none of Lightning's.
        options: The strategy's options.
        num_devices: Devices of the trainer.
        planned_bytes: Bytes that ``plan`` says travel for a token and layer, decoding and reading
            prompts.
        why_not: Why it does not run here; empty if it does.
    """

    name: str
    reach: Reach
    moves: str
    strategy: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    num_devices: int = 1
    planned_bytes: tuple[float, float] = (0.0, 0.0)
    why_not: str = ""


def contestants(
    sizes: ModelSizes, cluster: Cluster, *, only: Sequence[str] = (), vllm_python: str | None = None
) -> list[Contestant]:
    """Everybody, in the order of the table.

    Args:
        sizes: The model.
        cluster: The devices of this machine.
        only: Names of those that are wanted; empty is all. The reference always takes part.
        vllm_python: A Python that has vLLM; None is this one, if it has.

    Returns:
        The contestants; those that cannot run here say why.

    Raises:
        UsageError: If there is nobody of a name.
    """
    number, rows = cluster.num_devices, estimate(sizes, cluster)
    slots = [f"cuda:{i}" for i in range(number)] if cluster.kind == "cuda" else ["cpu"] * number
    everybody = [
        Contestant(PLAIN, "one device", "nothing", why_not=rows["single"].why_not),
        Contestant(REFERENCE, "one device", "nothing", "auto", why_not=rows["single"].why_not),
        _ours("placement", "one machine", "rows: copies", rows["placement"], {"slots": slots}),
        *(
            _ours(
                f"rpc {transport}",
                "several machines",
                f"rows: messages ({transport})",
                rows["rpc"],
                {"transport": transport, "num_workers": max(1, number)},
            )
            for transport in ("zmq", "tensorpipe")
        ),
        _ours("fsdp", "several machines", "weights: all-gather", rows["fsdp"], devices=number),
        _ours("ep", "several machines", "rows: all-to-all", rows["ep"], devices=number),
        _ours("tp", "several machines", "sums: all-reduce", rows["tp"], devices=number),
        _ours("pp", "several machines", "hidden states: send", rows["pp"], devices=number),
        _ours("ddp", "several machines", "nothing", rows["ddp"], devices=number),
        Contestant(
            DATA_PARALLEL,
            "one machine",
            "weights: a copy for each batch",
            why_not="not for MoE: Lightning has removed it; ddp takes its place",
        ),
        Contestant(VLLM, "one device", "nothing", why_not=_why_no_vllm(vllm_python)),
    ]
    names = [each.name for each in everybody]
    for name in only:
        if name not in names:
            raise UsageError(f"--only: there is no {name!r} among {', '.join(names)}.")
    wanted = {*only, REFERENCE} if only else {*names}
    return [each for each in everybody if each.name in wanted]


def _ours(
    name: str,
    reach: Reach,
    moves: str,
    row: Estimate,
    options: Mapping[str, Any] | None = None,
    *,
    devices: int = 1,
) -> Contestant:
    if options is None:  # those of the estimate hold for the trainer's devices
        options = {} if row.name == "moe_ep" else row.options
    made = Contestant(name, reach, moves, row.name, dict(options), devices, row.bytes_per_token)
    return made if row.fits else replace(made, why_not=row.why_not)


def _why_no_vllm(python: str | None) -> str:
    if python is None and importlib.util.find_spec("vllm") is None:
        return "not installed (--vllm_python names a Python that has it)"
    return ""
