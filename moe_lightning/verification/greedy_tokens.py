"""Greedy tokens against what a reference would have taken in their place."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lightning.verification.folder import RowFacts
from moe_lightning.verification.tolerances import Tolerance

MARGIN = 8.0
"""Error of one logit among many, in units of the typical one: the largest of thousands, twice."""

JUMP = 3.0
"""What another choice of experts moves a logit by, in the same units; rounding causes some."""


@dataclass(slots=True)
class Tokens:
    """Greedy tokens that were compared: each with what the reference takes after the same ones.

    Attributes:
        num: Tokens.
        num_equal: Those that are the reference's choice.
        num_ties: Others, that the reference holds for as good as its own.
        num_rows: Rows.
        num_equal_rows: Rows whose tokens are all equal.
        first_other: Row and number of the first token that is neither; None if there is none.
    """

    num: int = 0
    num_equal: int = 0
    num_ties: int = 0
    num_rows: int = 0
    num_equal_rows: int = 0
    first_other: tuple[int, int] | None = None

    @property
    def num_wrong(self) -> int:
        """Tokens that the reference would not have taken."""
        return self.num - self.num_equal - self.num_ties

    def see(self, facts: RowFacts, logits_SV: Tensor, tolerance: Tolerance) -> None:
        """Compare the tokens of one row.

        Args:
            facts: The row, and what was taken.
            logits_SV: The reference's logits after each of its tokens but the last.
            tolerance: What differences are right.
        """
        new_N = torch.tensor(facts.new_token_ids, dtype=torch.int64)
        self.num_rows += 1
        if len(new_N) == 0:
            self.num_equal_rows += 1
            return
        logits_NV = logits_SV[len(facts.token_ids) - 1 :].float()
        best_N, wanted_N = logits_NV.max(1)
        behind_N = best_N - logits_NV.gather(1, new_N[:, None]).squeeze(1)
        typical_N = (logits_NV - logits_NV.mean(1, keepdim=True)).square().mean(1).sqrt()
        is_equal_N = new_N == wanted_N
        margin = MARGIN * tolerance.end_to_end
        if not tolerance.is_exact:
            margin = max(margin, JUMP)
        is_tie_N = ~is_equal_N & (behind_N <= margin * typical_N)
        self.num += len(new_N)
        self.num_equal += int(is_equal_N.sum())
        self.num_ties += int(is_tie_N.sum())
        self.num_equal_rows += bool(is_equal_N.all())
        wrong_N = (~is_equal_N & ~is_tie_N).nonzero().squeeze(1)
        if len(wrong_N) and self.first_other is None:
            self.first_other = (facts.row, int(wrong_N[0]))
