"""The rows that all contestants answer."""

import json
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np

from moe_lightning.data.encode import Encoder
from moe_lightning.data.prompts import PromptData
from moe_lightning.data.records import RowError
from moe_lightning.errors import UsageError
from moe_lightning.tasks import Generate

STEP = 7  # tokens between the beginnings of rows: no two rows are the same


@dataclass(frozen=True)
class Workload:
    """Rows, each with a prompt; a row's id is its position.

    Attributes:
        path: JSON Lines, ``{"id", "prompt"}``.
        num_prompt_tokens: Tokens of each prompt.
        max_new_tokens: Tokens that are generated for each, whatever they are.
    """

    path: Path
    num_prompt_tokens: tuple[int, ...]
    max_new_tokens: int

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        return len(self.num_prompt_tokens)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts: what prefill computes."""
        return sum(self.num_prompt_tokens)

    @property
    def decode_tokens(self) -> int:
        """Tokens of all steps after the first, which prefill gives."""
        return self.num_rows * (self.max_new_tokens - 1)

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows, prompts and answers."""
        return self.prompt_tokens + self.num_rows * self.max_new_tokens


def make_workload(
    path: Path,
    encoder: Encoder,
    *,
    source: str,
    num_rows: int,
    num_prompt_tokens: int,
    max_new_tokens: int,
) -> Workload:
    """Write the rows: of the prompts of a file, as many as are asked for.

    Prompts are cut to the length; those of the shipped demo, which are shorter, are put together to
    it. A file of fewer rows gives fewer.

    Args:
        path: The file to write.
        encoder: The checkpoint's tokenizer.
        source: The file of prompts, or ``demo``.
        num_rows: Most rows.
        num_prompt_tokens: Most tokens of a prompt.
        max_new_tokens: Tokens to generate.

    Returns:
        The rows.

    Raises:
        UsageError: If there is no row that can be used.
    """
    token_ids = _read(source, encoder, num_rows=60 if source == "demo" else num_rows)
    if source == "demo":
        text = [token for row in token_ids for token in row]
        length = num_rows * STEP + num_prompt_tokens
        stream = list(islice(cycle(text), length))
        token_ids = [stream[row * STEP :] for row in range(num_rows)]
    decode = encoder.tokenizer.decode
    prompts = [
        decode(row[:num_prompt_tokens], skip_special_tokens=True).strip() for row in token_ids
    ]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise UsageError(f"--data.input {source} has no row that could be used.")
    # Without lengths of their own, which would come before those of the phases.
    lines = [{"id": row, "prompt": prompt} for row, prompt in enumerate(prompts)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    # Cut and joined texts may have a token more or less.
    lengths = tuple(len(row) for row in _read(str(path), encoder, num_rows=len(lines)))
    return Workload(path, lengths, max_new_tokens)


def _read(source: str, encoder: Encoder, *, num_rows: int) -> list[list[int]]:
    data = PromptData(source, limit_rows=num_rows)
    data.plan(encoder, Generate())
    numbers = np.concatenate(data.batches) if data.batches else np.zeros(0, np.int64)
    batches = (batch.rows for batch in data.predict_dataloader())
    rows = {row.row: list(row.token_ids) for batch in batches for row in batch}
    assert not any(isinstance(row, RowError) for row in rows.values()), "those are not planned"
    return [rows[number] for number in sorted(int(n) for n in numbers)]
