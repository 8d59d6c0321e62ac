"""Output directories of made-up runs, large and small, in the formats of the callbacks."""

import json
import random

import torch

from moe_lightning.callbacks.routing_picture import draw_routing
from moe_lightning.callbacks.routing_summary import RoutingSummary

PARTS = ("dispatch_s", "compute_s", "combine_s", "wait_s")


def make_run(directory, *, num_layers, num_experts, num_slots):
    """Write what a run with pictures and all callbacks would."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    names = tuple(f"{number}:cuda:{number}" for number in range(num_slots))

    def draw(size):
        return (1000 * torch.randn(size, generator=generator).exp()).to(torch.int64)

    summary = RoutingSummary.of(
        {layer: draw(num_experts) for layer in range(num_layers)},
        names,
        {layer: draw(num_slots) for layer in range(num_layers)},
    )
    (directory / "routing_balance.json").write_text(summary.to_json())
    draw_routing(directory / "routing_balance.png", summary)
    numbers = random.Random(0)
    layers = {}
    for layer in range(num_layers):
        parts = {part: 100 * numbers.uniform(1e-5, 1e-3) for part in PARTS}
        total_s = sum(parts.values())
        layers[layer] = {
            "num_passes": 100,
            "total_s": total_s,
            **parts,
            "exposed_s": total_s - parts["compute_s"],
            "overlapped_s": parts["compute_s"],
        }
    home = [0] + [10**9 * n for n in range(1, num_slots)]
    matrix = [home] + [[7 * 10**8] + [0] * (num_slots - 1) for _ in range(num_slots - 1)]
    communication = {
        "slots": names,
        "num_passes": 100 * num_layers,
        "wall_s": 100.0,
        "moe_s": 41.0,
        "layers": layers,
        "waited_for": {"slot": names[-1], "wait_s": 3.3, "share": 0.61},
        "bytes": matrix,
        "link_bytes_per_s": [[number / 3 for number in row] for row in matrix],
        "link_fraction": None,
        "sharding": None,
    }
    (directory / "communication_time.json").write_text(json.dumps(communication))
    run = {
        "exit_reason": "finished",
        "started": "2026-11-23T01:00:00+00:00",
        "elapsed_s": 100.2,
        "num_rows": 1000,
        "num_predictions": 998,
        "num_errors": 2,
        "padding_share": 0.012,
        "rows_per_s": 10.0,
        "tokens_per_s": 1050.0,
        "prompt_tokens_per_s": 1000.0,
        "new_tokens_per_s": 50.0,
        "mfu": 0.31,
        "peak_memory": [{"process": "rank 0", "host_bytes": 3 * 10**9, "device_bytes": 7 * 10**10}],
        "strategy": "PlacementStrategy",
        "world_size": 1,
        "devices": ["NVIDIA H100 80GB HBM3"] * num_slots,
        "versions": {"torch": "2.13.0"},
    }
    (directory / "run.json").write_text(json.dumps(run))
    (directory / "config.yaml").write_text("model:\n  checkpoint: <script>alert(1)</script>\n")
