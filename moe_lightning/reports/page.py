"""``report.html``: one self-contained page of what a run wrote into its output directory.

    run.json, routing_balance.*, communication_time.*, config.yaml ──▶ page.html ──▶ report.html

Any of the files may be missing; its section then says how to get it. The page needs no network and
no scripts, and its policy forbids both.
"""

import base64
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_lightning.errors import UsageError
from moe_lightning.files import write_atomically
from moe_lightning.reports.sentences import sentences
from moe_lightning.reports.units import in_bytes, in_percent, in_rate, in_seconds

NUM_WORST = 6


def write_report(directory: str | Path) -> Path:
    """Write the report of a run.

    Args:
        directory: The run's output directory.

    Returns:
        The page, ``report.html`` in that directory.

    Raises:
        UsageError: If nothing of a run is there, or a file is damaged.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    directory = Path(directory)
    files = {
        name: _read(directory / f"{name}.json")
        for name in ("run", "routing_balance", "communication_time")
    }
    if not any(files.values()):
        raise UsageError(
            f"{directory}: no run has written run.json, routing_balance.json or "
            "communication_time.json there. Give the --output_dir of a run."
        )
    environment = Environment(
        loader=PackageLoader("moe_lightning.reports", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bytes": in_bytes,
        "percent": in_percent,
        "rate": in_rate,
        "seconds": in_seconds,
    }
    text = environment.get_template("page.html").render(
        run=files["run"],
        routing=_routing(files["routing_balance"]),
        communication=_communication(files["communication_time"]),
        sentences=sentences(*files.values()),
        devices=_devices(files["run"]),
        routing_picture=_picture(directory / "routing_balance.png"),
        communication_picture=_picture(directory / "communication_time.png"),
        config=_text(directory / "config.yaml"),
        style=Path(__file__).with_name("page.css").read_text(),
        num_worst=NUM_WORST,
    )
    page = directory / "report.html"
    write_atomically(page, text)
    return page


def _devices(run: dict[str, Any]) -> str:
    """Their names, each once with its number."""
    names = Counter(run.get("devices", []))
    return ", ".join(name if num == 1 else f"{num} x {name}" for name, num in names.items())


def _routing(content: dict[str, Any]) -> dict[str, Any] | None:
    """Layers, the worst first."""
    if not content.get("layers"):
        return None
    layers = [{"layer": int(name), **row} for name, row in content["layers"].items()]
    layers.sort(key=lambda row: (-row["max_over_mean"], row["layer"]))
    slots = content.get("slots", [])
    by_layer = content.get("slot_loads", {}).values()
    rows_by_slot = [sum(rows[slot] for rows in by_layer) for slot in range(len(slots))]
    total = max(1, sum(rows_by_slot))
    shares = [
        {"slot": name, "rows": rows, "share": rows / total, "of_mean": rows * len(slots) / total}
        for name, rows in zip(slots, rows_by_slot, strict=True)
    ]
    return {"layers": layers, "slots": shares}


def _communication(content: dict[str, Any]) -> dict[str, Any] | None:
    """Layers, those that wait longest first; bytes as a matrix with shades."""
    if not content.get("layers"):
        return None
    layers = []
    for name, row in content["layers"].items():
        passes = max(1, row["num_passes"])
        parts = ("total", "dispatch", "compute", "combine", "wait", "exposed", "overlapped")
        mean = {part: row[f"{part}_s"] / passes for part in parts}
        layers.append({"layer": int(name), "num_passes": row["num_passes"], **mean})
    layers.sort(key=lambda row: (-row["wait"], row["layer"]))
    return {
        "layers": layers,
        "slots": content["slots"],
        "links": _links(content),
        "sharding": content.get("sharding"),
    }


def _links(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the matrix; empty if nothing moved."""
    matrix = content.get("bytes") or []
    most = max((number for row in matrix for number in row), default=0)
    if not most:
        return []
    rates, fractions = content.get("link_bytes_per_s"), content.get("link_fraction")
    return [
        {
            "source": content["slots"][source],
            "cells": [
                {
                    "bytes": number,
                    "shade": round(0.55 * number / most, 3),
                    "rate": rates[source][target] if rates else None,
                    "fraction": fractions[source][target] if fractions else None,
                }
                for target, number in enumerate(row)
            ],
        }
        for source, row in enumerate(matrix)
    ]


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read ({error}). Run again, or remove it.") from None
    return content if isinstance(content, dict) else {}


def _text(path: Path) -> str | None:
    return path.read_text(errors="replace") if path.exists() else None


def _picture(path: Path) -> str | None:
    if not path.exists():
        return None
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
