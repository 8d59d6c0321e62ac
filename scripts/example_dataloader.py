#!/usr/bin/env python3
"""A dataloader of one's own: which of several endings does the model think most likely?

python scripts/example_dataloader.py [--checkpoint DIR_OR_HUB_ID]
"""

import argparse

from lightning import Trainer
from torch.utils.data import DataLoader, Dataset

from moe_lightning import MoELightningModule, Score

QUESTIONS = [
    ("To be, or not to", [" be", " sea", " the"]),
    ("Good morrow, my", [" lord", " potato", " of"]),
]


class Endings(Dataset):
    """Every question with each of its endings, a row each; it could as well read a database."""

    def __init__(self) -> None:
        self.rows = [(q, ending) for q, (_, endings) in enumerate(QUESTIONS) for ending in endings]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, str]:
        question, ending = self.rows[number]
        return {"id": f"{question}{ending}", "prompt": QUESTIONS[question][0] + ending}


def main() -> None:
    """Score the rows, and say which ending of each question is the likeliest."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="demo", help="a directory or a hub id")
    options = parser.parse_args()

    endings = Endings()
    loader = DataLoader(endings, batch_size=4)  # its own collation of dicts is understood
    trainer = Trainer(logger=False, enable_progress_bar=False)
    batches = trainer.predict(MoELightningModule(options.checkpoint, task=Score()), loader)
    rows = [row for batch in batches for row in batch]  # in the order of the loader
    for number, (question, _) in enumerate(QUESTIONS):
        found = [
            (row["logprob"], ending)
            for row, (asked, ending) in zip(rows, endings.rows, strict=True)
            if asked == number
        ]
        print(f"{question}...{max(found)[1]}  ({max(found)[0]:.1f})")


if __name__ == "__main__":
    main()
