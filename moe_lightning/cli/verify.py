"""``verify``: the same rows under the configured strategy and under one process of transformers."""

import gc
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from moe_lightning.callbacks import PredictionWriter, RowProgressBar
from moe_lightning.cli.base import MoECLI
from moe_lightning.data.prompts import PromptData
from moe_lightning.errors import UsageError
from moe_lightning.files import write_atomically
from moe_lightning.verification import (
    Capture,
    Outcome,
    ReferenceOptions,
    Watched,
    Watching,
    check_room,
    open_reference,
    parts_folder,
    reference_bytes,
    verify,
)

DIFFERENT = 1


def run(arguments: Sequence[str]) -> int:
    """Run the verb.

    Args:
        arguments: The command line after the verb.

    Returns:
        0 if all is within the tolerance, 1 otherwise.
    """
    cli = VerifyCLI(
        verb="verify",
        datamodule_class=PromptData,
        output_dir="./outputs/verify",
        callbacks={},
        trainer_defaults={
            "logger": False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "devices": 1,
            "callbacks": [RowProgressBar()],
        },
        skip={"optimizer", "lr_scheduler", "router_balance", "trainable", "batch_budget_tokens"},
        arguments=arguments,
    )
    options = cli.options
    _check(options)
    reference: ReferenceOptions = cli.config_init["reference"]
    view = open_reference(reference, cli.model.view)
    device = torch.device(reference.device)
    # Before anything is loaded: what can never fit.
    total = psutil.virtual_memory().total if device.type == "cpu" else None
    needed = reference_bytes(view, getattr(torch, reference.dtype))
    check_room(needed, device, total)
    output_dir = Path(options.output_dir)
    parent = parts_folder(output_dir)
    capture = Capture(parent, cli.model.routing_log)
    watching = Watching(capture)
    cli.model.task = Watched(
        capture,
        max_new_tokens=options.max_new_tokens,
        max_prompt_tokens=options.max_prompt_tokens,
    )
    cli.trainer.callbacks.append(watching)  # type: ignore[attr-defined]
    cli.datamodule.limit_rows = _fewer(options.num_rows, cli.datamodule.limit_rows)
    shows_progress = cli.trainer.progress_bar_callback is not None
    try:
        cli.trainer.predict(cli.model, datamodule=cli.datamodule, return_predictions=False)
        if not cli.trainer.is_global_zero:
            return 0  # the first rank goes on alone
        notes = [
            f"note: row {error.id!r} cannot be used: {error.error}"
            for error in cli.datamodule.row_errors
        ]
        configured = watching.configured
        del watching, capture
        _free(cli)
        if configured is None:
            raise UsageError("there are no rows to compare. Give some with --data.input.")
        outcome = verify(
            parent,
            configured,
            view,
            reference,
            tolerance=options.tolerance,
            notes=notes,
            shows_progress=shows_progress,
        )
    finally:
        if cli.trainer.is_global_zero:
            shutil.rmtree(parent, ignore_errors=True)
    _tell(outcome, output_dir)
    return 0 if outcome.has_passed else DIFFERENT


class VerifyCLI(MoECLI):
    """Options of predict, and those of the comparison."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--num_rows",
            type=int,
            default=16,
            help="How many rows of the input are compared, from its start.",
        )
        parser.add_argument(
            "--max_new_tokens",
            type=int,
            default=16,
            help="Greedy tokens that are compared of every row.",
        )
        parser.add_argument(
            "--max_prompt_tokens",
            type=int,
            default=256,
            help="Tokens of a prompt that are used. Until they are compared, all layers' results "
            "for them are on the disk of --output_dir.",
        )
        parser.add_argument(
            "--tolerance",
            type=float | None,
            default=None,
            help="The largest relative difference that passes. The default goes by the precision, "
            "the experts' backend and the precision of rows on their way.",
        )
        parser.add_class_arguments(ReferenceOptions, "reference")
        # So that a config of predict serves as it is; nothing is written by it here.
        parser.add_class_arguments(
            PredictionWriter, "writer", skip={"output_dir"}, instantiate=False
        )

    @override
    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        # The output directory may be that of the run that is looked into: its config.yaml and
        # report stay.
        self.save_config_callback = None
        self.config.report = False
        if self.config.ckpt_path is not None:
            raise UsageError(
                f"--ckpt_path {self.config.ckpt_path}: the reference reads no training "
                "checkpoints. Export it first, and give the new directory as --model.checkpoint."
            )


def _check(options: object) -> None:
    for name, least in (("num_rows", 1), ("max_new_tokens", 1), ("max_prompt_tokens", 1)):
        value = getattr(options, name)
        if value < least:
            raise UsageError(f"--{name} is {value}, but it must be at least {least}.")
    tolerance = getattr(options, "tolerance", None)
    if tolerance is not None and not tolerance > 0:
        raise UsageError(f"--tolerance is {tolerance}, but it must be above 0.")


def _fewer(wanted: int, limit: int | None) -> int:
    return wanted if limit is None else min(wanted, limit)


def _free(cli: MoECLI) -> None:
    """Let the configured model go: the reference may need its memory."""
    module = cli.model
    module.hosted = module.model = module.runner = None
    module.task = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _tell(outcome: Outcome, output_dir: Path) -> None:
    path = output_dir / "verify.json"
    write_atomically(path, json.dumps(outcome.to_json(), indent=1) + "\n")
    for line in outcome.lines():
        print(line)
    print(f"all numbers: {path}", file=sys.stderr)
