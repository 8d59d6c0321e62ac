"""What is computed together, for any plan, number of ranks and rows that are done."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moe_lightning.jobs import work_units


@st.composite
def plans(draw):
    """Batches of the rows 0 to n-1, some of which are in none; ranks; done rows; suspects."""
    num_rows = draw(st.integers(0, 30))
    rows = draw(st.permutations(range(num_rows)))
    rows = rows[: draw(st.integers(0, num_rows))]
    batches = []
    while rows:
        size = draw(st.integers(1, 5))
        batches.append(np.array(rows[:size], dtype=np.int64))
        rows = rows[size:]
    is_done_N = np.array([draw(st.booleans()) for _ in range(num_rows)], dtype=bool)
    planned = [int(row) for batch in batches for row in batch]
    alone = draw(st.sets(st.sampled_from(planned))) if planned else set()
    return batches, draw(st.integers(1, 9)), is_done_N, alone


def as_dict(units):
    found = {number: rows.tolist() for number, rows in units}
    assert len(found) == len(units), "two units have one number"
    return found


@given(plans())
def test_each_row_is_in_one_unit(plan):
    batches, num_ranks, _, alone = plan
    units = as_dict(work_units(batches, num_ranks=num_ranks, alone=alone))
    rows = [row for unit in units.values() for row in unit]
    assert sorted(rows) == sorted(int(row) for batch in batches for row in batch)
    assert all(units.values()), "a unit without rows"
    for row in alone:
        assert [row] in units.values()


@given(plans())
def test_what_is_done_is_left_out_and_the_rest_stays_together(plan):
    batches, num_ranks, is_done_N, alone = plan
    undisturbed = as_dict(work_units(batches, num_ranks=num_ranks, alone=alone))
    resumed = as_dict(work_units(batches, num_ranks=num_ranks, is_done_N=is_done_N, alone=alone))
    assert resumed == {
        number: rest
        for number, rows in undisturbed.items()
        if (rest := [row for row in rows if not is_done_N[row]])
    }


@given(plans())
def test_ranks_have_as_many_whole_batches_and_about_as_many_rows_of_the_rest(plan):
    batches, num_ranks, _, _ = plan
    units = as_dict(work_units(batches, num_ranks=num_ranks))
    num_whole = len(batches) // num_ranks * num_ranks
    for number in range(num_whole):
        assert units[number] == batches[number].tolist()
    pieces = [len(rows) for number, rows in units.items() if number >= num_whole]
    assert len(pieces) <= num_ranks
    assert not pieces or max(pieces) - min(pieces) <= 1
    assert min(units, default=0) >= (0 if num_whole else len(batches))


@given(plans())
def test_the_plan_is_not_changed_and_decides_all(plan):
    batches, num_ranks, is_done_N, alone = plan
    before = [batch.copy() for batch in batches]
    options = {"num_ranks": num_ranks, "is_done_N": is_done_N}
    first = as_dict(work_units(batches, alone=alone, **options))
    assert first == as_dict(work_units(batches, alone=sorted(alone, reverse=True), **options))
    assert all((batch == copy).all() for batch, copy in zip(batches, before, strict=True))
