"""LoRA: which weights get low-rank adapters, and the adapters as parameters of their modules.

    nn.Linear of an attention block    lora_A [P, in], lora_B [out, P], applied by a forward hook
    experts module                     <projection>_lora_A, _lora_B, applied by the experts' backend

No module is wrapped and no weight renamed, unlike in PEFT: lazy loading, placement and sharding
find the checkpoint's names, and shard the adapters along. They are added before a model is sharded.
What they start from lives in ``adapter_values``, PEFT's files in ``adapter_files``.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from moe_lightning.errors import CheckpointError, UsageError
from moe_lightning.experts.adapters import LORA_A, LORA_B, add_experts_adapter
from moe_lightning.experts.packed import projections
from moe_lightning.finetune.adapter_files import AdapterFile
from moe_lightning.finetune.adapter_layout import expert_keys, linear_key
from moe_lightning.modeling.seam import MoELayer, find_moe_layers

_ATTENTION = re.compile(r"(^|[._])(attn|attention)")


class LoRA:
    """Trains low-rank adapters of attention and experts, and nothing else.

    Args:
        rank: Rank of the adapters; each expert has its own.
        alpha: What an adapter adds is multiplied by alpha / rank.
        targets: Last names of the attention's linear layers that get adapters, such as q_proj. The
            default is all of them, latent projections included; an empty list is none.
        experts: Whether the routed experts get adapters, one for each of their projections.
        seed: Seed of what adapters start from. One seed gives the same start on any number of
            ranks.
        adapter: Directory of a PEFT adapter to start from. Rank, alpha, targets and experts are
            then the adapter's. The default starts with adapters that add nothing.
    """

    def __init__(
        self,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        targets: list[str] | None = None,
        experts: bool = True,
        seed: int = 0,
        adapter: str | None = None,
    ) -> None:
        if rank < 1:
            raise UsageError(f"lora.rank={rank}: an adapter has a rank of 1 or more.")
        if not alpha > 0:
            raise UsageError(f"lora.alpha={alpha}: it must be above 0, or adapters add nothing.")
        if targets == [] and not experts and adapter is None:
            raise UsageError(
                "lora.targets is empty and lora.experts is false, so nothing would be trained. "
                "Leave one of them out."
            )
        self.source = None if adapter is None else AdapterFile(Path(adapter))
        self.rank = rank if self.source is None else self.source.rank
        self.alpha = alpha if self.source is None else self.source.alpha
        self.targets = targets
        self.experts = experts
        self.seed = seed

    @property
    def scale(self) -> float:
        """Factor of what an adapter adds."""
        return self.alpha / self.rank


def add_adapters(model: PreTrainedModel, lora: LoRA) -> list[str]:
    """Add adapters to a whole model and freeze everything else, the routers included.

    Adapters of a model that is not on meta are zeros, which do not train: their values come from
    :func:`moe_lightning.finetune.adapter_values.initialise_adapters`.

    Args:
        model: The model before it is cut into stages or shards, on meta or loaded; its MoE layers
            may be cut down to some experts. Changed in place.
        lora: The options.

    Returns:
        The names of the new parameters in the model.

    Raises:
        UsageError: If what was asked for cannot be found in the model, or has adapters already.
        CheckpointError: If an adapter to start from has parts that the model has no place for.
    """
    if names := adapter_names(model):
        raise UsageError(f"the model has adapters already, such as {names[0]}.")
    layers = find_moe_layers(model)
    both: tuple[str, ...] = projections(layers[0].experts)
    if lora.source is None:
        linears = _attention_linears(model, lora.targets)
        chosen = both if lora.experts else ()
    else:
        linears = _linears_in(model, lora.source)
        chosen = lora.source.projections_of(both)
        _check_whole(lora.source, linears, [layer.name for layer in layers], chosen)
    for module in linears.values():
        _add_to_linear(module, rank=lora.rank, scale=lora.scale)
    for layer in layers:
        _add_to_experts(layer, chosen, lora)
    names = adapter_names(model)
    if not names:
        raise UsageError(
            f"{type(model).__name__} has nothing that lora.targets={lora.targets} and "
            f"lora.experts={lora.experts} name, so nothing would be trained."
        )
    train_adapters_only(model)
    return names


def adapter_names(model: nn.Module) -> list[str]:
    """The names of all adapters' parameters in a model, in its order."""
    return [name for name, _ in model.named_parameters() if is_adapter(name)]


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name belongs to an adapter."""
    return name.endswith((LORA_A, LORA_B))


def train_adapters_only(model: nn.Module) -> None:
    """Let adapters have gradients and nothing else; loading makes parameters that forget it.

    Args:
        model: The model; changed in place.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))


def _attention_linears(model: PreTrainedModel, targets: list[str] | None) -> dict[str, nn.Linear]:
    """The linear layers of all attention blocks, by name; those of the given last names."""
    if targets == []:
        return {}
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and _ATTENTION.search(name.lower())
    }
    last_names = sorted({name.rpartition(".")[2] for name in found})
    if not found:
        raise UsageError(
            f"{type(model).__name__} has no linear layers in modules called attention, so LoRA "
            "finds nothing to adapt there. Give --model.lora.targets [] to adapt experts only."
        )
    if unknown := sorted(set(targets or ()) - set(last_names)):
        raise UsageError(
            f"lora.targets: the attention of {type(model).__name__} has no {', '.join(unknown)}; "
            f"choose from {', '.join(last_names)}."
        )
    return {
        name: module
        for name, module in found.items()
        if targets is None or name.rpartition(".")[2] in targets
    }


def _linears_in(model: PreTrainedModel, source: AdapterFile) -> dict[str, nn.Linear]:
    """The linear layers that an adapter adapts, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and linear_key(name, LORA_A) in source.keys
    }


def _check_whole(
    source: AdapterFile, linears: dict[str, nn.Linear], layers: list[str], chosen: tuple[str, ...]
) -> None:
    """Check that the file has all that the model's adapters need, and no more."""
    wanted = {linear_key(name, letter) for name in linears for letter in (LORA_A, LORA_B)}
    for layer in layers:
        wanted.update(expert_keys(layer, chosen).values())
    lacking, unknown = sorted(wanted - source.keys), sorted(source.keys - wanted)
    if lacking or unknown:
        raise CheckpointError(
            f"{source.path}: the adapter does not fit the model: it lacks {lacking[:3]}, and the "
            f"model has no place for {unknown[:3]}. Adapters of nn.Linear layers and of fused "
            "experts (PEFT's target_parameters, all MoE layers alike) can be loaded; one made with "
            "transformers 4 must be loaded and saved again with PEFT and transformers 5."
        )


def _add_to_linear(module: nn.Linear, *, rank: int, scale: float) -> None:
    weight = module.weight
    for name, shape in (
        (LORA_A, (rank, module.in_features)),
        (LORA_B, (module.out_features, rank)),
    ):
        zeros = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        module.register_parameter(name, nn.Parameter(zeros))
    module.register_forward_hook(partial(_apply, scale))


def _apply(scale: float, module: nn.Module, inputs: tuple[Any, ...], out: Tensor) -> Tensor:
    """A forward hook: add what the adapter gives for the module's inputs."""
    a, b = getattr(module, LORA_A), getattr(module, LORA_B)
    return out + linear(scale * linear(inputs[0], a), b)


def _add_to_experts(layer: MoELayer, chosen: tuple[str, ...], lora: LoRA) -> None:
    for projection in chosen:
        weight = getattr(layer.experts, projection, None)
        if not isinstance(weight, Tensor) or weight.ndim != 3:
            raise UsageError(
                f"lora.experts: {layer.name} ({type(layer.experts).__name__}) has no fused weight "
                f"{projection!r} [experts, out, in] to adapt. Give --model.lora.experts false to "
                "adapt attention only."
            )
        add_experts_adapter(layer.experts, projection, rank=lora.rank, scale=lora.scale)
