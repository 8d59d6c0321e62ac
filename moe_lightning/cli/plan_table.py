"""What ``plan`` found, for a terminal and as JSON."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moe_lightning.errors import UsageError
from moe_lightning.placement.cluster import Cluster, in_gb
from moe_lightning.placement.estimate import Estimate
from moe_lightning.placement.footprint import HEADROOM, ModelSizes
from moe_lightning.placement.speeds import Rates
from moe_lightning.placement.workload import Workload
from moe_lightning.strategies.selection import Choice

COLUMNS = 118


@dataclass(frozen=True, slots=True)
class Plan:
    """What each strategy needs, and which one suits.

    Attributes:
        sizes: The model.
        cluster: The devices.
        workload: What a step is.
        rates: What the devices can do; None if that is not known.
        rows: The strategies.
        outcome: The choice of ``moe_auto``, or why there is none.
        training: Whether it is for fit.
    """

    sizes: ModelSizes
    cluster: Cluster
    workload: Workload
    rates: Rates | None
    rows: Mapping[str, Estimate]
    outcome: Choice | UsageError
    training: bool

    @property
    def reasons(self) -> list[str]:
        """Why ``moe_auto`` chooses as it does."""
        if isinstance(self.outcome, Choice):
            return [f"moe_auto: {line}" for line in self.outcome.reasons]
        return [str(self.outcome)]

    def as_text(self) -> str:
        """A table, what its numbers mean, and the choice."""
        sizes = self.sizes
        about = (
            f"{sizes.name}: {in_gb(sizes.num_bytes)} of weights in {sizes.dtype}, "
            f"{in_gb(sizes.expert_bytes)} of them experts, the largest layer "
            f"{in_gb(max(layer.num_bytes for layer in sizes.layers))}; {self.cluster}"
        )
        blocks = (
            _wrapped([about]),
            self._table(),
            _wrapped(self._legend()),
            _wrapped(self.reasons),
        )
        return "\n\n".join("\n".join(block) for block in blocks)

    def _table(self) -> list[str]:
        steps = ["step"] if self.training else ["decode", "prefill"]
        heads = ["strategy", "on a device", "fits", *steps]
        if self.rates is not None:
            heads += [f"{step}/s" for step in steps]
        lines = [heads]
        for key, row in self.rows.items():
            line = [_title(key, row), in_gb(row.device_bytes), "yes" if row.fits else "no"]
            if row.fits:
                line += [in_gb(number) for number in row.bytes_per_token[: len(steps)]]
                if self.rates is not None:
                    line += [_rate(number) for number in row.tokens_per_s[: len(steps)]]
            lines.append(line)
        widths = [
            max(len(line[column]) for line in lines if len(line) > column)
            for column in range(len(heads))
        ]
        reasons = ["", *(row.why_not for row in self.rows.values())]
        table = []
        for line, reason in zip(lines, reasons, strict=True):
            words = [word.rjust(width) for word, width in zip(line, widths, strict=False)]
            words[0] = line[0].ljust(widths[0])
            table.append("  ".join([*words, reason]).rstrip())
        return table

    def _legend(self) -> list[str]:
        what = "weights, gradients and AdamW's averages" if self.training else "weights"
        work = self.workload
        step = (
            f"step: {work.prefill_tokens:,} tokens on each process with rows of its own"
            if self.training
            else f"decode: {work.decode_tokens:,} tokens a step on each process with rows of its "
            f"own, prefill: {work.prefill_tokens:,}"
        )
        routing = "uniform" if work.routing is None else "as it was recorded"
        lines = [
            f"on a device: {what} on the fullest; {HEADROOM:.0%} of its memory are kept free for "
            "activations and caches.",
            f"{step}: bytes that travel for a token, mean over the layers; routing is {routing}.",
        ]
        if self.rates is not None:
            lines.append(
                "/s: tokens per second of all devices together, at most: weights read or "
                "multiplied, and bytes sent. Attention over what came before, caches"
                f"{', the optimizer' * self.training} and the host's own work are left out. "
                f"{_rates(self.rates)}."
            )
        return lines

    def as_dict(self) -> dict[str, Any]:
        """The same numbers, for JSON."""
        sizes, cluster, outcome = self.sizes, self.cluster, self.outcome
        chosen, reasons = None, [str(outcome)]
        if isinstance(outcome, Choice):
            chosen = {"name": outcome.name, "options": dict(outcome.estimate.options)}
            reasons = list(outcome.reasons)
        return {
            "model": sizes.name,
            "dtype": sizes.dtype,
            "total_bytes": sizes.num_bytes,
            "expert_bytes": sizes.expert_bytes,
            "dense_bytes": sizes.dense_bytes,
            "expert_bytes_by_layer": [layer.expert_bytes for layer in sizes.layers],
            "largest_layer_bytes": max(layer.num_bytes for layer in sizes.layers),
            "num_nodes": cluster.num_nodes,
            "devices_per_node": cluster.devices_per_node,
            "bytes_per_device": cluster.device_bytes,
            "room_bytes_per_device": cluster.room_bytes,
            "decode_tokens": self.workload.decode_tokens,
            "prefill_tokens": self.workload.prefill_tokens,
            "routing": "uniform" if self.workload.routing is None else "recorded",
            "rates": None if self.rates is None else asdict(self.rates),
            "strategies": [_as_dict(row) for row in self.rows.values()],
            "choice": chosen,
            "reasons": reasons,
        }


def _as_dict(row: Estimate) -> dict[str, Any]:
    return {
        "name": row.name,
        "options": dict(row.options),
        "bytes_on_a_device": row.device_bytes,
        "fits": row.fits,
        "why_not": row.why_not,
        "bytes_per_token_and_layer": {
            "decode": row.bytes_per_token[0],
            "prefill": row.bytes_per_token[1],
        },
        "tokens_per_s": {"decode": row.tokens_per_s[0], "prefill": row.tokens_per_s[1]},
    }


def _wrapped(texts: Sequence[str]) -> list[str]:
    return [line for text in texts for line in textwrap.wrap(text, COLUMNS, break_on_hyphens=False)]


def _title(key: str, row: Estimate) -> str:
    """What the first column calls a strategy; options that say nothing new are left to JSON."""
    if key == "single":
        return "auto (a single device)"
    if key == "copies":
        return "moe_fsdp (a copy each)"
    slots = row.options.get("slots")
    if isinstance(slots, list):
        return f"{row.name} ({len(slots)} slots)" if len(slots) > 1 else row.name
    return row.label


def _rate(tokens_per_s: float | None) -> str:
    if tokens_per_s is None:
        return "-"
    return f"{tokens_per_s:,.0f}" if tokens_per_s >= 10 else f"{tokens_per_s:.2g}"


def _rates(rates: Rates) -> str:
    words = [
        f"A device does {rates.flops / 1e12:,.3g} TFLOP/s and reads "
        f"{in_gb(rates.memory_bytes_per_s)}/s"
    ]
    for what, number in (
        ("others of its machine", rates.link_bytes_per_s),
        ("other machines", rates.network_bytes_per_s),
    ):
        if number is not None:
            words.append(f"gets {in_gb(number)}/s from {what}")
    if rates.latency_s:
        words.append(f"an empty message takes {rates.latency_s * 1e6:,.0f} us")
    return ", ".join(words)
