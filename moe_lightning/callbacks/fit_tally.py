"""FitTally: what a fit has done so far."""

import time
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor


class FitTally:
    """What a fit has done on this rank. Nothing is read from the device before the end.

    Args:
        first_step: The step that the fit goes on from.
    """

    def __init__(self, first_step: int = 0) -> None:
        self._first_step = first_step
        self._num_steps = 0
        self._num_positions = 0
        self._num_padding: Tensor | int = 0
        self._started_s = time.monotonic()
        self._elapsed_s: float | None = None

    def add(self, batch: Any) -> None:
        """Count a batch: a dict with ``input_ids`` and perhaps ``attention_mask``."""
        ids = batch.get("input_ids") if isinstance(batch, dict) else None
        if not isinstance(ids, Tensor):
            return
        self._num_positions += ids.numel()
        mask = batch.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == ids.shape:
            self._num_padding = self._num_padding + (mask == 0).sum()

    def tokens_per_s(self) -> float:
        """Positions per second so far, padding included."""
        return self._num_positions / max(time.monotonic() - self._started_s, 1e-9)

    def end(self, step: int) -> None:
        """Stop the clock."""
        self._elapsed_s = time.monotonic() - self._started_s
        self._num_steps = step - self._first_step

    def counts(self, trainer: Trainer) -> dict[str, float]:
        """What is added up over ranks; of those that have the same rows, one counts."""
        counts_rows = bool(getattr(trainer.strategy, "writes_rows", True))
        return {
            "num_positions": float(self._num_positions * counts_rows),
            "num_padding": float(self._num_padding * counts_rows),
            "elapsed_s": self._elapsed_s or time.monotonic() - self._started_s,
        }

    def report(self, counts: dict[str, float]) -> dict[str, Any]:
        """What ``run.json`` says of the fit.

        Args:
            counts: Those of all ranks.
        """
        elapsed_s = max(counts["elapsed_s"], 1e-9)
        num_tokens = int(counts["num_positions"] - counts["num_padding"])
        return {
            "elapsed_s": round(elapsed_s, 3),
            "num_steps": self._num_steps,
            "num_tokens": num_tokens,
            "padding_share": round(counts["num_padding"] / max(1, counts["num_positions"]), 4),
            "steps_per_s": round(self._num_steps / elapsed_s, 3),
            "tokens_per_s": round(num_tokens / elapsed_s, 1),
        }
