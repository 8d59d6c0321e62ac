"""Lightning strategies: where a model's experts are, and how its data is split."""

from moe_lightning.strategies.auto_strategy import AutoStrategy
from moe_lightning.strategies.checkpoint_io import ReadsShards
from moe_lightning.strategies.hosting import HostedModel, HostingOptions, host_on_one_device
from moe_lightning.strategies.moe_strategy import MoEStrategy, hosting_key
from moe_lightning.strategies.placement_strategy import PlacementStrategy
from moe_lightning.strategies.registry import STRATEGIES, register_strategies
from moe_lightning.strategies.rpc_strategy import RPCStrategy
from moe_lightning.strategies.sharded_strategy import SHARDED_PRESETS, ShardedStrategy

__all__ = [
    "SHARDED_PRESETS",
    "STRATEGIES",
    "AutoStrategy",
    "HostedModel",
    "HostingOptions",
    "MoEStrategy",
    "PlacementStrategy",
    "RPCStrategy",
    "ReadsShards",
    "ShardedStrategy",
    "host_on_one_device",
    "hosting_key",
    "register_strategies",
]
