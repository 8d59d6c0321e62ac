"""The model of bench_rpc.py, and what is computed with it."""

import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench_placement_clock import progress

from moe_lightning.demo.random_checkpoint import make_checkpoint


@dataclass(frozen=True)
class ModelSizes:
    """A random model. By default dense part, experts and a 1 Gbit/s link take comparable times.

    Attributes:
        family: Its shared experts must come after the routed ones to be computed meanwhile.
        hidden_size: Hidden width.
        num_layers: Layers.
        num_experts: Experts of a layer.
        expert_size: Inner width of an expert.
        num_shared_experts: Shared experts of a layer, computed as one of so many times the width.
        top_k: Experts of a token.
        num_heads: Heads of attention.
        num_kv_heads: Heads of keys and values.
        vocab_size: Vocabulary.
    """

    family: str = "glm4_moe"
    hidden_size: int = 1024
    num_layers: int = 6
    num_experts: int = 64
    expert_size: int = 128
    num_shared_experts: int = 16
    top_k: int = 8
    num_heads: int = 16
    num_kv_heads: int = 4
    vocab_size: int = 2048

    def checkpoint(self, cache: Path) -> Path:
        """Write the model, unless it is there.

        Args:
            cache: Directory of models.

        Returns:
            The model's directory.
        """
        sizes = asdict(self)
        path = cache / "-".join(map(str, sizes.values()))
        if path.exists():
            return path
        progress(f"writing a random model to {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        overrides: dict[str, object] = {"n_shared_experts": sizes.pop("num_shared_experts")}
        if self.family in ("glm4_moe", "deepseek_v3"):
            # All layers alike, and a token's experts anywhere among the workers.
            overrides |= {"first_k_dense_replace": 0, "n_group": 1, "topk_group": 1}
        return make_checkpoint(path, overrides=overrides, **sizes)


@dataclass(frozen=True)
class PassShape:
    """A pass.

    Attributes:
        num_rows: Rows.
        row_tokens: Tokens of each row's prompt.
        new_tokens: Tokens that each row generates; 0 for score.
    """

    num_rows: int = 8
    row_tokens: int = 64
    new_tokens: int = 0

    @property
    def num_counted(self) -> int:
        """Tokens that tokens/s is about: new ones, or those of the prompts if there are none."""
        return self.num_rows * (self.new_tokens or self.row_tokens)

    @property
    def num_through(self) -> int:
        """Tokens that go through the layers."""
        return self.num_rows * (self.row_tokens + max(0, self.new_tokens - 1))

    def draw(self, vocab_size: int, seed: int) -> dict[str, Any]:
        """Random rows, as masters want to be told.

        Args:
            vocab_size: How many token ids there are.
            seed: Seed of the draw.

        Returns:
            The rows' token ids, and how many new tokens are wanted.
        """
        draw = random.Random(f"{seed} {self}")
        rows = [
            [draw.randrange(4, vocab_size) for _ in range(self.row_tokens)]
            for _ in range(self.num_rows)
        ]
        return {"rows": rows, "new_tokens": self.new_tokens}


# To see whether everything runs.
QUICK_MODEL = ModelSizes(
    hidden_size=64,
    num_layers=2,
    num_experts=8,
    expert_size=16,
    num_shared_experts=2,
    top_k=3,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=512,
)
QUICK_SHAPES = {"prefill": PassShape(8, 40), "decode": PassShape(4, 8, 4)}
