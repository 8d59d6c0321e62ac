"""Strategies side by side: same rows, fresh processes, in turn.

    workload ── rows ──▶ contestants ── a process each, round after round ──▶ results ──▶ report

The verb ``benchmark`` leads here. A contestant is a strategy (``player``), plain transformers
(``plain``), or a peer that is installed (``vllm_peer``).
"""

from moe_lightning.benchmark.contestants import Contestant, contestants
from moe_lightning.benchmark.rounds import Limits, Result, Setup, compete
from moe_lightning.benchmark.workload import Workload, make_workload

__all__ = [
    "Contestant",
    "Limits",
    "Result",
    "Setup",
    "Workload",
    "compete",
    "contestants",
    "make_workload",
]
