"""Which expert is where: the placement, policies that choose one, and whether it fits. No torch."""

from moe_lightning.placement.loads import check_loads, imbalance, load_loads, save_loads
from moe_lightning.placement.memory import Capacity, check_memory, needed_bytes
from moe_lightning.placement.placement import ExpertPlacement
from moe_lightning.placement.planner import PlanRequest, plan_placement
from moe_lightning.placement.policies import (
    PolicyName,
    balanced,
    linear,
    make_placement,
    round_robin,
)
from moe_lightning.placement.recording import Recording, load_recording, save_recording

__all__ = [
    "Capacity",
    "ExpertPlacement",
    "PlanRequest",
    "PolicyName",
    "Recording",
    "balanced",
    "check_loads",
    "check_memory",
    "imbalance",
    "linear",
    "load_loads",
    "load_recording",
    "make_placement",
    "needed_bytes",
    "plan_placement",
    "round_robin",
    "save_loads",
    "save_recording",
]
