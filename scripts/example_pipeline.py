#!/usr/bin/env python3
"""A plain Lightning pipeline: a file of prompts in, a directory of answers and reports out.

python scripts/example_pipeline.py [--input prompts.jsonl] [--checkpoint DIR_OR_HUB_ID]
"""

import argparse

from lightning import Trainer

from moe_lightning import (
    CommunicationTime,
    Generate,
    MoELightningModule,
    PredictionWriter,
    PromptData,
    RoutingBalance,
    RunReport,
    Throughput,
)


def main() -> None:
    """Answer the prompts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", default="demo", help="JSON Lines, Parquet or text")
    parser.add_argument("--checkpoint", default="demo", help="a directory or a hub id")
    parser.add_argument("--output_dir", default="outputs/pipeline")
    parser.add_argument("--strategy", default="auto", help="moe_placement, moe_rpc, moe_ep, ...")
    options = parser.parse_args()

    writer = PredictionWriter(options.output_dir)
    # Without these four the answers are the same; the last one makes report.html of the others.
    seen = [Throughput(), RoutingBalance(), CommunicationTime(), RunReport()]
    trainer = Trainer(
        strategy=options.strategy,
        callbacks=[writer, *seen],
        default_root_dir=options.output_dir,
        logger=False,
    )
    module = MoELightningModule(options.checkpoint, task=Generate(max_new_tokens=32))
    trainer.predict(module, datamodule=PromptData(options.input), return_predictions=False)
    if writer.outcome is not None:  # on the first rank
        print(f"{writer.outcome.num_predictions} answers: {options.output_dir}")


if __name__ == "__main__":
    main()
