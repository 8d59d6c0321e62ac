"""Workload: what a step is, and how its rows are routed. No torch."""

from dataclasses import dataclass

from moe_lightning.placement.recording import Recording

DECODE_TOKENS = 64
PREFILL_TOKENS = 16384  # also those of a training step


@dataclass(frozen=True)
class Workload:
    """The steps that estimates are for.

    Attributes:
        decode_tokens: Tokens of a decode step, on each process that has rows of its own.
        prefill_tokens: Those of a pass over prompts, or of a training step.
        routing: What routers did in a run; None is uniform routing: every set of a row's experts
            is equally likely.
    """

    decode_tokens: int = DECODE_TOKENS
    prefill_tokens: int = PREFILL_TOKENS
    routing: Recording | None = None
