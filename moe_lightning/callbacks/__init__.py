"""Lightning callbacks: writing predictions, showing progress, reporting the run."""

from moe_lightning.callbacks.communication_time import CommunicationTime
from moe_lightning.callbacks.placement_file import PlacementFile
from moe_lightning.callbacks.prediction_writer import PredictionWriter
from moe_lightning.callbacks.routing_balance import RoutingBalance
from moe_lightning.callbacks.row_progress_bar import RowProgressBar
from moe_lightning.callbacks.run_report import RunReport
from moe_lightning.callbacks.save_checkpoints import SaveCheckpoints
from moe_lightning.callbacks.throughput import Throughput

__all__ = [
    "CommunicationTime",
    "PlacementFile",
    "PredictionWriter",
    "RoutingBalance",
    "RowProgressBar",
    "RunReport",
    "SaveCheckpoints",
    "Throughput",
]
