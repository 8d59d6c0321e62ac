"""What is printed and saved of a benchmark: tables, and all numbers."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_lightning.benchmark.comparison import difference, reference_of
from moe_lightning.benchmark.rounds import PARTS, Result
from moe_lightning.benchmark.workload import Workload
from moe_lightning.files import write_atomically
from moe_lightning.reports.units import in_bytes, in_seconds

SPEED = (
    *("strategy", "over", "moves", "prefill tokens/s", "decode tokens/s"),
    *("memory of a process", "start-up", "difference from one device"),
)
LAYERS = ("strategy", *(f"{part} µs" for part in PARTS), "bytes per token and layer")


@dataclass(frozen=True)
class Report:
    """Results, and what they are of.

    Attributes:
        results: One for each contestant, in the order of the table.
        workload: The rows.
        num_layers: MoE layers of the model.
        about: What was measured on what, by name.
    """

    results: Sequence[Result]
    workload: Workload
    num_layers: int
    about: Mapping[str, str]

    def as_text(self) -> str:
        """The tables, for a terminal."""
        parts = [f"{name}: {value}" for name, value in self.about.items()]
        for title, head, rows in self._tables():
            parts += ["", title, *_aligned([head, *rows])]
        parts += ["", *self._not_run()]
        return "\n".join(parts).rstrip()

    def as_markdown(self) -> str:
        """The tables, for a page."""
        parts = [f"- {name}: {value}" for name, value in self.about.items()]
        for title, head, rows in self._tables():
            lines = [head, tuple("---" for _ in head), *rows]
            parts += ["", f"**{title}**", "", *(f"| {' | '.join(line)} |" for line in lines)]
        parts += ["", *(f"- {line}" for line in self._not_run())]
        return "\n".join(parts).rstrip() + "\n"

    def as_json(self) -> str:
        """All numbers, of every round."""
        reference = reference_of(list(self.results))
        every: list[dict[str, Any]] = []
        for result in self.results:
            differs = None if reference is None else difference(result, reference)
            who = result.contestant
            every.append(
                {
                    "name": who.name,
                    "over": who.reach,
                    "moves": who.moves,
                    "strategy": who.strategy,
                    "options": dict(who.options),
                    "num_devices": who.num_devices,
                    "why_not": result.why_not,
                    "note": result.note,
                    "difference": differs and asdict(differs),
                    "planned_bytes_per_token_and_layer": {
                        "decode": who.planned_bytes[0],
                        "prefill": who.planned_bytes[1],
                    },
                    "rounds": result.rounds,
                }
            )
        workload = {
            "num_rows": self.workload.num_rows,
            "num_prompt_tokens": self.workload.prompt_tokens,
            "max_new_tokens": self.workload.max_new_tokens,
            "num_moe_layers": self.num_layers,
        }
        page = {"about": dict(self.about), "workload": workload, "contestants": every}
        return json.dumps(page, indent=1) + "\n"

    def write(self, directory: Path) -> None:
        """Write ``benchmark.json``, ``benchmark.md`` and ``benchmark.png``."""
        from moe_lightning.benchmark.chart import draw

        write_atomically(directory / "benchmark.json", self.as_json())
        write_atomically(directory / "benchmark.md", self.as_markdown())
        draw(directory / "benchmark.png", self.ran())

    def ran(self) -> list[Result]:
        """Those of which there are numbers."""
        return [each for each in self.results if each.rounds]

    def _tables(self) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
        rounds = max((len(each.rounds) for each in self.ran()), default=0)
        median = f"medians of {rounds} rounds, ± half of their range" if rounds > 1 else "one round"
        tables: list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]
        tables = [(f"Speed ({median})", SPEED, [self._speed(each) for each in self.ran()])]
        with_layers = [each for each in self.ran() if each.median("decode_compute_us") is not None]
        for phase, what in (("prefill", "reading prompts"), ("decode", "decoding")):
            rows = [self._layer(each, phase) for each in with_layers]
            tables.append((f"A MoE layer, {what}", LAYERS, rows))
        return tables

    def _speed(self, result: Result) -> tuple[str, ...]:
        who, reference = result.contestant, reference_of(list(self.results))
        differs = None if reference is None else difference(result, reference)
        is_reference = result is reference
        memory = in_bytes(result.median("peak_bytes") or 0)
        processes = int(result.median("num_processes") or 1)
        if processes > 1:
            memory += f", all {processes}: {in_bytes(result.median('all_bytes') or 0)}"
        if result.median("device_bytes") is not None:
            memory += f", GPU {in_bytes(result.median('device_bytes') or 0)}"
        return (
            f"{who.name} ({result.note})" if result.note else who.name,
            who.reach,
            who.moves,
            _with_spread(result.values("prefill_tokens_per_s")),
            _with_spread(result.values("decode_tokens_per_s")),
            memory,
            in_seconds(result.median("startup_s") or 0),
            "-" if is_reference or differs is None else str(differs),
        )

    def _layer(self, result: Result, phase: str) -> tuple[str, ...]:
        parts = [f"{result.median(f'{phase}_{part}_us') or 0:,.0f}" for part in PARTS]
        return result.contestant.name, *parts, self._bytes(result, phase)

    def _bytes(self, result: Result, phase: str) -> str:
        who = result.contestant
        rows = (result.median(f"{phase}_row_bytes") or 0) / self.num_layers
        weights = (result.median(f"{phase}_weight_bytes") or 0) / self.num_layers
        if rows or weights:
            words = [(rows, "rows"), (weights, "weights")]
            return " + ".join(f"{in_bytes(number)} of {what}" for number, what in words if number)
        planned = who.planned_bytes[0 if phase == "decode" else 1]
        return f"{in_bytes(planned)} (as planned)" if planned else "0"

    def _not_run(self) -> list[str]:
        return [f"{r.contestant.name}: {r.why_not}" for r in self.results if r.why_not]


def _with_spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    middle = statistics.median(values)
    text = f"{middle:,.0f}"
    if len(values) > 1:
        text += f" ± {50 * (max(values) - min(values)) / max(middle, 1e-9):.0f} %"
    return text


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
