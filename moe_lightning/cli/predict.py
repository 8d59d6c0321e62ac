"""``predict``: batched inference over a file of prompts."""

from collections.abc import Sequence

from moe_lightning.callbacks import (
    PlacementFile,
    PredictionWriter,
    RowProgressBar,
    Throughput,
)
from moe_lightning.cli.base import MoECLI
from moe_lightning.data.prompts import PromptData

SOME_ROWS_FAILED = 3


def run(arguments: Sequence[str]) -> int:
    """Run the verb.

    Args:
        arguments: The command line after the verb.

    Returns:
        0 if every row was answered, 3 if some are in ``errors.jsonl``.
    """
    throughput = Throughput()
    cli = MoECLI(
        verb="predict",
        datamodule_class=PromptData,
        output_dir="./outputs/predict",
        callbacks={"writer": (PredictionWriter, "output_dir")},
        trainer_defaults={
            "logger": False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "devices": 1,
            "callbacks": [RowProgressBar(), throughput, PlacementFile()],
        },
        skip={"optimizer", "lr_scheduler", "router_balance", "trainable", "batch_budget_tokens"},
        arguments=arguments,
    )
    cli.trainer.predict(
        cli.model,
        datamodule=cli.datamodule,
        ckpt_path=cli.options.ckpt_path,
        weights_only=True,
        return_predictions=False,
    )
    return SOME_ROWS_FAILED if throughput.num_errors else 0
