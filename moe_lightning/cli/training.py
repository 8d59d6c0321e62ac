"""What ``fit`` and ``validate`` share."""

from collections.abc import Sequence

from moe_lightning.callbacks import SaveCheckpoints, Throughput
from moe_lightning.cli.base import MoECLI
from moe_lightning.data.finetune import TextData


def training_cli(verb: str, arguments: Sequence[str], *, output_dir: str) -> MoECLI:
    """Module, data and trainer of a training verb.

    Args:
        arguments: The command line after the verb.
        output_dir: Default of ``--output_dir``.

    Returns:
        The parsed command line, everything built.
    """
    return MoECLI(
        verb=verb,
        datamodule_class=TextData,
        output_dir=output_dir,
        callbacks={"save": (SaveCheckpoints, "output_dir")},
        trainer_defaults={
            "devices": 1,
            "enable_model_summary": False,
            "callbacks": [Throughput()] if verb == "fit" else [],
        },
        skip={"batch_budget_tokens"},
        arguments=arguments,
    )
