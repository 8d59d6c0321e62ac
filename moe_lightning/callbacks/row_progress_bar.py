"""RowProgressBar: rows and tokens, not batches, while predict runs."""

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from tqdm.auto import tqdm
from typing_extensions import override

REFRESH_S = 0.2
BAR_FORMAT = "{desc}: {n_fmt}/{total_fmt} rows |{bar}| {elapsed}<{remaining}, {rate_fmt}{postfix}"


class RowProgressBar(TQDMProgressBar):
    """Lightning's progress bar, with rows done, rows/s and tokens/s during predict.

    It moves while a batch is computed, because one planned batch of Generate can take minutes.
    """

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        datamodule = getattr(trainer, "datamodule", None)
        total = getattr(datamodule, "num_rows", None)
        # Rows that need no computing: bad ones, and those of earlier runs of the job.
        self._num_before = getattr(datamodule, "num_done", 0) + len(
            getattr(datamodule, "row_errors", ())
        )
        self._tally: Any = getattr(pl_module, "tally", None)
        self._bar = tqdm(
            total=total,
            initial=self._num_before,
            desc="Predicting",
            unit="row",
            disable=self.is_disabled,
            file=sys.stderr,
            dynamic_ncols=True,
            bar_format=BAR_FORMAT,
        )
        self._shown_s = 0.0
        if self._tally is not None:
            self._tally.listen(self._refresh)

    def _refresh(self) -> None:
        now_s = time.monotonic()
        if now_s - self._shown_s < REFRESH_S:
            return
        self._shown_s = now_s
        self._show()

    def _show(self) -> None:
        if self._tally is None:
            return
        elsewhere = self._tally.num_rows_elsewhere
        self._bar.n = self._num_before + self._tally.num_rows + elsewhere
        self._bar.set_postfix_str(f"{self._tally.tokens_per_s:,.0f} tokens/s")

    @override
    def on_predict_batch_start(self, *args: Any, **kwargs: Any) -> None:
        pass

    @override
    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._show()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        # The message that follows gets a line of its own.
        if hasattr(self, "_bar"):
            self._bar.close()

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show()
        self._bar.close()
