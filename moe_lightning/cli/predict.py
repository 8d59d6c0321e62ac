"""``predict``: batched inference over a file of prompts, a job that the same command continues."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from moe_lightning.callbacks import (
    PlacementFile,
    PredictionWriter,
    RowProgressBar,
    Throughput,
)
from moe_lightning.cli.base import MoECLI
from moe_lightning.data.prompts import PromptData
from moe_lightning.jobs import open_storage
from moe_lightning.jobs.storages import is_url

SOME_ROWS_FAILED = 3


class PredictCLI(MoECLI):
    """The command line of predict: what a job may be told stands beside ``--output_dir``.

    Args:
        **options: As of MoECLI.
    """

    def __init__(self, **options: Any) -> None:
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        super().__init__(**options)

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--restart",
            type=bool,
            nargs="?",
            const=True,
            default=False,
            help="Forget what an earlier run did in --output_dir, and begin anew. The default is "
            "to continue it.",
        )
        parser.add_argument(
            "--retry_errors",
            type=bool,
            nargs="?",
            const=True,
            default=False,
            help="Compute rows again that failed in an earlier run of the same job. The default is "
            "to leave them in errors.jsonl.",
        )
        parser.add_argument(
            "--max_errors",
            type=int | None,
            default=None,
            help="Number of failed rows above which the run ends early. The default is no limit.",
        )
        for name in ("restart", "retry_errors", "max_errors", "ckpt_path"):
            parser.link_arguments(name, f"writer.{name}")

    @override
    def before_instantiate_classes(self) -> None:
        url = self.config.output_dir
        if is_url(url):
            open_storage(url)  # a wrong one is refused before anything is loaded
            self._directory = tempfile.TemporaryDirectory(prefix="moe_lightning-")
            self.config.output_dir = self.config.trainer.default_root_dir = self._directory.name
        super().before_instantiate_classes()
        self.config.output_dir = url
        self.config.writer.ckpt_path = self.config.ckpt_path  # where last is the newest

    @contextmanager
    def sending_files(self) -> Iterator[None]:
        """Copy what the run writes beside its job to a URL, if ``--output_dir`` is one."""
        try:
            yield
        finally:
            if self._directory is not None:
                if self.trainer.is_global_zero:
                    storage, directory = open_storage(self.options.output_dir), self._directory.name
                    for path in sorted(p for p in Path(directory).rglob("*") if p.is_file()):
                        storage.write(str(path.relative_to(directory)), path.read_bytes())
                self._directory.cleanup()


def run(arguments: Sequence[str]) -> int:
    """Run the verb.

    Args:
        arguments: The command line after the verb.

    Returns:
        0 if every row was answered, 3 if some are in ``errors.jsonl``.
    """
    throughput = Throughput()
    cli = PredictCLI(
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
    throughput.place = cli.options.output_dir
    with cli.sending_files():
        cli.trainer.predict(
            cli.model,
            datamodule=cli.datamodule,
            ckpt_path=cli.options.ckpt_path,
            weights_only=True,
            return_predictions=False,
        )
    return SOME_ROWS_FAILED if throughput.num_errors else 0
