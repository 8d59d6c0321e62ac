"""The names by which ``--trainer.strategy`` and ``Trainer(strategy=...)`` know our strategies."""

from lightning.pytorch.strategies import StrategyRegistry

from moe_lightning.strategies.auto_strategy import AutoStrategy
from moe_lightning.strategies.moe_strategy import MoEStrategy
from moe_lightning.strategies.placement_strategy import PlacementStrategy
from moe_lightning.strategies.rpc_strategy import RPCStrategy
from moe_lightning.strategies.sharded_strategy import SHARDED_PRESETS, ShardedStrategy

STRATEGIES: dict[str, type[MoEStrategy]] = {
    AutoStrategy.strategy_name: AutoStrategy,
    PlacementStrategy.strategy_name: PlacementStrategy,
    RPCStrategy.strategy_name: RPCStrategy,
    **dict.fromkeys(SHARDED_PRESETS, ShardedStrategy),
}


def register_strategies() -> None:
    """Tell Lightning the names; again is harmless."""
    for name, strategy in STRATEGIES.items():
        summary = (strategy.__doc__ or "").partition("\n")[0]
        options = SHARDED_PRESETS.get(name, {})
        StrategyRegistry.register(name, strategy, description=summary, override=True, **options)
