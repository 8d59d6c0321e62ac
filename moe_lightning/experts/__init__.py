"""How the experts of one device are held and computed."""

from moe_lightning.experts.backends import BACKEND_NAMES, Backend, choose_backend
from moe_lightning.experts.shard import ExpertShard

__all__ = ["BACKEND_NAMES", "Backend", "ExpertShard", "choose_backend"]
