"""Ranks that agree on what happened before any of them goes on: all do, or all raise."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from moe_lightning.collectives import RankGroup
from moe_lightning.errors import MoELightningError, UsageError

T = TypeVar("T")


def of_all_ranks(value: T, ranks: RankGroup) -> list[T]:
    """Every rank's value, on every rank.

    Args:
        value: This rank's; one that can be pickled.
        ranks: The ranks.

    Returns:
        The values, in the order of the ranks.
    """
    if ranks.group is None:
        return [value]
    values: list[Any] = [None] * ranks.size
    dist.all_gather_object(values, value, group=ranks.group)
    return values


def together(ranks: RankGroup, act: Callable[[], T], what: str = "") -> T:
    """Do something on every rank; where one cannot, all of them raise its error.

    Args:
        act: What; it must not wait for other ranks.
        ranks: The ranks.
        what: Begins the message of an error of the system.

    Returns:
        This rank's result.

    Raises:
        MoELightningError: Of the first rank that raised one.
    """
    result, problem = None, None
    try:
        result = act()
    except MoELightningError as error:
        problem = error
    except OSError as error:
        problem = UsageError(f"{what}{error}. Free space, or choose another directory.")
    for found in of_all_ranks(problem, ranks):
        if found is not None:
            raise found
    assert problem is None, "it would have been raised"
    return result  # type: ignore[return-value]  # T may be None


def by_rank_0(ranks: RankGroup, act: Callable[[], T], what: str) -> T:
    """Do something on rank 0 and give every rank the result, or the error.

    Args:
        act: What.
        ranks: The ranks.
        what: Begins the message of an error of the system.

    Returns:
        Rank 0's result.

    Raises:
        MoELightningError: As rank 0 did.
    """

    def on_rank_0() -> T | None:
        return act() if ranks.rank == 0 else None

    result = together(ranks, on_rank_0, f"{what}: ")
    return of_all_ranks(result, ranks)[0]  # type: ignore[return-value]  # rank 0 has one
