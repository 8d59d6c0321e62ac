"""Faults: the places where a comparison found more than rounding, in words."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from moe_lightning.verification.comparison import Comparison
from moe_lightning.verification.culprits import Culprit, find_culprits
from moe_lightning.verification.differences import Largest, LayerDifference
from moe_lightning.verification.folder import RowFolder, experts_name
from moe_lightning.verification.layer_rows import LayerRows, Unit

ALIKE = 0.01
MAX_OTHER_TOKENS = 0.05


@dataclass(frozen=True, slots=True)
class Fault:
    """A place that is wrong.

    Attributes:
        place: What it is a fault of: a part of the model, tokens, or rows.
        text: What is wrong, for people.
        layer: Its layer; None if it is in none.
        experts: Experts that are wrong; several are either a group that cannot be told apart.
        slots: Slots in which they are.
        num_rows: Positions that show it.
        examples: Some of these, by id of the row and position in it.
    """

    place: str
    text: str
    layer: int | None = None
    experts: tuple[int, ...] = ()
    slots: tuple[str, ...] = ()
    num_rows: int = 0
    examples: tuple[tuple[str | int, int], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "place": self.place,
            "layer": self.layer,
            "experts": list(self.experts),
            "slots": list(self.slots),
            "num_rows": self.num_rows,
            "examples": [{"id": row, "position": position} for row, position in self.examples],
            "text": self.text,
        }


@dataclass(slots=True)
class Faults:
    """Finds the faults of a comparison.

    Args:
        comparison: All rows, compared.
        folders: The rows.
        slots_of: The slots of each expert of each layer by the placement; empty if not placed.
        failed: Rows for which there is no answer, by id, and why.
    """

    comparison: Comparison
    folders: Sequence[RowFolder]
    slots_of: Mapping[int, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    failed: Mapping[str | int, str] = field(default_factory=dict)

    def find(self) -> list[Fault]:
        """The faults in the order of a forward: the first one is where results begin to differ."""
        compared = self.comparison
        ids = {folder.facts().row: folder.facts().id for folder in self.folders}
        found = list(self._of_part(ids, "embeddings", "the embeddings", None, compared.embeddings))
        for layer, difference in compared.layers.items():
            found += self._of_layer(ids, layer, difference)
        found += self._of_part(
            ids, "head", "the final norm or the output layer", None, compared.head
        )
        logits = compared.judged_logits
        if not found and logits.relative > compared.tolerance.end_to_end:
            found.append(
                Fault(
                    "logits",
                    f"no part is wrong alone, but the logits differ by up to {logits.relative:.2g} "
                    f"({_where(ids, logits)}): small differences add up.",
                    num_rows=logits.num_over,
                )
            )
        found += self._of_tokens(ids)
        for row, error in self.failed.items():
            found.append(Fault("row", f"row {row!r} has no answer: {error}"))
        if compared.num_missing:
            found.append(
                Fault(
                    "row",
                    f"{compared.num_missing} results of layers or rows were not captured on any "
                    "rank. All ranks must see the same --output_dir.",
                )
            )
        return found

    def _of_part(
        self, ids: Mapping[int, Any], place: str, name: str, layer: int | None, largest: Largest
    ) -> Iterator[Fault]:
        if largest.num_over:
            yield Fault(
                place,
                f"{name} differ by up to {largest.relative:.2g} ({_where(ids, largest)}; "
                f"{largest.num_over} of {largest.num_positions} positions) from the reference's "
                "for the same input.",
                layer,
                num_rows=largest.num_over,
                examples=_examples(ids, largest),
            )

    def _of_layer(
        self, ids: Mapping[int, Any], layer: int, difference: LayerDifference
    ) -> Iterator[Fault]:
        router = difference.router
        if router is not None and router.num_over:
            yield self._of_router(ids, layer, difference, router)
        if difference.experts is not None and difference.experts.num_over:
            yield from self._of_experts(ids, layer, difference.experts)
        name = f"layer {layer}: attention, norms or dense parts"
        yield from self._of_part(ids, "dense", name, layer, difference.dense)

    def _of_router(
        self, ids: Mapping[int, Any], layer: int, difference: LayerDifference, router: Largest
    ) -> Fault:
        what = f"layer {layer}: the router's weights differ by up to {router.relative:.2g}"
        got, wanted = difference.weight_sums
        if abs(got - wanted) > ALIKE * abs(wanted):
            number = max(1, router.num_positions)
            what += f"; those of a row sum to {got / number:.2f}, the reference's to "
            what += f"{wanted / number:.2f} (mean): look at how the top-k weights are normalised"
        if difference.num_other_choices:
            what += f"; {difference.num_other_choices} rows go to other experts"
        return Fault(
            "router",
            f"{what} ({_where(ids, router)}; {router.num_over} of {router.num_positions} "
            "positions).",
            layer,
            num_rows=router.num_over,
            examples=_examples(ids, router),
        )

    def _of_experts(self, ids: Mapping[int, Any], layer: int, largest: Largest) -> Iterator[Fault]:
        reference = self.comparison.reference
        rows, slot_names = _layer_rows(self.folders, layer)
        verdict = find_culprits(
            rows,
            partial(reference.experts, layer),
            num_experts=reference.layers[layer].num_experts,
            tolerance=self.comparison.tolerance.part,
        )
        counted = f"{largest.num_over} of {largest.num_positions} positions"
        if verdict.factor is not None:
            low, high = verdict.factor
            size = f"{low:.3g}" if high - low < ALIKE * abs(low) else f"{low:.3g} to {high:.3g}"
            yield Fault(
                "experts",
                f"layer {layer}: the sums of all experts are off by a factor of {size} "
                f"({counted}): look at how router weights are applied or normalised.",
                layer,
                num_rows=largest.num_over,
                examples=_examples(ids, largest),
            )
            return
        if not verdict.culprits:
            yield Fault(
                "experts",
                f"layer {layer}: experts differ by up to {largest.relative:.2g} "
                f"({_where(ids, largest)}; {counted}), no single one of them.",
                layer,
                num_rows=largest.num_over,
                examples=_examples(ids, largest),
            )
        for culprit in verdict.culprits:
            yield self._of_culprit(ids, layer, culprit, slot_names)

    def _of_culprit(
        self, ids: Mapping[int, Any], layer: int, culprit: Culprit, names: Sequence[str]
    ) -> Fault:
        experts = tuple(sorted({unit.expert for unit in culprit.units}))
        slots = tuple(dict.fromkeys(self._slots(layer, unit, names) for unit in culprit.units))
        examples = tuple((ids[row], position) for row, position in culprit.examples)
        shown = ", ".join(f"row {row!r} at position {position}" for row, position in examples[:3])
        who = f"expert {' or '.join(map(str, experts))}"
        where = f" on {' and '.join(filter(None, slots))}" if any(slots) else ""
        text = (
            f"layer {layer}, {who}{where} is wrong: {culprit.num_rows} of the "
            f"{culprit.num_computed} rows that went there differ by up to {culprit.relative:.2g} "
            f"({shown})."
        )
        if culprit.hint:
            text += f" Given the same rows, {culprit.hint}."
        if culprit.right_elsewhere:
            others = ", ".join(names[slot] for slot in culprit.right_elsewhere)
            text += f" The same expert on {others} is right."
        named = tuple(filter(None, slots))
        return Fault("experts", text, layer, experts, named, culprit.num_rows, examples)

    def _slots(self, layer: int, unit: Unit, names: Sequence[str]) -> str:
        if unit.slot >= 0:
            return names[unit.slot]
        placed = self.slots_of.get(layer)
        return "" if placed is None else "slot " + " or ".join(map(str, placed[unit.expert]))

    def _of_tokens(self, ids: Mapping[int, Any]) -> Iterator[Fault]:
        tokens = self.comparison.tokens
        # Where rounding is coarse, another choice of experts now and then leads far away.
        allowed = 0.0 if self.comparison.tolerance.is_exact else MAX_OTHER_TOKENS
        if tokens.first_other is not None and tokens.num_wrong > allowed * tokens.num:
            row, number = tokens.first_other
            yield Fault(
                "tokens",
                f"{tokens.num_wrong} of {tokens.num} greedy tokens are not what the reference "
                f"takes, the first of them new token {number} of row {ids[row]!r}.",
                num_rows=tokens.num_wrong,
            )


def _where(ids: Mapping[int, Any], largest: Largest) -> str:
    if largest.row is None:
        return "no position"
    return f"row {ids[largest.row]!r}, position {largest.position}"


def _examples(ids: Mapping[int, Any], largest: Largest) -> tuple[tuple[str | int, int], ...]:
    if largest.row is None or largest.position is None:
        return ()
    return ((ids[largest.row], largest.position),)


def _layer_rows(folders: Sequence[RowFolder], layer: int) -> tuple[LayerRows, list[str]]:
    """All captured rows of a layer's experts, slots numbered over all ranks."""
    names: list[str] = []
    parts: dict[str, list[torch.Tensor]] = {}
    places: list[tuple[int, int]] = []
    for folder in folders:
        captured = folder.load(experts_name(layer))
        if not captured:
            continue
        number = folder.facts().row
        places += [(number, position) for position in range(len(captured["hidden"]))]
        slot_SK = torch.full_like(captured["index"], -1)
        if "slot" in captured:
            own = captured["slots"]
            names += [name for name in own if name not in names]
            slot_SK = torch.tensor([names.index(name) for name in own])[captured["slot"]]
        for key, value in (*captured.items(), ("slot", slot_SK)):
            if isinstance(value, torch.Tensor) and (key != "slot" or value is slot_SK):
                parts.setdefault(key, []).append(value)
    joined = {key: torch.cat(values) for key, values in parts.items() if key != "router"}
    rows = LayerRows(
        joined["hidden"], joined["index"], joined["weights"], joined["out"], joined["slot"], places
    )
    return rows, names
