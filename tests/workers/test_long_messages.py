"""Rows that are too many for one message."""

import pytest

from moe_lightning.placement import ExpertPlacement
from moe_lightning.workers.question import WireOptions

TWO_WORKERS = ExpertPlacement(2, {n: tuple((e % 2,) for e in range(8)) for n in range(3)})


@pytest.mark.parametrize("message_bytes", [1, 128, 5 * 128, 10**6])
def test_rows_go_in_as_many_messages_as_they_need(
    message_bytes, worker_threads, checkpoint, master, check_sums
):
    # A row is 32 numbers of 4 bytes.
    wire = WireOptions(message_bytes=message_bytes)
    made = master(worker_threads(checkpoint, 2), TWO_WORKERS, wire=wire)
    first = next(made.fleet.roster.ids)
    check_sums(made, num_rows=23)
    num_messages = next(made.fleet.roster.ids) - first - 1
    # Three layers, two workers; each takes 23 rows or fewer, since some have no expert there.
    most = {1: 23, 128: 23, 640: 5, 10**6: 1}[message_bytes]
    assert 3 * most < num_messages <= 6 * most
