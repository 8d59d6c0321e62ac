"""The batches of one rank, as many as every other rank has.

    plan of 5 batches, 2 ranks      rank 0     rank 1
    a round each of whole batches   0          1
                                    2          3
    the rest, split by rows         4, even    4, odd      (jobs.work_units)

Ranks whose forwards exchange things must take part in as many batches as the others; a rank without
rows in a round gets an empty batch. A user's own dataloader is read whole by every rank, which
takes every so many-th of its batches.
"""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from moe_lightning.data.batches import PlannedBatches
from moe_lightning.data.records import RowBatch


class NumberedBatch:
    """A batch of a user's own dataloader, and where it is among all.

    Attributes:
        batch: What the dataloader gave.
        index: Number of the batch over all ranks.
        first_row: Number of its first row over all ranks.
    """

    def __init__(self, batch: Any, *, index: int, first_row: int) -> None:
        self.batch = batch
        self.index = index
        self.first_row = first_row


def batches_of_rank(loader: Any, *, rank: int, num_ranks: int) -> Any:
    """The share of a rank of a dataloader for predict.

    Args:
        loader: PromptData's dataloader, or any iterable of batches, the same on every rank.
        rank: This rank among those that get rows of their own.
        num_ranks: Their number.

    Returns:
        A loader of this rank's batches; of equal length on every rank.
    """
    dataset = getattr(loader, "dataset", None)
    if isinstance(dataset, _PlannedShare):
        return loader
    if isinstance(dataset, PlannedBatches):
        return DataLoader(_PlannedShare(dataset, rank, num_ranks), batch_size=None, num_workers=0)
    share = _LoaderShare(loader, rank, num_ranks)
    return DataLoader(share, batch_size=None, num_workers=0)


class _PlannedShare(IterableDataset[RowBatch]):  # which Lightning does not share out again
    def __init__(self, planned: PlannedBatches, rank: int, num_ranks: int) -> None:
        self._planned = planned
        self._rank = rank
        self._num_ranks = num_ranks
        self._units = planned.units(num_ranks)

    def __len__(self) -> int:
        return -(-len(self._units) // self._num_ranks)

    @override
    def __iter__(self) -> Iterator[RowBatch]:
        for number in range(len(self)):
            place = number * self._num_ranks + self._rank
            is_there = place < len(self._units)
            yield self._planned.read(self._units[place]) if is_there else RowBatch(place, [], [])


class _LoaderShare(IterableDataset[Any]):
    def __init__(self, loader: Any, rank: int, num_ranks: int) -> None:
        self._loader = loader
        self._rank = rank
        self._num_ranks = num_ranks

    def __len__(self) -> int:
        return -(-len(self._loader) // self._num_ranks)

    @override
    def __iter__(self) -> Iterator[NumberedBatch | RowBatch]:
        first_row = index = 0
        batches = iter(self._loader)
        while round_ := list(islice(batches, self._num_ranks)):
            own: NumberedBatch | RowBatch = RowBatch(index + self._rank, [], [])
            for place, batch in enumerate(round_):
                if place == self._rank:
                    own = NumberedBatch(batch, index=index + place, first_row=first_row)
                first_row += _num_rows(batch)
            yield own
            index += len(round_)


def _num_rows(batch: Any) -> int:
    """Rows of a batch in any of the forms that ``as_row_batch`` takes."""
    if isinstance(batch, RowBatch):
        return len(batch.rows) + len(batch.errors)
    if isinstance(batch, Mapping):
        column: Any = next(iter(batch.values()), [])
        return int(column.shape[0]) if isinstance(column, Tensor) else len(column)
    return len(batch)
