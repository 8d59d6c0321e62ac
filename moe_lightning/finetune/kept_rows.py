"""KeptRows: the rows of experts parameters that do not train, though their parameter does."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_lightning.finetune.local_parts import local_part
from moe_lightning.finetune.replicas import local_expert_ids
from moe_lightning.modeling.expert_rows import ExpertRows
from moe_lightning.modeling.seam import MoELayer


class _Kept(NamedTuple):
    """One parameter's rows on this rank."""

    parameter: Tensor
    kept_R: Tensor


class KeptRows:
    """Keeps the rows of experts that were not chosen bitwise as they are.

    Their gradients are zeroed before clipping, so that they count for no norm. That is not enough:
    weight decay moves a row without a gradient, and so may an optimizer's momentum after resuming
    with another choice. So their values are copied before the optimizer's step and put back after
    it, which is right for every optimizer and leaves the layout of its state alone.

        backward ─▶ hold(): zero their gradients, copy values ─▶ clip ─▶ step ─▶ restore()

    Args:
        parameters: The parameters, each with the rows of this rank's piece that are kept, int64.
    """

    def __init__(self, parameters: Iterable[tuple[Tensor, Tensor]]) -> None:
        self._kept = [_Kept(p, rows) for p, rows in parameters if rows.numel()]
        self._values: list[Tensor] = []

    @classmethod
    def of(
        cls,
        layers: Sequence[MoELayer],
        rows: Mapping[str, ExpertRows],
        chosen: Mapping[int, Collection[int]],
    ) -> "KeptRows":
        """Find the rows of a model; after it is sharded.

        Args:
            layers: Its MoE layers.
            rows: What the rows of parameters are, by name in the model.
            chosen: The experts that train, for each layer that has some.
        """
        found: list[tuple[Tensor, Tensor]] = []
        for layer in layers:
            train = frozenset(chosen.get(layer.layer, ()))
            for name, parameter in layer.experts.named_parameters(recurse=False):
                if parameter.requires_grad:
                    ids = local_expert_ids(parameter, rows[f"{layer.name}.{name}"])
                    kept = [row for row, expert in enumerate(ids) if expert not in train]
                    found.append((parameter, torch.tensor(kept, dtype=torch.int64)))
        return cls(found)

    @torch.no_grad()
    def hold(self) -> None:
        """Zero the gradients of kept rows and copy their values; after backward, before a step."""
        self._values = []
        for parameter, kept_R in self._kept:
            local = local_part(parameter)
            kept_R = kept_R.to(local.device)
            if parameter.grad is not None:
                local_part(parameter.grad).index_fill_(0, kept_R, 0)
            self._values.append(local.index_select(0, kept_R))

    @torch.no_grad()
    def restore(self, *_: Any) -> None:
        """Put the values back; does nothing if none are held. An optimizer's post-step hook."""
        for (parameter, kept_R), values in zip(self._kept, self._values, strict=False):
            local_part(parameter).index_copy_(0, kept_R.to(values.device), values)
        self._values = []
