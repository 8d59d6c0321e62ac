"""How far a contestant's answers are from those of one device."""

from dataclasses import dataclass

from moe_lightning.benchmark.contestants import REFERENCE
from moe_lightning.benchmark.rounds import Result


@dataclass(frozen=True)
class Difference:
    """What differs.

    Attributes:
        logprob: The largest difference of a row's log-probability, over its tokens; None if it has
            no scores.
        same_tokens: Share of the generated tokens that are the same, up to the first of each row
            that is not.
    """

    logprob: float | None
    same_tokens: float

    def __str__(self) -> str:
        tokens = f"{100 * self.same_tokens:.4g} % of tokens"
        return tokens if self.logprob is None else f"{self.logprob:.0e}, {tokens}"


def difference(result: Result, reference: Result) -> Difference | None:
    """Compare two contestants' answers to the same rows.

    Args:
        result: One.
        reference: The other, on one device.

    Returns:
        The difference; None if one of them has no answers.
    """
    if not result.rows or not reference.rows:
        return None
    logprobs: list[float] = []
    num_same = num_tokens = 0
    for number, expected in reference.rows.items():
        row = result.rows.get(number, {})
        if "logprob" in row and "logprob" in expected:
            per_token = abs(row["logprob"] - expected["logprob"]) / max(1, expected["num_tokens"])
            logprobs.append(per_token)
        wanted, got = expected.get("token_ids", []), row.get("token_ids", [])
        num_tokens += len(wanted)
        for a, b in zip(wanted, got, strict=False):
            if a != b:
                break
            num_same += 1
    return Difference(max(logprobs, default=None), num_same / max(1, num_tokens))


def reference_of(results: list[Result]) -> Result | None:
    """The one that the others are compared with."""
    return next((each for each in results if each.contestant.name == REFERENCE), None)
