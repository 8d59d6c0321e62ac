"""Held-out perplexity and routing of the demo checkpoint, by kind of text.

Prints, for plays, verse and prose: perplexity per token of the held-out documents, and how far
apart the routers send them. The distance is the total variation between the shares of tokens
that each expert gets (0: the same, 1: no expert in common), beside the distance between two
random halves of the same kind, which is what chance gives.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
from jsonargparse import CLI

from moe_lightning import MoELightningModule, Score
from moe_lightning.data.records import Record, Row, RowBatch, RowOptions
from moe_lightning.dispatch import LayerTrace

KINDS = ("plays", "verse", "prose")
WINDOW = 256  # tokens: the sequence length of the training


def evaluate(checkpoint: str = "demo", corpus: str = "outputs/train_demo/corpus") -> None:
    """Evaluate a checkpoint on held-out text.

    Args:
        checkpoint: The checkpoint.
        corpus: Directory with val_plays.jsonl, val_verse.jsonl and val_prose.jsonl.
    """
    module = MoELightningModule(checkpoint, task=Score())
    module.configure_model()
    shares: dict[str, list[np.ndarray]] = {}
    for kind in KINDS:
        windows = held_out_windows(module, Path(corpus) / f"val_{kind}.jsonl")
        halves = [windows[::2], windows[1::2]]
        scored = [score(module, half) for half in halves]
        logprob = sum(s[0] for s in scored)
        tokens = sum(s[1] for s in scored)
        shares[kind] = [s[2] for s in scored]
        print(f"{kind}: perplexity {math.exp(-logprob / tokens):.2f} on {tokens:,} held-out tokens")
    print("distance between the routings (mean over layers):")
    for kind in KINDS:
        print(f"  {kind} / {kind} (two halves): {distance(*shares[kind]):.3f}")
    for one, other in (("plays", "verse"), ("plays", "prose"), ("verse", "prose")):
        print(f"  {one} / {other}: {distance(sum(shares[one]), sum(shares[other])):.3f}")


def held_out_windows(module: MoELightningModule, path: Path) -> list[list[int]]:
    """Cut the documents of a file into windows of the training's length."""
    windows = []
    for number, line in enumerate(path.read_text().splitlines()):
        record = Record(number, number + 1, number, json.loads(line)["text"], None, RowOptions())
        ids = module.tokenizer(record.prompt)["input_ids"]
        windows += [ids[i : i + WINDOW] for i in range(0, len(ids) - 1, WINDOW)]
    return [window for window in windows if len(window) > 1]


def score(module: MoELightningModule, windows: list[list[int]]) -> tuple[float, int, np.ndarray]:
    """Sum of log-probabilities, scored tokens, and rows per layer and expert."""
    counts: dict[int, np.ndarray] = {}

    def count(trace: LayerTrace) -> None:
        found = torch.bincount(trace.index_TK.flatten(), minlength=trace.num_experts).numpy()
        counts[trace.layer] = counts.get(trace.layer, 0) + found

    module.routing_log.subscribe(count)
    logprob, tokens = 0.0, 0
    rows = [Row(n, n + 1, n, ids, RowOptions()) for n, ids in enumerate(windows)]
    with torch.inference_mode():
        for start in range(0, len(rows), 16):
            for answer in module.predict_step(RowBatch(start, rows[start : start + 16], []), start):
                logprob += answer["logprob"]
                tokens += answer["num_tokens"] - 1
    module.routing_log.unsubscribe(count)
    return logprob, tokens, np.stack([counts[layer] for layer in sorted(counts)])


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Mean over layers of the total variation between two sets of counts, [layers, experts]."""
    shares = [counts / counts.sum(axis=1, keepdims=True) for counts in (one, other)]
    return float(np.abs(shares[0] - shares[1]).sum(axis=1).mean() / 2)


if __name__ == "__main__":
    CLI(evaluate, as_positional=False)
