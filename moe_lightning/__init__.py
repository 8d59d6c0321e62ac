"""Hugging Face mixture-of-experts checkpoints in PyTorch Lightning, the experts wherever there is
room.

The public names are loaded when they are first used, so that ``import moe_lightning.data.readers``
(and everything else that needs no torch) stays quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_lightning.callbacks import CommunicationTime as CommunicationTime
    from moe_lightning.callbacks import PredictionWriter as PredictionWriter
    from moe_lightning.callbacks import RoutingBalance as RoutingBalance
    from moe_lightning.callbacks import RunReport as RunReport
    from moe_lightning.callbacks import Throughput as Throughput
    from moe_lightning.data.finetune import TextData as TextData
    from moe_lightning.data.prompts import PromptData as PromptData
    from moe_lightning.module import MoELightningModule as MoELightningModule
    from moe_lightning.placement import ExpertPlacement as ExpertPlacement
    from moe_lightning.strategies import PlacementStrategy as PlacementStrategy
    from moe_lightning.strategies import RPCStrategy as RPCStrategy
    from moe_lightning.strategies import ShardedStrategy as ShardedStrategy
    from moe_lightning.tasks import Embed as Embed
    from moe_lightning.tasks import Generate as Generate
    from moe_lightning.tasks import Score as Score
    from moe_lightning.tasks import Task as Task

__version__ = "0.1.0"

_HOMES = {
    "MoELightningModule": "moe_lightning.module",
    "Task": "moe_lightning.tasks",
    "Generate": "moe_lightning.tasks",
    "Score": "moe_lightning.tasks",
    "Embed": "moe_lightning.tasks",
    "PromptData": "moe_lightning.data.prompts",
    "TextData": "moe_lightning.data.finetune",
    "CommunicationTime": "moe_lightning.callbacks",
    "PredictionWriter": "moe_lightning.callbacks",
    "RoutingBalance": "moe_lightning.callbacks",
    "RunReport": "moe_lightning.callbacks",
    "Throughput": "moe_lightning.callbacks",
    "ExpertPlacement": "moe_lightning.placement",
    "PlacementStrategy": "moe_lightning.strategies",
    "RPCStrategy": "moe_lightning.strategies",
    "ShardedStrategy": "moe_lightning.strategies",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moe_lightning' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
