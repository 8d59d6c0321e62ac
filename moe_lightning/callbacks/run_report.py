"""RunReport: one page of a run, ``report.html``."""

import sys
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from moe_lightning.reports import write_report


class RunReport(Callback):
    """Writes ``report.html``, a page of what the other callbacks wrote. Give it as the last one.

    Args:
        output_dir: Where the others write, and the page goes. The default is the trainer's
            ``default_root_dir``.
    """

    def __init__(self, output_dir: str | None = None) -> None:
        self.output_dir = output_dir

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero and stage in ("predict", "fit"):
            page = write_report(Path(self.output_dir or trainer.default_root_dir))
            print(f"report: {page}", file=sys.stderr)
