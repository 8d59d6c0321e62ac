"""How the experts of one device are held and computed."""

from moe_lightning.experts.backends import Backend, make_backend
from moe_lightning.experts.held import HeldExperts
from moe_lightning.experts.names import BACKEND_NAMES, BackendName
from moe_lightning.experts.shard import ExpertShard

__all__ = ["BACKEND_NAMES", "Backend", "BackendName", "ExpertShard", "HeldExperts", "make_backend"]
