"""Which expert is where: the placement, policies that choose one, and whether it fits. No torch."""

from moe_lightning.placement.loads import check_loads, imbalance, load_loads, save_loads
from moe_lightning.placement.memory import Capacity, check_memory, needed_bytes
from moe_lightning.placement.placement import ExpertPlacement
from moe_lightning.placement.policies import (
    PolicyName,
    balanced,
    linear,
    make_placement,
    round_robin,
)

__all__ = [
    "Capacity",
    "ExpertPlacement",
    "PolicyName",
    "balanced",
    "check_loads",
    "check_memory",
    "imbalance",
    "linear",
    "load_loads",
    "make_placement",
    "needed_bytes",
    "round_robin",
    "save_loads",
]
