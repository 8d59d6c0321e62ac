"""Predicts on one process or on ranks, and what they must agree on."""

import json
import math
import os
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from moe_lightning import (
    MoELightningModule,
    PredictionWriter,
    PromptData,
    RoutingBalance,
    Throughput,
)
from moe_lightning.strategies import ShardedStrategy
from moe_lightning.tasks import Embed, Generate, Score, Task

TEXT = "it was the best of times it was the worst of times it was the age of"


class Everything(Task):
    """Score, Embed and Generate of the same rows, so that a model is loaded once for all three."""

    default_max_new_tokens = 4

    def run(self, runner, rows, **options):
        tasks = Score(), Embed(), Generate(max_new_tokens=self.default_max_new_tokens)
        answers = [task.run(runner, rows, **options) for task in tasks]
        return [{**score, **vector, **text} for score, vector, text in zip(*answers, strict=True)]


def ragged_rows(count):
    """Rows of unequal prompts, of which some ask for fewer new tokens or for more."""
    rows = [{"id": f"row-{n}", "prompt": TEXT[: 3 + n * 50 % 47]} for n in range(count)]
    for n, row in enumerate(rows):
        if n % 3:
            row["max_new_tokens"] = (1, 7)[n % 3 - 1]
    return rows


def trainer_of(options, **settings):
    """A quiet trainer: of one process where the strategy's options are None, or on the ranks."""
    strategy = "auto" if options is None else ShardedStrategy(**options)
    return L.Trainer(
        accelerator="cpu",
        devices=1 if options is None else dist.get_world_size(),
        strategy=strategy,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        **({"enable_progress_bar": False} | settings),
    )


def predict(path, options, counts, *, batch_size=2, **module):
    """Predict the first rows of many numbers of rows, with one model.

    Returns:
        For each number, the rows by id; each rank has its own.
    """
    trainer = trainer_of(options)
    tested = MoELightningModule(
        str(path), **({"task": Everything(), "batch_budget_tokens": 96} | module)
    )
    answers = []
    for count in counts:
        loader = DataLoader(ragged_rows(count), batch_size=batch_size, collate_fn=list)
        batches = trainer.predict(tested, loader) or []
        rows = [row for batch in batches for row in batch]
        answers.append({row["id"]: row for row in rows})
        assert len(answers[-1]) == len(rows), "a row came twice on one rank"
    return answers


def predict_layouts(path, layouts, counts, options=None):
    """:func:`predict` under one layout of ranks after the other."""
    return [predict(path, layout, counts, **(options or {})) for layout in layouts]


def predict_file(path, layout, directory, input, *, max_batch_tokens=48):
    """Predict a file with every callback, as the command line does."""
    callbacks = [
        PredictionWriter(str(directory)),
        Throughput(str(directory)),
        RoutingBalance(str(directory)),
    ]
    trainer = trainer_of(layout, callbacks=callbacks)
    module = MoELightningModule(str(path), task=Everything())
    data = PromptData(str(input), max_batch_tokens=max_batch_tokens)
    trainer.predict(module, datamodule=data, return_predictions=False)
    return trainer.callbacks is not None and callbacks[1].num_errors


def predict_files(path, layouts, root, input):
    """:func:`predict_file` under one layout after the other, each into its own directory."""
    return [
        predict_file(path, layout, Path(root) / str(number), input)
        for number, layout in enumerate(layouts)
    ]


def together(results, *, copies=1):
    """The rows of all ranks; each must be on as many as compute the same rows.

    Args:
        results: For each rank, its rows by id.
        copies: Ranks that have the same rows.
    """
    rows, seen = {}, {}
    for own in results:
        for name, row in own.items():
            if name in rows:
                check_row(row, rows[name], what=name)
            rows[name] = row
            seen[name] = seen.get(name, 0) + 1
    assert set(seen.values()) <= {copies}, seen
    return rows


def check_rows(got, expected, *, what, tolerance=1e-4):
    """Compare rows by id with those of one process."""
    assert sorted(got) == sorted(expected), what
    for name, row in expected.items():
        check_row(got[name], row, what=f"{what}: {name}", tolerance=tolerance)


def check_row(got, expected, *, what, tolerance=1e-4):
    """Texts are equal; numbers are fp32 sums in another order."""
    assert got.keys() == expected.keys(), what
    for name, value in expected.items():
        if name == "logprob":
            assert got[name] == pytest.approx(value, rel=tolerance, abs=tolerance), (what, name)
        elif name == "perplexity":
            number = math.log(got[name])
            assert number == pytest.approx(math.log(value), rel=tolerance, abs=tolerance), what
        elif name == "embedding":
            torch.testing.assert_close(
                torch.tensor(got[name]),
                torch.tensor(value),
                atol=tolerance,
                rtol=tolerance,
                msg=lambda text, what=what: f"{what}: {text}",
            )
        else:
            assert got[name] == value, (what, name)


def read_lines(path):
    """The rows of a JSON Lines file, none if there is no such file."""
    if not os.path.exists(path):
        return []
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]
