"""What is said when memory runs out in the middle of a batch."""

import psutil
import torch

from moe_lightning.data.records import RowBatch
from moe_lightning.errors import OutOfMemoryError


def out_of_memory(error: BaseException, batch: RowBatch, *, budget_tokens: int) -> OutOfMemoryError:
    """Make the error for the user: how much there was, what was asked of it, and what helps.

    Args:
        error: What was raised.
        batch: The rows that were computed.
        budget_tokens: Tokens that could be in flight at once.

    Returns:
        The error.
    """
    longest = max((len(row.token_ids) for row in batch.rows), default=0)
    reason = " ".join(str(error).split())
    fewer = max(1, min(budget_tokens, longest * len(batch.rows) or budget_tokens) // 2)
    return OutOfMemoryError(
        f"memory ran out ({type(error).__name__}: {reason}) in batch {batch.index} of "
        f"{len(batch.rows):,} rows, the longest of {longest:,} tokens, with up to "
        f"{budget_tokens:,} tokens at once. {_memory(error)} The same command with "
        f"--data.max_forward_tokens {fewer} continues with less; a narrower --model.dtype, or a "
        "strategy that shares the weights, needs less for the weights."
    )


def _memory(error: BaseException) -> str:
    if isinstance(error, torch.OutOfMemoryError) and torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return (
            f"The GPU has {total / 1e9:.1f} GB, of which {free / 1e9:.1f} GB are free and "
            f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB were used by this process."
        )
    memory, own = psutil.virtual_memory(), psutil.Process().memory_info().rss
    return (
        f"The machine has {memory.total / 1e9:.1f} GB, of which {memory.available / 1e9:.1f} GB "
        f"are available and {own / 1e9:.1f} GB are used by this process."
    )
