"""The data module of `predict`: an input file as a fixed list of batches.

    setup("predict"):  file ── scan ──▶ records ── encode ──▶ token counts ── plan ──▶ batches
    predict loop:      batch i ──▶ its rows, from memory or read and tokenised again

Memory: some 40 bytes a row for inputs of any size; small inputs are kept as tokens.
"""

import hashlib
import sys
from array import array
from collections.abc import Collection, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from tqdm import tqdm
from typing_extensions import override

from moe_lightning.data.batches import PlannedBatches
from moe_lightning.data.batching import plan_batches
from moe_lightning.data.encode import CHUNK_ROWS, Encoder
from moe_lightning.data.rank_batches import batches_of_rank
from moe_lightning.data.readers import InputFormat, open_source
from moe_lightning.data.records import Record, Row, RowBatch, RowError
from moe_lightning.data.remote_input import fetch_input
from moe_lightning.data.row_store import RowStore
from moe_lightning.data.source import RowSource
from moe_lightning.errors import UsageError
from moe_lightning.jobs.storages import is_url

MAX_TOKENS_IN_MEMORY = 5_000_000
# Long prompts are tokenised in smaller chunks, so that a chunk stays small.
_CHUNK_CHARACTERS = 4_000_000


class PlanningTask(Protocol):
    """What planning asks of a task."""

    @property
    def rows_factor(self) -> int:
        """How many budgets a planned batch holds, for tasks that refill finished rows."""

    @property
    def default_max_new_tokens(self) -> int:
        """Tokens that are generated for a row that does not say."""

    def planned_tokens(
        self, num_prompt_tokens_N: NDArray[np.int64], max_new_tokens_N: NDArray[np.int64], /
    ) -> NDArray[np.integer]:
        """Return how many tokens of the budget each row takes."""


class PromptData(LightningDataModule):
    """The prompts of a file, in batches of similar length that are planned before the run.

    Args:
        input: The file of prompts: JSON Lines (`{"id", "prompt"}`, `{"id", "messages"}` or OpenAI
            batch lines), Parquet, or text with one prompt a line; a path, or a URL that fsspec
            knows; `demo` means the prompts that ship with the package.
        format: The file's format; `auto` goes by the ending of its name.
        max_batch_tokens: The token budget of one batch, padding included; a longer row gets a batch
            of its own. Larger batches are faster and take more memory.
        limit_rows: Only the first so many rows of the file are used; null means all.
        max_forward_tokens: Tokens that are computed at once, for when memory runs out: unlike
            max_batch_tokens it may be changed in the middle of a job. null means max_batch_tokens.

    Attributes:
        num_rows: Number of rows of the input, good and bad.
        row_errors: The rows that could not be read or tokenised, by row number.
        batches: Row numbers of each planned batch.
        num_tokens_N: Tokens of each of the N good rows, by row number.
        num_done: Rows that an earlier run of the job computed.
        num_failed: How many of these failed.
    """

    def __init__(
        self,
        input: str = "demo",
        *,
        format: InputFormat = "auto",
        max_batch_tokens: int = 16384,
        limit_rows: int | None = None,
        max_forward_tokens: int | None = None,
    ) -> None:
        super().__init__()
        if max_batch_tokens <= 0:
            raise UsageError(
                f"--data.max_batch_tokens is {max_batch_tokens}, but a batch needs at least one "
                "token; the default is 16384."
            )
        if limit_rows is not None and limit_rows < 0:
            raise UsageError(
                f"--data.limit_rows is {limit_rows}; use 0 or more, or leave it out for all rows."
            )
        if max_forward_tokens is not None and max_forward_tokens <= 0:
            raise UsageError(
                f"--data.max_forward_tokens is {max_forward_tokens}; use 1 or more, or leave it "
                "out."
            )
        self.input = input
        self.format: InputFormat = format
        self.max_batch_tokens = max_batch_tokens
        self.limit_rows = limit_rows
        self.max_forward_tokens = max_forward_tokens
        self.num_rows = self.num_done = self.num_failed = 0
        self.row_errors: list[RowError] = []
        self.batches: list[NDArray[np.int64]] = []
        self.num_tokens_N: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._dataset: PlannedBatches | None = None

    @override
    def setup(self, stage: str) -> None:
        """Read and plan the input with the tokenizer and the task of the trainer's module."""
        if stage != "predict":
            raise UsageError(
                f"--data PromptData only serves predict, not {stage}; fit and validate need a data "
                "module for fine-tuning."
            )
        trainer = self.trainer
        assert trainer is not None, "setup is called by a trainer"
        module = cast(Any, trainer.lightning_module)
        is_quiet = not trainer.is_global_zero or trainer.progress_bar_callback is None
        self.plan(module.encoder, module.task, is_quiet=is_quiet)

    def plan(self, encoder: Encoder, task: PlanningTask, *, is_quiet: bool = True) -> None:
        """Read the whole input once and plan its batches; what `setup` does, without a trainer.

        Args:
            encoder: The checkpoint's tokenizer and limits.
            task: Says how many tokens a row costs.
            is_quiet: Whether no progress bar is shown.

        Raises:
            UsageError: If the input cannot be used at all.
        """
        source = open_source(self.path, format=self.format)
        self.num_rows, self.row_errors, self.num_done, self.num_failed = 0, [], 0, 0
        store: RowStore | None = RowStore(max_tokens=MAX_TOKENS_IN_MEMORY)
        rows, num_tokens, max_new_tokens = array("q"), array("q"), array("q")
        for item in self._rows(source, encoder, is_quiet=is_quiet):
            if isinstance(item, RowError):
                self.row_errors.append(item)
                continue
            rows.append(item.row)
            num_tokens.append(len(item.token_ids))
            own = item.options.max_new_tokens
            max_new_tokens.append(task.default_max_new_tokens if own is None else own)
            if store is not None and not store.add(item):
                store = None
        self.row_errors.sort(key=lambda error: error.row)
        rows_N, self.num_tokens_N = np.array(rows, np.int64), np.array(num_tokens, np.int64)
        costs_N = task.planned_tokens(self.num_tokens_N, np.array(max_new_tokens, np.int64))
        budget_tokens = self.max_batch_tokens * task.rows_factor
        self.batches = [rows_N[b] for b in plan_batches(costs_N, budget_tokens=budget_tokens)]
        self._dataset = PlannedBatches(self.batches, source=source, encoder=encoder, store=store)

    @override
    def predict_dataloader(self) -> DataLoader[RowBatch]:
        """Return the planned batches in order, one `RowBatch` an item; those of this rank."""
        assert self._dataset is not None, "setup('predict') comes first"
        loader = DataLoader(self._dataset, batch_size=None, num_workers=0)
        place = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        if place is None or place["num_replicas"] == 1:
            return loader
        # Lightning would give ranks whole batches, of which there may be fewer than ranks.
        return cast(
            DataLoader[RowBatch],
            batches_of_rank(loader, rank=place["rank"], num_ranks=place["num_replicas"]),
        )

    @property
    def budget_tokens(self) -> int:
        """Tokens that may be in flight at once, padding included."""
        return min(self.max_batch_tokens, self.max_forward_tokens or self.max_batch_tokens)

    @cached_property
    def path(self) -> Path:
        """The input file on this machine."""
        if self.input == "demo":
            from moe_lightning.demo import prompts_path

            return prompts_path()
        return fetch_input(self.input) if is_url(self.input) else Path(self.input)

    def identity(self) -> dict[str, Any]:
        """What of the input and its plan decides the answers; reads the whole file once.

        Returns:
            Plain values.
        """
        with open(self.path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256")
            num_bytes = file.tell()
        return {
            "input": {"bytes": num_bytes, "sha256": digest.hexdigest()},
            "format": self.format,
            "max_batch_tokens": self.max_batch_tokens,
            "limit_rows": self.limit_rows,
        }

    def leave_out(
        self, is_done_N: NDArray[np.bool_], *, num_failed: int = 0, suspects: Collection[int] = ()
    ) -> None:
        """Leave out rows that an earlier run of the job has computed; after `setup`.

        Args:
            is_done_N: For each of the input's N rows, whether it is done.
            num_failed: How many of these failed.
            suspects: Rows that are computed alone, since one of them ended an earlier run.
        """
        assert self._dataset is not None, "setup('predict') comes first"
        self._dataset.suspects = suspects
        self._dataset.is_done_N = is_done_N
        self.num_done, self.num_failed = int(is_done_N.sum()), num_failed

    @property
    def is_done(self) -> bool:
        """Whether earlier runs have left nothing to compute."""
        return bool(self.num_done) and not self._dataset

    def _rows(
        self, source: RowSource, encoder: Encoder, *, is_quiet: bool
    ) -> Iterator[Row | RowError]:
        """Yield Row and RowError; the rows of a chunk come after its read errors."""
        chunk: list[Record] = []
        num_characters = 0
        with tqdm(
            total=source.num_bytes,
            desc="Planning",
            unit="B",
            unit_scale=True,
            delay=1,  # seconds; small inputs show no bar
            file=sys.stderr,
            disable=is_quiet,
            leave=False,
        ) as bar:
            if self.limit_rows == 0:
                return
            for item in source.scan():
                self.num_rows += 1
                if isinstance(item, RowError):
                    yield item
                else:
                    chunk.append(item)
                    num_characters += _num_characters(item)
                is_last = self.num_rows == self.limit_rows
                if is_last or len(chunk) == CHUNK_ROWS or num_characters > _CHUNK_CHARACTERS:
                    yield from encoder.encode(chunk)
                    chunk, num_characters = [], 0
                    bar.update(source.num_bytes_scanned - bar.n)
                if is_last:
                    break
            yield from encoder.encode(chunk)


def _num_characters(record: Record) -> int:
    if record.messages is None:
        return len(record.prompt or "")
    return sum(len(message["content"]) for message in record.messages)
