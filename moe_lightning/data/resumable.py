"""Loaders of training and validation batches over ranks.

    batch       0     1    │  2     3    │  4 ...
    epoch       0          │  1          │  2
    sequences   7294  0518 │  ...           in a new order every epoch; 6 and 3 are left out of this
    rank 0      7 9   0 1
    rank 1       2 4   5 8

Which sequences a batch holds follows from the seed, its number and the rank alone, so that a run
that stops anywhere goes on with the batches it would have had.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from moe_lightning.data.packing import TrainingSequences

Batch = dict[str, Tensor]


class _RankBatches(Dataset[Batch]):
    """The batches of one rank, numbered on and on over the epochs.

    Args:
        sequences: The sequences.
        num_batches: The number of batches of an epoch.
        batch_size: Sequences of a batch, per rank.
        rank: The rank among those that get different data.
        num_ranks: Their number.
        seed: The seed of the order of an epoch; None keeps the order of the file.
    """

    def __init__(
        self,
        sequences: TrainingSequences,
        *,
        num_batches: int,
        batch_size: int,
        rank: int,
        num_ranks: int,
        seed: int | None,
    ) -> None:
        self.sequences = sequences
        self.num_batches = num_batches
        self.batch_size = batch_size
        self.rank = rank
        self.num_ranks = num_ranks
        self.seed = seed
        self._epoch = -1
        self._order_N: NDArray[np.int64] = np.arange(len(sequences))

    def __getitem__(self, number: int) -> Batch:
        epoch, number = divmod(number, self.num_batches)
        if self.seed is not None and epoch != self._epoch:
            self._order_N = np.random.default_rng([self.seed, epoch]).permutation(
                len(self.sequences)
            )
            self._epoch = epoch
        first = number * self.batch_size * self.num_ranks + self.rank
        places_B = [first + b * self.num_ranks for b in range(self.batch_size)]
        num = len(self._order_N)
        arrays = self.sequences.batch(
            [int(self._order_N[place % num]) for place in places_B],
            [place >= num for place in places_B],
        )
        return {name: torch.from_numpy(values) for name, values in arrays.items()}

    def load(self, numbers: range, num_workers: int) -> Iterator[Batch]:
        if num_workers == 0:
            return (self[number] for number in numbers)
        loader = DataLoader(self, sampler=numbers, batch_size=None, num_workers=num_workers)
        return iter(loader)


class TrainLoader:
    """Batches in a new random order every epoch, which goes on where a stopped run was.

    The last sequences that don't fill a batch of every rank are left out of the epoch. This is no
    DataLoader, so that Lightning adds no sampler of its own.

    Args:
        sequences: What to learn.
        batch_size: Sequences of a batch, per rank.
        rank: The rank among those that get different data.
        num_ranks: Their number.
        seed: The seed of the order.
        num_workers: Processes that make batches ahead of time; 0 makes them when they are due.
        num_done: Gives the number of batches that the run has done, over all epochs.
    """

    def __init__(
        self,
        sequences: TrainingSequences,
        *,
        batch_size: int,
        rank: int,
        num_ranks: int,
        seed: int,
        num_workers: int,
        num_done: Callable[[], int],
    ) -> None:
        self.sequences = sequences
        self.batch_size = batch_size
        self.rank = rank
        self.num_ranks = num_ranks
        self.seed = seed
        self.num_workers = num_workers
        self._num_done = num_done

    def __len__(self) -> int:
        return len(self.sequences) // (self.batch_size * self.num_ranks)

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over as many batches as an epoch has, from the first that is not done.

        Returns:
            The iterator. It asks how many are done only when its first batch is due: Lightning
            makes it before it has restored them.
        """
        batches = _RankBatches(
            self.sequences,
            num_batches=len(self),
            batch_size=self.batch_size,
            rank=self.rank,
            num_ranks=self.num_ranks,
            seed=self.seed,
        )
        first = self._num_done()
        yield from batches.load(range(first, first + len(self)), self.num_workers)

    def state_dict(self) -> dict[str, Any]:
        """Return what the order of batches depends on; Lightning counts the batches itself."""
        return {
            "data": self.sequences.cache.directory.name,
            "num_sequences": len(self.sequences),
            "sequence_length": self.sequences.sequence_length,
            "batch_size": self.batch_size,
            "num_ranks": self.num_ranks,
            "seed": self.seed,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Warn where a resumed run does not see the batches that the stopped one would have seen.

        Args:
            state_dict: What `state_dict` gave in the stopped run.
        """
        changed = [
            f"{name} {state_dict.get(name)} -> {value}"
            for name, value in self.state_dict().items()
            if state_dict.get(name) != value
        ]
        if changed:
            rank_zero_warn(
                f"The training data is not that of the checkpoint ({', '.join(changed)}): the rest "
                "of this epoch repeats some sequences and leaves out others."
            )


class ValidationLoader:
    """Every sequence once, in order; the last batch is filled up with repeats without targets.

    Args:
        sequences: What to evaluate.
        batch_size: Sequences of a batch, per rank.
        rank: The rank among those that get different data.
        num_ranks: Their number.
        num_workers: Processes that make batches ahead of time; 0 makes them when they are due.
    """

    def __init__(
        self,
        sequences: TrainingSequences,
        *,
        batch_size: int,
        rank: int,
        num_ranks: int,
        num_workers: int,
    ) -> None:
        self._num_batches = -(-len(sequences) // (batch_size * num_ranks))
        self._batches = _RankBatches(
            sequences,
            num_batches=self._num_batches,
            batch_size=batch_size,
            rank=rank,
            num_ranks=num_ranks,
            seed=None,
        )
        self._num_workers = num_workers

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        return self._batches.load(range(len(self)), self._num_workers)
