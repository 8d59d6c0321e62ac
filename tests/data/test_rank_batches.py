"""Every row is in one rank's batches, and all ranks have the same number of batches."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.data import has_iterable_dataset
from tiny_tokenizer import make_tokenizer
from torch.utils.data import DataLoader, IterableDataset, default_collate

from moe_lightning.data.encode import Encoder
from moe_lightning.data.prompts import PromptData
from moe_lightning.data.rank_batches import NumberedBatch, batches_of_rank
from moe_lightning.data.records import Row, RowBatch, RowOptions
from moe_lightning.tasks import Score

ENCODER = Encoder(make_tokenizer(), max_positions=64, vocab_size=10, add_generation_prompt=False)


@pytest.fixture
def planned(tmp_path):
    """The dataloader of so many planned batches of two rows each."""

    def data(num_batches):
        file = tmp_path / f"{num_batches}.jsonl"
        rows = [{"id": n, "prompt": "a b c"} for n in range(2 * num_batches)]
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        data = PromptData(str(file), max_batch_tokens=8)  # a row has 4 with <s>
        data.plan(ENCODER, Score())
        assert len(data.batches) == num_batches
        return data

    def planned(num_batches):
        return data(num_batches).predict_dataloader()

    planned.data = data
    return planned


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("num_batches", [0, 1, 2, 3, 5, 8])
def test_planned_batches(num_batches, num_ranks, planned) -> None:
    loader = planned(num_batches)
    shares = [
        list(batches_of_rank(loader, rank=rank, num_ranks=num_ranks)) for rank in range(num_ranks)
    ]
    assert {len(share) for share in shares} == {-(-num_batches // num_ranks)}
    assert {len(batches_of_rank(loader, rank=0, num_ranks=num_ranks))} == {len(shares[0])}
    batches = [batch for share in shares for batch in share]
    ids = sorted(row.id for batch in batches for row in batch.rows)
    assert ids == list(range(2 * num_batches))
    numbers = [batch.index for batch in batches if batch.rows]
    assert len(set(numbers)) == len(numbers), "two parts of the output would have one name"
    # What is left after whole rounds is shared row by row: no rank has two rows more.
    last = [len(share[-1].rows) for share in shares if share]
    assert not last or max(last) - min(last) <= 1


@pytest.mark.parametrize("num_batches", [0, 1, 3])
def test_ranks_of_other_strategies_get_shares_too(num_batches, planned) -> None:
    """Lightning's ddp: a batch fewer than ranks leaves none without rows, and none dies."""
    data = planned.data(num_batches)
    shares = []
    for rank in range(2):
        trainer = SimpleNamespace(distributed_sampler_kwargs={"rank": rank, "num_replicas": 2})
        data.trainer = trainer
        loader = data.predict_dataloader()
        assert has_iterable_dataset(loader), "Lightning would share it out again"
        assert batches_of_rank(loader, rank=rank, num_ranks=2) is loader
        shares.append(list(loader))
    assert len(shares[0]) == len(shares[1])
    ids = [row.id for share in shares for batch in share for row in batch.rows]
    assert sorted(ids) == list(range(2 * num_batches))


def test_whole_batches_stay_as_they_were_planned(planned) -> None:
    loader = planned(5)
    expected = [[row.id for row in batch.rows] for batch in loader]
    shares = [list(batches_of_rank(loader, rank=rank, num_ranks=2)) for rank in range(2)]
    got = [[row.id for row in batch.rows] for batch in (*shares[0], *shares[1])]
    assert got[:2] == [expected[0], expected[2]]
    assert got[3:5] == [expected[1], expected[3]]
    assert sorted(got[2] + got[5]) == sorted(expected[4])


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_what_is_done_is_left_out_and_what_is_left_stays_together(num_ranks, planned) -> None:
    loader = planned(5)

    def together():
        shares = [
            list(batches_of_rank(loader, rank=r, num_ranks=num_ranks)) for r in range(num_ranks)
        ]
        assert len({len(share) for share in shares}) == 1
        return {b.index: {row.row for row in b.rows} for share in shares for b in share if b.rows}

    before = together()
    assert sorted(row for rows in before.values() for row in rows) == list(range(10))
    gone, half = sorted(before)[0], sorted(before)[1]
    is_done = np.zeros(10, dtype=bool)
    is_done[[*before[gone], min(before[half])]] = True
    loader.dataset.is_done_N = is_done
    wanted = {index: rows - set(np.flatnonzero(is_done)) for index, rows in before.items()}
    assert together() == {index: rows for index, rows in wanted.items() if rows}


FORMS = {
    "prompts": lambda rows: [f"a {n}" for n in rows],
    "tuples": lambda rows: tuple({"prompt": f"a {n}"} for n in rows),
    "columns": lambda rows: default_collate([{"prompt": f"a {n}"} for n in rows]),
    "tokens": lambda rows: {"input_ids": torch.tensor([[1, 3, n] for n in rows])},
    "row batches": lambda rows: RowBatch(7, [Row(n, n, n, [1, 3], RowOptions()) for n in rows], []),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_loaders_of_users(form, num_ranks) -> None:
    rows = [range(0, 3), range(3, 6), range(6, 7), range(7, 9)]
    loader = [FORMS[form](each) for each in rows]
    seen = {}
    for rank in range(num_ranks):
        share = batches_of_rank(loader, rank=rank, num_ranks=num_ranks)
        batches = list(share)
        assert len(batches) == len(share) == -(-4 // num_ranks)
        for batch in batches:
            if isinstance(batch, NumberedBatch):
                assert batch.batch is loader[batch.index]
                assert batch.first_row == rows[batch.index].start
                seen[batch.index] = rank
            else:
                assert (batch.rows, batch.errors) == ([], [])
                assert batch.index >= 4
    assert seen == {number: number % num_ranks for number in range(4)}


class Endless(IterableDataset):
    def __init__(self, count):
        self.count = count

    def __iter__(self):
        yield from (f"a {n}" for n in range(self.count))


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_a_stream_without_a_length(count) -> None:
    loader = DataLoader(Endless(count), batch_size=2)
    shares = [list(batches_of_rank(loader, rank=rank, num_ranks=2)) for rank in range(2)]
    assert len(shares[0]) == len(shares[1])
    batches = [b for share in shares for b in share if isinstance(b, NumberedBatch)]
    batches.sort(key=lambda batch: batch.index)
    assert [row for batch in batches for row in batch.batch] == [f"a {n}" for n in range(count)]
    assert [batch.first_row for batch in batches] == list(range(0, count, 2))
