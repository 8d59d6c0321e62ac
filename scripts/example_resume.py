#!/usr/bin/env python3
"""A job that is killed and goes on: every row is computed once.

python scripts/example_resume.py [--output_dir outputs/resume] [--kill_after 3]
"""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

from lightning import Callback, Trainer

from moe_lightning import MoELightningModule, PredictionWriter, PromptData, Score


class KillAfter(Callback):
    """Ends the process as a power cut does, once some batches are done."""

    def __init__(self, num_batches: int) -> None:
        self.num_batches = num_batches

    def on_predict_batch_end(self, *args: object) -> None:
        self.num_batches -= 1
        if self.num_batches == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def predict(output_dir: str, *callbacks: Callback) -> PromptData:
    """The job. Run again with the same arguments, it computes what is left."""
    data = PromptData("demo", max_batch_tokens=256)
    # The writer comes first: a batch is committed before anybody else hears that it is done.
    writing = [PredictionWriter(output_dir), *callbacks]
    trainer = Trainer(callbacks=writing, logger=False, enable_progress_bar=False)
    module = MoELightningModule("demo", task=Score())
    trainer.predict(module, datamodule=data, return_predictions=False)
    return data


def main() -> None:
    """Start the job, have it killed, and go on with it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", default="outputs/resume")
    parser.add_argument("--kill_after", type=int, default=3, help="batches")
    parser.add_argument("--is_victim", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.is_victim:
        predict(options.output_dir, KillAfter(options.kill_after))
        return
    victim = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--is_victim"])
    print("the first run", "was killed" if victim.returncode else "was done before that")
    data = predict(options.output_dir)
    lines = (Path(options.output_dir) / "predictions.jsonl").read_text().splitlines()
    print(f"{data.num_done} of {data.num_rows} rows were done, now {len(lines)} are")


if __name__ == "__main__":
    main()
