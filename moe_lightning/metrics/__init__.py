"""Metrics of routing: torchmetrics classes over pure functions. They know nothing of this package,
so they work in any loop that has the experts that a router chose.
"""

from moe_lightning.metrics.functional import (
    expert_coactivation,
    expert_load,
    load_imbalance,
    router_entropy,
)
from moe_lightning.metrics.routing import (
    ExpertCoactivation,
    ExpertLoad,
    LoadImbalance,
    RouterEntropy,
)

__all__ = [
    "ExpertCoactivation",
    "ExpertLoad",
    "LoadImbalance",
    "RouterEntropy",
    "expert_coactivation",
    "expert_load",
    "load_imbalance",
    "router_entropy",
]
