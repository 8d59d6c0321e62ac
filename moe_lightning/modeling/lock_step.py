"""LockStep: ranks whose forwards exchange things do as many forwards as the busiest of them.

    rank 0:   rows   rows   rows   idle        idle: a forward of one token, whose answer nobody
    rank 1:   rows   idle   idle   ...               wants, so that the others get their exchange

Before each forward the ranks say whether they have rows, in one small sum on the host. A rank that
is done goes on idling until nobody has rows left: batches may be of any number and length on every
rank, and so may the answers that ``generate`` makes.
"""

from collections.abc import Callable

import torch

from moe_lightning.collectives import RankGroup


class LockStep:
    """The forwards of this rank among those of the others.

    Args:
        ranks: All ranks whose forwards exchange things, on a group of the host's (gloo).
    """

    def __init__(self, ranks: RankGroup) -> None:
        self._ranks = ranks

    def begin_forward(self) -> None:
        """Say that a forward with rows is next; every such forward is announced."""
        self._num_ranks_with_rows(1)

    def idle_until_all_are_done(self, idle_forward: Callable[[], None]) -> None:
        """Keep the others company until none of them has rows.

        Args:
            idle_forward: One forward that nobody wants, of the same layers.
        """
        while self._num_ranks_with_rows(0) > 0:
            idle_forward()

    def _num_ranks_with_rows(self, has_rows: int) -> int:
        return int(self._ranks.sum(torch.tensor(has_rows)))
