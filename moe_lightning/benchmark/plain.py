"""The process of plain transformers: ``python -m moe_lightning.benchmark.plain TASK.json``.

What one would write without this package: batches of 16 in the order of the input, with the faster
of its ways to compute experts. The phases are those of ``player``.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH_ROWS = 16
WAYS = ("grouped_mm", "eager")
Numbers = dict[str, Any]


class PlainLoop:
    """A checkpoint in unmodified transformers, and the rows.

    Args:
        checkpoint: Its directory.
        device: Where it computes.
        dtype: Its precision, by name.
        rows: The file of rows.
    """

    def __init__(self, checkpoint: str, device: torch.device, dtype: str, rows: Path) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
        self.model = model.to(device).eval()
        self.model.generation_config.eos_token_id = None  # rows have the lengths that are asked for
        self.tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token_id = self.tokenizer.eos_token_id
        self.rows = [json.loads(line) for line in rows.read_text().splitlines()]

    @torch.inference_mode()
    def score(self) -> list[Numbers]:
        """Log-probabilities of all rows."""
        found = []
        for rows, batch in self._batches("right"):
            logprobs_BSV = self.model(**batch).logits[:, :-1].float().log_softmax(dim=-1)
            logprobs_BS = logprobs_BSV.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
            # In float64: the sum of a long row in float32 is only good to 1e-4.
            sums_B = (logprobs_BS * batch["attention_mask"][:, 1:]).double().sum(dim=1)
            found += [
                {"id": r["id"], "logprob": x} for r, x in zip(rows, sums_B.tolist(), strict=True)
            ]
        return found

    @torch.inference_mode()
    def generate(self, max_new_tokens: int) -> list[Numbers]:
        """Greedy answers of all rows."""
        found = []
        for rows, batch in self._batches("left"):
            output_BS = self.model.generate(
                **batch,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                pad_token_id=self.tokenizer.pad_token_id,
            )
            new_BS = output_BS[:, batch["input_ids"].shape[1] :].tolist()
            found += [
                {"id": r["id"], "token_ids": ids} for r, ids in zip(rows, new_BS, strict=True)
            ]
        return found

    def _batches(self, side: str) -> Iterator[tuple[list[Numbers], Any]]:
        for start in range(0, len(self.rows), BATCH_ROWS):
            rows = self.rows[start : start + BATCH_ROWS]
            prompts = [row["prompt"] for row in rows]
            batch = self.tokenizer(
                prompts,
                padding=True,
                padding_side=side,
                return_tensors="pt",
                return_token_type_ids=False,
            )
            yield rows, batch.to(self.model.device)


def play(task: Numbers) -> None:
    """Run every phase, and leave what was seen.

    Args:
        task: What ``rounds`` writes; see ``player.play``.
    """
    device = torch.device("cuda" if task["accelerator"] == "gpu" else "cpu")
    loop = PlainLoop(task["checkpoint"], device, task["dtype"], Path(task["rows"]))
    phases: dict[str, Numbers] = {}

    def timed(name: str, compute: Any, *args: Any) -> list[Numbers]:
        begin_s = time.monotonic()
        rows: list[Numbers] = compute(*args)
        if device.type == "cuda":
            torch.cuda.synchronize()
        phases[name] = {"begin_s": begin_s, "end_s": time.monotonic()}
        return rows

    took_s = {}
    for way in WAYS:
        loop.model.set_experts_implementation(way)
        timed("score", loop.score)
        scores = timed("score", loop.score)
        took_s[way] = phases["score"]["end_s"] - phases["score"]["begin_s"]
    way = min(took_s, key=took_s.__getitem__)
    loop.model.set_experts_implementation(way)
    timed("warm-up", loop.generate, 2)
    timed("prefill", loop.generate, 1)
    rows = scores + timed("decode", loop.generate, task["max_new_tokens"])
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    report = {"phases": phases, "rows": rows, "device_bytes": memory, "note": f"experts: {way}"}
    Path(task["out"], "rank-0.json").write_text(json.dumps(report))


if __name__ == "__main__":
    play(json.loads(Path(sys.argv[1]).read_text()))
