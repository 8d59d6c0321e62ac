"""The names by which ``--trainer.strategy`` and ``Trainer(strategy=...)`` know our strategies."""

from lightning.pytorch.strategies import StrategyRegistry

from moe_lightning.strategies.moe_strategy import MoEStrategy
from moe_lightning.strategies.placement_strategy import PlacementStrategy
from moe_lightning.strategies.rpc_strategy import RPCStrategy
from moe_lightning.strategies.sharded_strategy import ShardedStrategy

STRATEGIES: dict[str, type[MoEStrategy]] = {
    PlacementStrategy.strategy_name: PlacementStrategy,
    RPCStrategy.strategy_name: RPCStrategy,
    ShardedStrategy.strategy_name: ShardedStrategy,
}


def register_strategies() -> None:
    """Tell Lightning the names; again is harmless."""
    for name, strategy in STRATEGIES.items():
        summary = (strategy.__doc__ or "").partition("\n")[0]
        StrategyRegistry.register(name, strategy, description=summary, override=True)
