"""Tally: counts, and who is told of them."""

import pytest

from moe_lightning import tally as tally_file
from moe_lightning.tally import Tally


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds on the clock that the tally reads; to be changed by the test."""
    now_s = [100.0]
    monkeypatch.setattr(tally_file.time, "monotonic", lambda: now_s[0])
    return now_s


def test_counts_add_up() -> None:
    tally = Tally()
    tally.add(2, 30, 5, 10)
    tally.add(1, 10, 1, 0)
    tally.end_batch(num_errors=1)
    tally.end_batch(num_errors=0)
    assert (tally.num_rows, tally.num_prompt_tokens, tally.num_new_tokens) == (3, 40, 6)
    assert (tally.num_padding_tokens, tally.num_batches, tally.num_errors) == (10, 2, 1)


def test_tokens_per_second_counts_prompt_and_new_tokens(clock: list[float]) -> None:
    tally = Tally()
    tally.add(1, 30, 10, 99)
    clock[0] += 4.0
    assert tally.elapsed_s == 4.0
    assert tally.tokens_per_s == 10.0


def test_no_time_and_no_tokens_divide_nothing_by_zero(clock: list[float]) -> None:
    tally = Tally()
    assert tally.tokens_per_s == 0.0
    assert tally.padding_share == 0.0


def test_padding_share_is_of_what_prompts_took() -> None:
    tally = Tally()
    tally.add(1, 30, 1000, 10)
    assert tally.padding_share == 0.25


def test_reset_starts_at_zero_and_keeps_the_listeners(clock: list[float]) -> None:
    tally = Tally()
    heard: list[int] = []
    tally.listen(lambda: heard.append(tally.num_rows))
    tally.add(2, 1, 1, 1)
    tally.end_batch(num_errors=2)
    clock[0] += 5.0
    tally.reset()
    assert tally.elapsed_s == 0.0
    assert (tally.num_rows, tally.num_errors, tally.num_batches) == (0, 0, 0)
    assert (tally.num_prompt_tokens, tally.num_new_tokens, tally.num_padding_tokens) == (0, 0, 0)
    tally.add(7, 1, 1, 1)
    assert heard == [2, 7]


def test_listeners_hear_every_change_after_it_happened() -> None:
    tally = Tally()
    heard: list[tuple[str, int]] = []
    tally.listen(lambda: heard.append(("first", tally.num_rows)))
    tally.listen(lambda: heard.append(("second", tally.num_rows)))
    tally.add(1, 0, 0, 0)
    tally.add(-1, 0, 0, 0)
    assert heard == [("first", 1), ("second", 1), ("first", 0), ("second", 0)]
