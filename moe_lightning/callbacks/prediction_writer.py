"""PredictionWriter: one part file per batch, then one file in input order."""

import json
import shutil
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from typing_extensions import override

from moe_lightning.callbacks.merge import Parts, write_jsonl, write_parquet
from moe_lightning.data.rank_batches import NumberedBatch
from moe_lightning.data.records import RowBatch
from moe_lightning.errors import UsageError
from moe_lightning.files import atomic_writer, write_atomically
from moe_lightning.tasks.isolation import Predictions

PARTS = "parts"


class PredictionWriter(BasePredictionWriter):
    """Writes ``predictions.jsonl`` (or ``.parquet``) in input order, and ``errors.jsonl`` if rows
    failed.

    Every rank writes the parts of its own batches; the first rank merges them when all are done.

    Args:
        output_dir: Where the files go. The default is the trainer's ``default_root_dir``.
        format: Format of the predictions.
    """

    def __init__(
        self, output_dir: str | None = None, format: Literal["jsonl", "parquet"] = "jsonl"
    ) -> None:
        super().__init__(write_interval="batch")
        self.output_dir = output_dir
        self.format = format

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "predict":
            return
        self._directory = Path(
            trainer.strategy.broadcast(self.output_dir or trainer.default_root_dir)
        )
        if trainer.is_global_zero:
            try:
                shutil.rmtree(self._directory / PARTS, ignore_errors=True)
                (self._directory / PARTS).mkdir(parents=True)
            except OSError as error:
                raise UsageError(
                    f"--output_dir {self._directory}: cannot write there ({error.strerror}). "
                    "Choose another directory."
                ) from error
        trainer.strategy.barrier("parts directory")

    @override
    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        assert isinstance(prediction, Predictions), (
            "PredictionWriter writes what MoELightningModule predicts"
        )
        # Several ranks may have the same answers, and a rank may have none.
        if len(prediction) == 0 or not getattr(trainer.strategy, "writes_rows", True):
            return
        # Lightning's batch indices are unreliable (#10782, #13580); the batch knows its own number.
        number = batch.index if isinstance(batch, RowBatch | NumberedBatch) else batch_idx
        with atomic_writer(self._directory / PARTS / f"{dataloader_idx}-{number:08d}.part") as file:
            rows = zip(prediction.row_numbers, prediction.has_failed, prediction, strict=True)
            for row, failed, answer in rows:
                kind = "error" if failed else "ok"
                file.write(f"{row}\t{kind}\t{to_json(answer)}\n".encode())

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Not on_predict_end: Lightning leaves it out when there are no rows at all.
        if stage != "predict":
            return
        trainer.strategy.barrier("parts written")
        if not trainer.is_global_zero:
            return
        datamodule = getattr(trainer, "datamodule", None)
        parts = Parts(self._directory / PARTS)
        input_errors = {
            error.row: to_json(error.to_json()) for error in getattr(datamodule, "row_errors", ())
        }
        num_rows = getattr(datamodule, "num_rows", None)
        num_written = len(parts.rows_ok) + len(parts.rows_failed) + len(input_errors)
        is_limited = trainer.limit_predict_batches != 1.0
        assert num_rows is None or is_limited or num_rows == num_written, (
            f"{num_rows} rows in, but {num_written} rows out"
        )
        write = write_parquet if self.format == "parquet" else write_jsonl
        write(parts, self._directory / f"predictions.{self.format}")
        other = "jsonl" if self.format == "parquet" else "parquet"
        (self._directory / f"predictions.{other}").unlink(missing_ok=True)
        self._write_errors(parts, input_errors)
        shutil.rmtree(self._directory / PARTS)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        # Half a run is no result; run.json says why it ended.
        if trainer.is_global_zero and hasattr(self, "_directory"):
            shutil.rmtree(self._directory / PARTS, ignore_errors=True)

    def _write_errors(self, parts: Parts, input_errors: dict[int, str]) -> None:
        errors = input_errors | {row: parts.read(row) for row in parts.rows_failed}
        path = self._directory / "errors.jsonl"
        if errors:
            write_atomically(path, "".join(f"{errors[row]}\n" for row in sorted(errors)))
        else:
            path.unlink(missing_ok=True)


def to_json(row: dict[str, Any]) -> str:
    """One line of JSON, every character as itself; escaped where UTF-8 cannot (surrogates)."""
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(row)
    return text
