"""Comparison: what was captured of every row against the reference, part by part."""

from collections.abc import Mapping

import torch
from torch import Tensor

from moe_lightning.verification.differences import (
    Largest,
    LayerDifference,
    relative_differences,
)
from moe_lightning.verification.folder import RowFolder, experts_name, layer_name
from moe_lightning.verification.greedy_tokens import Tokens
from moe_lightning.verification.reference import Reference
from moe_lightning.verification.tolerances import Tolerance

NUM_NUDGES = 64


class Comparison:
    """Rows against a reference, one after the other.

    Args:
        reference: The reference.
        tolerance: What differences are right.

    Attributes:
        layers: Differences of each layer.
        embeddings: What goes into the first layer, end to end.
        head: Logits of the captured last hidden states.
        logits: Logits, end to end.
        judged_logits: The same before a choice between experts went the other way.
        tokens: Greedy tokens.
        num_missing: Parts of rows that no rank has captured.
    """

    def __init__(self, reference: Reference, tolerance: Tolerance) -> None:
        self.reference = reference
        self.tolerance = tolerance
        num_layers = len(reference.model.base_model.layers)
        self.layers = {layer: LayerDifference() for layer in range(num_layers)}
        for layer in reference.layers:
            self.layers[layer].router, self.layers[layer].experts = Largest(), Largest()
        self.embeddings, self.head = Largest(), Largest()
        self.logits, self.judged_logits = Largest(), Largest()
        self.tokens = Tokens()
        self.num_missing = 0

    def add(self, folder: RowFolder) -> None:
        """Compare one row."""
        facts = folder.facts()
        captured = folder.load("logits")
        if not captured:
            self.num_missing += 1
            return
        positions_P, logits_PV = captured["positions"], captured["logits"]
        alone = _Alone(self, folder, facts.row)
        logits_SV = self.reference.logits(facts.token_ids, alone)
        self.head.see(
            logits_PV,
            logits_SV[positions_P],
            row=facts.row,
            tolerance=self.tolerance.part,
            positions_T=positions_P,
        )
        whole = _EndToEnd(self, folder, facts.row, len(facts.token_ids))
        logits_SV = self.reference.logits(facts.token_ids + facts.new_token_ids[:-1], whole)
        is_judged_P = positions_P < whole.first_flip
        for largest, chosen_P in (
            (self.logits, torch.ones_like(is_judged_P)),
            (self.judged_logits, is_judged_P),
        ):
            largest.see(
                logits_PV[chosen_P],
                logits_SV[positions_P[chosen_P]],
                row=facts.row,
                tolerance=self.tolerance.end_to_end,
                positions_T=positions_P[chosen_P],
            )
        self.tokens.see(facts, logits_SV, self.tolerance)


class _Alone:
    """Every part gets what the configured part got."""

    def __init__(self, comparison: Comparison, folder: RowFolder, row: int) -> None:
        self._comparison = comparison
        self._tolerance = comparison.tolerance.part
        self._folder = folder
        self._row = row
        self._captured: Mapping[str, Tensor] = {}

    def embeddings(self, hidden_SD: Tensor) -> Tensor | None:
        captured: Tensor | None = self._folder.load("embeddings").get("hidden_SD")
        return captured

    def layer(self, layer: int, hidden_SD: Tensor) -> Tensor | None:
        captured: Tensor | None = self._folder.load(layer_name(layer)).get("hidden_SD")
        if captured is None:
            self._comparison.num_missing += 1
            return None
        self._see(self._comparison.layers[layer].dense, captured, hidden_SD)
        return captured

    def router_input(self, layer: int, hidden_SD: Tensor) -> Tensor | None:
        self._captured = self._folder.load(experts_name(layer))
        if not self._captured:
            self._comparison.num_missing += 1
            return None
        given_SD: Tensor = self._captured.get("router", self._captured["hidden"])
        return given_SD

    def routing(
        self, layer: int, hidden_SD: Tensor, index_SK: Tensor, weights_SK: Tensor
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        captured = self._captured
        if not captured:
            return None
        self._compare_routing(layer, captured, index_SK.cpu(), weights_SK.cpu())
        return captured["hidden"], captured["index"], captured["weights"]

    def experts(self, layer: int, out_SD: Tensor) -> Tensor | None:
        if not self._captured:
            return None
        experts = self._comparison.layers[layer].experts
        assert experts is not None, "it is a layer with experts"
        self._see(experts, self._captured["out"], out_SD)
        return self._captured["out"]

    def _compare_routing(
        self, layer: int, captured: Mapping[str, Tensor], index_SK: Tensor, weights_SK: Tensor
    ) -> None:
        found = self._comparison.layers[layer]
        assert found.router is not None, "it is a layer with experts"
        num_experts = self._comparison.reference.layers[layer].num_experts
        got_SE = weights_by_expert(captured["index"], captured["weights"], num_experts)
        wanted_SE = weights_by_expert(index_SK, weights_SK, num_experts)
        is_other_S = other_choices(captured["index"], index_SK)
        is_off_S = is_other_S | (relative_differences(got_SE, wanted_SE) > self._tolerance)
        off = is_off_S.nonzero().squeeze(1)
        is_tie_S = torch.zeros_like(is_other_S)
        if len(off):
            router_SD = captured.get("router", captured["hidden"])
            is_tie_S[off] = self._ties(layer, router_SD[off], got_SE[off], wanted_SE[off])
        found.num_ties += int(is_tie_S.sum())
        found.num_other_choices += int((is_other_S & ~is_tie_S).sum())
        positions = (~is_tie_S).nonzero().squeeze(1)
        found.weight_sums[0] += float(got_SE[positions].sum())
        found.weight_sums[1] += float(wanted_SE[positions].sum())
        found.router.see(
            got_SE[positions],
            wanted_SE[positions],
            row=self._row,
            tolerance=self._tolerance,
            positions_T=positions,
        )

    def _ties(self, layer: int, router_TD: Tensor, got_TE: Tensor, wanted_TE: Tensor) -> Tensor:
        """Whether the reference would route as was routed if its input were a little different.

        True of no family in particular: some choose by groups, some by corrected scores, some
        weights jump where a score passes a bound.
        """
        generator = torch.Generator().manual_seed(0)
        router_TD = router_TD.float()
        least_TE, most_TE = wanted_TE.clone(), wanted_TE.clone()
        for _ in range(NUM_NUDGES):
            noise_TD = torch.randn(router_TD.shape, generator=generator)
            nudged = self._comparison.reference.route(
                layer, router_TD * (1 + self._tolerance * noise_TD)
            )
            if nudged is None:
                break
            nudged_TE = weights_by_expert(*nudged, got_TE.shape[1])
            least_TE = torch.minimum(least_TE, nudged_TE)
            most_TE = torch.maximum(most_TE, nudged_TE)
        is_got_TE = got_TE != 0
        is_reachable_T = torch.where(is_got_TE, most_TE > 0, least_TE == 0).all(1)
        is_other_T = (is_got_TE != (wanted_TE != 0)).any(1)
        slack_T1 = self._tolerance * wanted_TE.norm(dim=1, keepdim=True)
        is_between_TE = (got_TE >= least_TE - slack_T1) & (got_TE <= most_TE + slack_T1)
        is_tie_T: Tensor = is_between_TE.all(1) | (is_other_T & is_reachable_T)
        return is_tie_T

    def _see(self, largest: Largest, got_SX: Tensor, wanted_SX: Tensor) -> None:
        largest.see(got_SX, wanted_SX.cpu(), row=self._row, tolerance=self._tolerance)


class _EndToEnd:
    """Nothing is replaced."""

    def __init__(
        self, comparison: Comparison, folder: RowFolder, row: int, num_prompt_tokens: int
    ) -> None:
        self._comparison = comparison
        self._tolerance = comparison.tolerance.end_to_end
        self._folder = folder
        self._row = row
        self._length = num_prompt_tokens
        self._router_SD = torch.empty(0)
        self.first_flip = num_prompt_tokens

    def embeddings(self, hidden_SD: Tensor) -> None:
        self._see(self._comparison.embeddings, self._folder.load("embeddings"), hidden_SD)

    def layer(self, layer: int, hidden_SD: Tensor) -> None:
        captured = self._folder.load(layer_name(layer))
        self._see(self._comparison.layers[layer].hidden, captured, hidden_SD)

    def router_input(self, layer: int, hidden_SD: Tensor) -> None:
        self._router_SD = hidden_SD[: self._length].cpu()

    def routing(self, layer: int, hidden_SD: Tensor, index_SK: Tensor, weights_SK: Tensor) -> None:
        captured = self._folder.load(experts_name(layer))
        if not captured:
            return
        num_experts = self._comparison.reference.layers[layer].num_experts
        index_SK, weights_SK = index_SK[: self._length].cpu(), weights_SK[: self._length].cpu()
        got_SE = weights_by_expert(captured["index"], captured["weights"], num_experts)
        wanted_SE = weights_by_expert(index_SK, weights_SK, num_experts)
        router_SD = captured.get("router", captured["hidden"])
        # Weights that jump though what the router got is the same are as good as a choice.
        is_same_S = relative_differences(router_SD, self._router_SD) <= self._tolerance
        is_jump_S = is_same_S & (relative_differences(got_SE, wanted_SE) > self._tolerance)
        flips = (other_choices(captured["index"], index_SK) | is_jump_S).nonzero().squeeze(1)
        if len(flips):
            self.first_flip = min(self.first_flip, int(flips[0]))

    def experts(self, layer: int, out_SD: Tensor) -> None:
        pass

    def _see(self, largest: Largest, captured: Mapping[str, Tensor], wanted_SX: Tensor) -> None:
        if captured:
            wanted_SX = wanted_SX[: self._length].cpu()
            largest.see(captured["hidden_SD"], wanted_SX, row=self._row, tolerance=self._tolerance)


def weights_by_expert(index_TK: Tensor, weights_TK: Tensor, num_experts: int) -> Tensor:
    """Router weights with a column for each expert, ``[T, E]`` in fp32."""
    weights_TE = torch.zeros(index_TK.shape[0], num_experts)
    return weights_TE.scatter_add_(1, index_TK.long(), weights_TK.float())


def other_choices(got_TK: Tensor, wanted_TK: Tensor) -> Tensor:
    """Positions whose experts are not the same ones, whatever their order."""
    return (got_TK.sort(1).values != wanted_TK.sort(1).values).any(1)
