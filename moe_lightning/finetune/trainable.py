"""Which parameters train: all, all but the routers, or only chosen experts.

Choosing a few experts of some layers is Expert-Specialized Fine-Tuning (Wang et al., Let the Expert
Stick to His Last, 2024). A parameter holds many experts, so that its other rows are kept back by
:class:`moe_lightning.finetune.kept_rows.KeptRows`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from moe_lightning.errors import UsageError
from moe_lightning.modeling.seam import find_moe_layers

_CHOICE = re.compile(r"\s*(\*|\d+(?:-\d+)?)\s*:\s*(\*|\d+(?:-\d+)?(?:\s*,\s*\d+(?:-\d+)?)*)\s*")


@dataclass(frozen=True)
class Trainable:
    """Which parameters train.

    Args:
        freeze_router: Whether the routers stay as they are.
        train_experts: The experts that train, as LAYER:EXPERTS in quotes (YAML takes 5:1 for a
            time), for example ["3:0-7", "5:1,4", "7:*"]; layers may be a range or * as well. The
            default is all experts. With a choice, the dense layers and routers stay as they are
            unless train_dense is true.
        train_dense: Whether all that is not an expert trains as well; only means something together
            with train_experts, or false with it left out to train nothing but experts.
    """

    freeze_router: bool = False
    train_experts: Sequence[str] | None = None
    train_dense: bool | None = None

    @property
    def trains_dense(self) -> bool:
        """Whether dense parameters train."""
        return self.train_experts is None if self.train_dense is None else self.train_dense


def choose_experts(
    choices: Sequence[str], num_experts: Mapping[int, int]
) -> dict[int, tuple[int, ...]]:
    """Read LAYER:EXPERTS choices.

    Args:
        choices: As for Trainable.
        num_experts: Logical experts of each MoE layer of the model.

    Returns:
        The chosen experts of each layer that has some, ascending.

    Raises:
        UsageError: If a choice cannot be read, or names a layer or expert that does not exist.
    """
    chosen: dict[int, set[int]] = {}
    for choice in choices:
        match = _CHOICE.fullmatch(choice)
        if match is None:
            raise UsageError(
                f"train_experts has {choice!r}, which is not LAYER:EXPERTS. Write 3:0-7 for the "
                "experts 0 to 7 of layer 3, 3:1,4 for two of them, 3:* for all, *:0 for the first "
                "of every layer."
            )
        layers, experts = match.groups()
        named = list(num_experts) if layers == "*" else _numbers(layers, choice)
        unknown = [layer for layer in named if layer not in num_experts]
        if unknown:
            raise UsageError(
                f"train_experts has {choice!r}, but layer {unknown[0]} has no experts; the layers "
                f"with experts are {', '.join(map(str, num_experts))}."
            )
        for layer in named:
            total = num_experts[layer]
            wanted = range(total) if experts == "*" else _numbers(experts, choice)
            if max(wanted) >= total:
                raise UsageError(
                    f"train_experts has {choice!r}, but layer {layer} has the experts 0 to "
                    f"{total - 1}."
                )
            chosen.setdefault(layer, set()).update(wanted)
    if not chosen:
        raise UsageError("train_experts is empty. Leave it out to train all experts.")
    return {layer: tuple(sorted(chosen[layer])) for layer in sorted(chosen)}


def _numbers(text: str, choice: str) -> list[int]:
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if last and int(last) < int(first):
            raise UsageError(f"train_experts has {choice!r}, whose range {part} runs backwards.")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def freeze_others(
    model: PreTrainedModel, trainable: Trainable, num_experts: Mapping[int, int]
) -> dict[int, tuple[int, ...]] | None:
    """Freeze what does not train; before FSDP shards the model, and after adapters are added.

    Nothing is unfrozen: what adapters have frozen stays so. A layer with one chosen expert trains
    its experts' parameters on every rank, those with none of the chosen included, so that all ranks
    take part in the same collectives.

    Args:
        model: The model, on meta or not; changed in place.
        trainable: What trains.
        num_experts: Logical experts of each MoE layer of the whole model.

    Returns:
        The chosen experts of each layer; None if all train.

    Raises:
        UsageError: If a choice is wrong, or nothing is left to train.
    """
    chosen = None
    if trainable.train_experts is not None:
        chosen = choose_experts(trainable.train_experts, num_experts)
    layers = find_moe_layers(model)
    expert_ids = {id(p) for layer in layers for p in layer.experts.parameters()}
    router_ids = {id(p) for layer in layers for p in layer.router.parameters()}
    for parameter in model.parameters():
        if id(parameter) in expert_ids:
            continue
        if not trainable.trains_dense or (trainable.freeze_router and id(parameter) in router_ids):
            parameter.requires_grad_(False)
    for layer in layers:
        if chosen is not None and layer.layer not in chosen:
            layer.experts.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(
            "No parameter is left to train: what adapters leave to train and what train_experts, "
            "train_dense and freeze_router allow do not meet. Give adapters on experts, or set "
            "train_dense to true."
        )
    return chosen
