"""``fit``: fine-tune a checkpoint."""

from collections.abc import Sequence

from moe_lightning.cli.training import training_cli


def run(arguments: Sequence[str]) -> int:
    """Run the verb.

    Args:
        arguments: The command line after the verb.

    Returns:
        0.
    """
    cli = training_cli("fit", arguments, output_dir="./outputs/fit")
    cli.trainer.fit(
        cli.model, datamodule=cli.datamodule, ckpt_path=cli.options.ckpt_path, weights_only=True
    )
    return 0
