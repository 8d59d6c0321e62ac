"""What bench_predict.py computes: the rows that all contestants answer, and the random model."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moe_lightning.demo.random_checkpoint import make_checkpoint

TaskName = Literal["score", "generate"]


@dataclass(frozen=True)
class Lengths:
    """Log-normal lengths, clipped.

    Attributes:
        median: Median in tokens.
        sigma: Standard deviation of the logarithm.
        low: Least tokens.
        high: Most tokens.
    """

    median: float
    sigma: float
    low: int
    high: int

    def draw(self, generator: np.random.Generator, num: int) -> list[int]:
        """Draw lengths in tokens."""
        lengths = np.exp(generator.normal(math.log(self.median), self.sigma, num))
        drawn: list[int] = np.clip(np.rint(lengths), self.low, self.high).astype(int).tolist()
        return drawn


@dataclass(frozen=True)
class Workload:
    """The rows that all contestants answer; a row's id is its position.

    Attributes:
        path: The file of prompts.
        token_ids: The prompts as token ids.
        max_new_tokens: How many tokens each row asks for.
    """

    path: Path
    token_ids: Sequence[Sequence[int]]
    max_new_tokens: Sequence[int]

    @property
    def num_prompt_tokens(self) -> list[int]:
        """Tokens of each prompt."""
        return [len(ids) for ids in self.token_ids]

    def num_tokens(self, task: TaskName) -> int:
        """Useful tokens: those that a row asks for."""
        return sum(self.num_prompt_tokens) + self.num_new_tokens(task)

    def num_new_tokens(self, task: TaskName) -> int:
        """Useful tokens that are generated."""
        return sum(self.max_new_tokens) if task == "generate" else 0


def make_workload(
    path: Path, tokenizer: Any, *, rows: int, prompts: Lengths, answers: Lengths, seed: int
) -> Workload:
    """Write rows of random words of the vocabulary, cut to the lengths drawn."""
    generator = np.random.default_rng(seed)
    tokens = tokenizer.convert_ids_to_tokens(list(range(tokenizer.vocab_size)))
    words = sorted({t[1:] for t in tokens if t.startswith("Ġ") and t[1:].isalpha()})
    lines, token_ids = [], []
    max_new_tokens = answers.draw(generator, rows)
    for row, length in enumerate(prompts.draw(generator, rows)):
        text = " ".join(generator.choice(words, size=length))
        text = tokenizer.decode(tokenizer(text)["input_ids"][:length])
        token_ids.append(tokenizer(text)["input_ids"])
        lines.append({"id": row, "prompt": text, "max_new_tokens": max_new_tokens[row]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Workload(path, token_ids, max_new_tokens)


def random_model(
    directory: Path,
    *,
    hidden_size: int,
    num_layers: int,
    num_experts: int,
    expert_size: int,
    vocab_size: int,
) -> Path:
    """The random model of these sizes, made in the directory unless it is there already."""
    sizes = (hidden_size, num_layers, num_experts, expert_size, vocab_size)
    path = directory / "-".join(["random", *map(str, sizes)])
    if path.exists():
        return path
    directory.mkdir(parents=True, exist_ok=True)
    return make_checkpoint(
        path,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_experts=num_experts,
        expert_size=expert_size,
        vocab_size=vocab_size,
        top_k=4,
        num_heads=8,
        num_kv_heads=4,
    )
