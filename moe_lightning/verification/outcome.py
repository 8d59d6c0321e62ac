"""Outcome: what verify found, as a file and as lines for people."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import transformers

from moe_lightning.verification.comparison import Comparison
from moe_lightning.verification.differences import Largest, LayerDifference
from moe_lightning.verification.faults import Fault
from moe_lightning.verification.watching import Configured

MAX_LAYERS_SHOWN = 16


@dataclass(frozen=True, slots=True)
class Outcome:
    """What verify found.

    Attributes:
        configured: What was configured.
        comparison: All rows, compared.
        faults: What is wrong; empty if nothing is.
        num_rows: Rows that were compared.
        num_tokens: Tokens of their prompts.
        num_cut: Rows whose prompts were cut.
        reference: What the reference is.
        notes: More for people to know.
    """

    configured: Configured
    comparison: Comparison
    faults: Sequence[Fault]
    num_rows: int
    num_tokens: int
    num_cut: int
    reference: str
    notes: Sequence[str] = field(default_factory=list)

    @property
    def has_passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults

    def to_json(self) -> dict[str, Any]:
        """The content of ``verify.json``."""
        compared, tokens = self.comparison, self.comparison.tokens
        return {
            "passed": self.has_passed,
            "first_difference": self.faults[0].text if self.faults else None,
            "faults": [fault.to_json() for fault in self.faults],
            "tolerance": {
                "part": compared.tolerance.part,
                "end_to_end": compared.tolerance.end_to_end,
                "reasons": list(compared.tolerance.reasons),
            },
            "strategy": self.configured.strategy,
            "strategy_report": dict(self.configured.report),
            "world_size": self.configured.world_size,
            "dtype": str(self.configured.dtype).removeprefix("torch."),
            "experts_backend": self.configured.experts_backend,
            "reference": self.reference,
            "num_rows": self.num_rows,
            "num_prompt_tokens": self.num_tokens,
            "num_rows_cut": self.num_cut,
            "notes": list(self.notes),
            "greedy_tokens": {
                "num": tokens.num,
                "share_equal": tokens.num_equal / tokens.num if tokens.num else 1.0,
                "num_ties": tokens.num_ties,
                "num_rows": tokens.num_rows,
                "num_rows_equal": tokens.num_equal_rows,
            },
            "logits": {
                "end_to_end": compared.logits.to_json(),
                "judged": compared.judged_logits.to_json(),
                "head_alone": compared.head.to_json(),
            },
            "embeddings": compared.embeddings.to_json(),
            "layers": {
                str(layer): _layer_json(difference) for layer, difference in compared.layers.items()
            },
        }

    def lines(self) -> list[str]:
        """What is printed."""
        compared, tokens = self.comparison, self.comparison.tokens
        configured = self.configured
        dtype = str(configured.dtype).removeprefix("torch.")
        ranks = f", {configured.world_size} ranks" if configured.world_size > 1 else ""
        mesh = f" ({configured.report['mesh']})" if "mesh" in configured.report else ""
        lines = [
            f"configured: {configured.strategy}{mesh}{ranks}, {dtype}, experts "
            f"{configured.experts_backend}",
            f"reference:  {self.reference}",
            f"rows: {self.num_rows}, with {self.num_tokens} tokens",
            *self.notes,
            "",
            "largest relative differences   alone (given the configured inputs)   end to end",
            f"{'':<12}{'dense':>12}{'router':>12}{'experts':>12}{'relative':>14}{'absolute':>12}",
            _line("embeddings", None, None, None, compared.embeddings),
        ]
        shown = self._shown_layers()
        for layer in shown:
            found = compared.layers[layer]
            name = f"layer {layer}"
            lines.append(_line(name, found.dense, found.router, found.experts, found.hidden))
        if len(shown) < len(compared.layers):
            lines.append(
                f"({len(shown)} of {len(compared.layers)} layers, those that differ most; all are "
                "in verify.json)"
            )
        lines.append(_line("logits", compared.head, None, None, compared.logits))
        share = 100 * tokens.num_equal / tokens.num if tokens.num else 100.0
        ties = f", {tokens.num_ties} more are as good to the reference" if tokens.num_ties else ""
        lines += [
            "",
            f"greedy tokens equal: {share:.1f} % ({tokens.num_equal} of {tokens.num}{ties}); rows "
            f"equal: {tokens.num_equal_rows} of {tokens.num_rows}",
        ]
        judged, all_of_them = compared.judged_logits.num_positions, compared.logits.num_positions
        if judged < all_of_them:
            lines.append(
                f"end to end, routers choose other experts at some positions; logits from there on "
                f"are not judged ({judged} of {all_of_them} are, up to "
                f"{compared.judged_logits.relative:.1e}), all parts alone are"
            )
        tolerance = compared.tolerance
        bounds = (
            f"{tolerance.part:g} alone, {tolerance.end_to_end:g} end to end "
            f"({' + '.join(tolerance.reasons)})"
        )
        if self.has_passed:
            return [*lines, f"PASSED: all within {bounds}"]
        return [
            *lines,
            f"FAILED: tolerance {bounds}",
            f"first difference: {self.faults[0].text}",
            *(f"also: {fault.text}" for fault in self.faults[1:]),
        ]

    def _shown_layers(self) -> list[int]:
        layers = self.comparison.layers

        def size(layer: int) -> float:
            found = layers[layer]
            parts = (found.dense, found.router, found.experts)
            return max(part.relative for part in parts if part is not None)

        return sorted(sorted(layers, key=size, reverse=True)[:MAX_LAYERS_SHOWN])


def reference_name(device: str, dtype: str, weights_dtype: str) -> str:
    """The reference, for people."""
    rounded = "" if weights_dtype == dtype else f", weights rounded to {weights_dtype}"
    return f"transformers {transformers.__version__}, one process, {device}, {dtype}{rounded}"


def _line(
    name: str,
    dense: Largest | None,
    router: Largest | None,
    experts: Largest | None,
    whole: Largest,
) -> str:
    parts = "".join(
        f"{'-' if part is None else format(part.relative, '.1e'):>12}"
        for part in (dense, router, experts)
    )
    return f"{name:<12}{parts}{whole.relative:>14.1e}{whole.absolute:>12.1e}"


def _layer_json(difference: LayerDifference) -> dict[str, Any]:
    router, experts = difference.router, difference.experts
    return {
        "dense": difference.dense.to_json(),
        "router": None if router is None else router.to_json(),
        "experts": None if experts is None else experts.to_json(),
        "end_to_end": difference.hidden.to_json(),
        "num_tied_choices": difference.num_ties,
        "num_other_choices": difference.num_other_choices,
    }
