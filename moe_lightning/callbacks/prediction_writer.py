"""PredictionWriter: what predict computes, committed batch by batch, as a job that can go on.

setup             ── plan ──▶ Job ──▶ rows to leave out ──▶ PromptData
each batch        ── rows ──▶ part and ledger;  the ranks agree whether to go on
teardown          ── parts ──▶ predictions and errors in the order of the input
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from typing_extensions import override

from moe_lightning.callbacks.run_identity import identity_of_run
from moe_lightning.callbacks.stop_request import StopRequest
from moe_lightning.collectives import RankGroup
from moe_lightning.data.rank_batches import NumberedBatch
from moe_lightning.data.records import RowBatch
from moe_lightning.errors import MoELightningError, StoppedError, TooManyRowsFailedError, UsageError
from moe_lightning.files import is_disk_full, remove_temporaries
from moe_lightning.jobs import Job, JobPlan, Outcome, PartWriter, Patience, open_storage
from moe_lightning.jobs.storages import is_url
from moe_lightning.tasks.isolation import BadBatchError, Predictions


class PredictionWriter(BasePredictionWriter):
    """Writes ``predictions.jsonl`` (or ``.parquet``) in input order, and ``errors.jsonl`` if rows
    failed.

    Every rank commits its own batches. With ``PromptData`` the run is a job: killed at any moment,
    the same command continues, with other ranks, workers or another strategy if need be. Rows of
    other dataloaders are not known before the run, which always begins anew.

    Args:
        output_dir: Where the files go: a directory, or a URL that fsspec knows. The default is the
            trainer's ``default_root_dir``.
        format: Format of the predictions.
        restart: Whether to forget what an earlier run did there.
        retry_errors: Whether to compute rows again that failed in an earlier run.
        max_errors: Number of failed rows above which the run ends early. The default is no limit.
        full_disk_wait_s: Seconds to wait for space on a full disk before the run ends; shorter than
            the ranks wait for each other.
        ckpt_path: The training checkpoint that ``trainer.predict`` is given, if any: a job is not
            continued with another one.

    Attributes:
        outcome: After the run, on the first rank: how many rows were answered.
    """

    def __init__(
        self,
        output_dir: str | None = None,
        format: Literal["jsonl", "parquet"] = "jsonl",
        *,
        restart: bool = False,
        retry_errors: bool = False,
        max_errors: int | None = None,
        full_disk_wait_s: float = 90.0,
        ckpt_path: str | None = None,
    ) -> None:
        super().__init__(write_interval="batch")
        if max_errors is not None and max_errors < 0:
            raise UsageError(f"max_errors is {max_errors}; use 0 or more, or leave it out.")
        self.output_dir = output_dir
        self.format: Literal["jsonl", "parquet"] = format
        self.restart = restart
        self.retry_errors = retry_errors
        self.max_errors = max_errors
        self.full_disk_wait_s = full_disk_wait_s
        self.ckpt_path = ckpt_path
        self.outcome: Outcome | None = None
        self._job: Job | None = None  # on the first rank
        self._parts: PartWriter | None = None
        self._stop = StopRequest()

    # Before the run.

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "predict":
            return
        self._place = str(trainer.strategy.broadcast(self.output_dir or trainer.default_root_dir))
        self._stop = StopRequest(pass_on=_killer(trainer))
        self._patience = Patience(self.full_disk_wait_s, is_stopped=lambda: self._stop.is_made)
        self.outcome, self._job, self._parts = None, None, None
        datamodule = getattr(trainer, "datamodule", None)
        is_planned = hasattr(datamodule, "leave_out")
        found: Any = None
        if trainer.is_global_zero:
            found = self._open(trainer, pl_module, datamodule if is_planned else None)
        found = trainer.strategy.broadcast(found)
        if isinstance(found, MoELightningError):
            raise found
        folder, epoch, is_done_N, num_failed, suspects = found
        self._num_done, self._num_errors = int(is_done_N.sum()), num_failed
        if is_planned:
            assert datamodule is not None, "it has a plan"
            datamodule.leave_out(is_done_N, num_failed=num_failed, suspects=suspects)
            self._num_errors += len(datamodule.row_errors)
        if epoch:  # a finished job begins none, and all ranks know that
            storage = self._job.storage if self._job is not None else open_storage(self._place)
            self._parts = PartWriter(storage, folder, epoch=epoch, rank=trainer.global_rank)
            self._check_shared(trainer)
        self._check_max_errors(trainer)

    def _open(
        self, trainer: Trainer, pl_module: LightningModule, datamodule: Any
    ) -> tuple[str, int, Any, int, set[int]] | MoELightningError:
        try:
            plan = JobPlan()
            if datamodule is not None:
                identity = identity_of_run(trainer, pl_module, datamodule, self.ckpt_path)
                identity["writer"] = {"format": self.format}
                plan = JobPlan(identity, datamodule.num_rows, datamodule.batches)
            job = Job.open(
                open_storage(self._place),
                plan,
                restart=self.restart,
                retry_errors=self.retry_errors,
            )
        except MoELightningError as error:
            return error
        except OSError as error:
            if is_disk_full(error):
                return StoppedError(
                    f"{self._place}: the disk is full. What was committed before is safe; make "
                    "room, and the same command continues."
                )
            return UsageError(
                f"--output_dir {self._place}: cannot write there ({error.strerror or error}). "
                "Choose another directory."
            )
        self._job = job
        if not is_url(self._place):
            remove_temporaries(Path(self._place))
        return job.folder, job.epoch, job.is_done_N, job.num_failed, job.suspects

    def _check_shared(self, trainer: Trainer) -> None:
        """Every rank must see what the first one has begun."""
        assert self._parts is not None, "the job is open"
        device = trainer.strategy.root_device  # NCCL sums nothing on the host
        is_blind = torch.tensor(float(not self._parts.has_begun()), device=device)
        if float(torch.as_tensor(trainer.strategy.reduce(is_blind, reduce_op="sum"))):
            raise UsageError(
                f"--output_dir {self._place} is not the same directory for all ranks. Machines "
                "must share it: use a network file system, or a URL."
            )

    # During the run.

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop.install()

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
        # Several ranks may have the same answers.
        writes = bool(getattr(trainer.strategy, "writes_rows", True))
        problem: StoppedError | None = None
        if writes and len(prediction):
            # Lightning's batch indices are unreliable (#10782, #13580); the batch knows its own.
            number = batch.index if isinstance(batch, RowBatch | NumberedBatch) else batch_idx
            try:
                self._commit(f"{dataloader_idx}-{number:08d}", prediction)
            except StoppedError as error:
                problem = error
        own = [
            problem is not None,
            self._stop.is_made,
            prediction.num_errors * writes,
            len(prediction) * writes,
        ]
        # Ranks that move in lock step stop in lock step.
        ranks: RankGroup = getattr(trainer.strategy, "host_ranks", RankGroup())
        total = ranks.sum(torch.tensor(own, dtype=torch.int64)).tolist()
        num_problems, num_stops, num_errors, num_rows = total
        self._num_errors += num_errors
        self._num_done += num_rows
        tally: Any = getattr(pl_module, "tally", None)
        if tally is not None:
            tally.add_elsewhere(num_rows - int(own[3]))
        if problem is not None:
            raise problem
        if num_problems:
            raise StoppedError("another rank could not write; it says why.")
        self._check_max_errors(trainer)
        progress: Any = trainer.predict_loop.batch_progress
        if num_stops and not progress.is_last_batch:
            raise StoppedError(self._interrupted(trainer))

    def _commit(self, name: str, prediction: Predictions) -> None:
        assert self._parts is not None, "setup has run"
        parts = self._parts
        rows = [
            (row, not has_failed, to_json(answer))
            for row, has_failed, answer in zip(
                prediction.row_numbers, prediction.has_failed, prediction, strict=True
            )
        ]
        self._patience(lambda: parts.commit(name, rows), self._place)

    def _interrupted(self, trainer: Trainer) -> str:
        datamodule: Any = getattr(trainer, "datamodule", None)
        if not hasattr(datamodule, "leave_out"):
            return "interrupted; the same command starts again."
        num_rows = datamodule.num_rows - len(datamodule.row_errors)
        return (
            f"interrupted; {self._num_done:,} of {num_rows:,} rows are done, and the same command "
            "continues."
        )

    def _check_max_errors(self, trainer: Trainer) -> None:
        if self.max_errors is None or self._num_errors <= self.max_errors:
            return
        if self._job is not None:
            self._finish(trainer, is_limited=True)
        raise TooManyRowsFailedError(
            f"{self._num_errors:,} rows failed, more than --max_errors {self.max_errors:,}: see "
            f"errors.jsonl in {self._place}. The same command continues with a larger number."
        )

    # After the run.

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Not on_predict_end: Lightning leaves it out when there are no rows at all.
        if stage != "predict":
            return
        trainer.strategy.barrier("parts written")
        try:
            if self._job is not None:
                is_limited = trainer.limit_predict_batches != 1.0
                self.outcome = self._finish(trainer, is_limited=is_limited)
        finally:
            self._close()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if isinstance(exception, BadBatchError) and self._parts is not None:
            with suppress(OSError):
                self._parts.suspect({e.row: to_json(e.to_json()) for e in exception.errors})
        self._close()

    def _finish(self, trainer: Trainer, *, is_limited: bool) -> Outcome:
        job = self._job
        assert job is not None, "this is the first rank"
        datamodule = getattr(trainer, "datamodule", None)

        def input_errors() -> Iterator[tuple[int, str]]:
            for error in getattr(datamodule, "row_errors", ()):
                yield error.row, to_json(error.to_json())

        return self._patience(
            lambda: job.finish(input_errors, self.format, is_limited=is_limited), self._place
        )

    def _close(self) -> None:
        self._stop.restore()
        if self._job is not None:
            self._job.close()
            self._job = None


def _killer(trainer: Trainer) -> Any:
    """Passes a signal on to the ranks that this process has started."""
    launcher: Any = trainer.strategy.launcher
    return launcher.kill if hasattr(launcher, "kill") else lambda _: None


def to_json(row: dict[str, Any]) -> str:
    """One line of JSON, every character as itself; escaped where UTF-8 cannot (surrogates)."""
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(row)
    return text
