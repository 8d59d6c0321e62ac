"""Ranks do as many forwards as the busiest of them, whatever each has to do."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks

from moe_lightning.collectives import RankGroup
from moe_lightning.modeling.lock_step import LockStep


def forwards(numbers_by_run):
    """Run after run, so many forwards with rows; every forward needs all ranks.

    Returns:
        For each run, the sums that this rank's forwards gave.
    """
    lock_step = LockStep(RankGroup(dist.group.WORLD))
    seen = []
    for numbers in numbers_by_run:
        sums = []

        def forward(has_rows, sums=sums):
            value = torch.tensor(has_rows)
            dist.all_reduce(value)  # hangs without the others
            sums.append(int(value))

        for _ in range(numbers[dist.get_rank()]):
            lock_step.begin_forward()
            forward(1)
        lock_step.idle_until_all_are_done(lambda forward=forward: forward(0))
        seen.append(sums)
    return seen


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_all_do_as_many_as_the_busiest(num_ranks) -> None:
    runs = [[3, 1, 0], [0, 0, 0], [0, 5, 2], [2, 2, 2]]
    results = run_on_ranks(num_ranks, forwards, runs)
    for number, run in enumerate(runs):
        numbers = run[:num_ranks]
        # How many ranks had rows in each forward.
        expected = [sum(n > step for n in numbers) for step in range(max(numbers))]
        assert [result[number] for result in results] == [expected] * num_ranks


def test_a_process_alone_never_idles() -> None:
    lock_step = LockStep(RankGroup())
    lock_step.begin_forward()
    lock_step.idle_until_all_are_done(lambda: pytest.fail("nobody has rows"))
