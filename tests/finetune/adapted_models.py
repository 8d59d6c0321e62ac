"""Models with adapters, and the plain ones that they must equal."""

from pathlib import Path

import torch

from moe_lightning.dispatch import RoutingLog
from moe_lightning.dispatch.local import LocalDispatcher
from moe_lightning.experts import ExpertShard
from moe_lightning.experts.adapters import merged
from moe_lightning.finetune.adapter_values import initialise_adapters
from moe_lightning.finetune.lora import adapter_names, add_adapters
from moe_lightning.modeling.checkpoint import open_checkpoint
from moe_lightning.modeling.expert_rows import expert_rows
from moe_lightning.modeling.loading import load_model
from moe_lightning.modeling.seam import attach, find_moe_layers

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 17, 250, 3, 99, 42, 7, 311, 80, 12, 200, 64]])


def load(path: Path, *, experts=None):
    """The model of a checkpoint, or of some of its experts, without adapters."""
    return load_model(
        open_checkpoint(str(path)),
        device=CPU,
        dtype=torch.float32,
        experts=experts,
        show_progress=False,
    )


def rows_of(model, num_experts=8, experts=None):
    """Which experts the rows of the model's parameters are."""
    layers = find_moe_layers(model)
    return expert_rows(layers, {layer.layer: num_experts for layer in layers}, experts)


def attached(model, backend="grouped_mm"):
    """The model, its experts computed by this package."""

    def dispatcher(layer):
        shard = ExpertShard(
            layer.experts, layer=layer.layer, expert_ids=range(layer.num_experts), backend=backend
        )
        return LocalDispatcher(shard, log=RoutingLog())

    attach(model, dispatcher)
    return model


def adapted(path: Path, lora, *, backend="grouped_mm", num_experts=8):
    """A loaded model with adapters and their first values."""
    model = load(path)
    add_adapters(model, lora)
    initialise_adapters(model, lora, rows_of(model, num_experts), device=CPU)
    return attached(model, backend)


@torch.no_grad()
def randomise(model, seed=1):
    """Give adapters values that every one of them shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    for name in adapter_names(model):
        parameter = model.get_parameter(name)
        parameter.copy_(
            torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
        )
    return model


def logits(model, ids=IDS):
    """Logits of a few tokens, ``[S, V]``."""
    return model(ids, use_cache=False).logits[0]


@torch.no_grad()
def merge_into(plain, model, scale):
    """Add a model's adapters to the weights of a plain one, by :func:`merged`."""
    for a_name in [name for name in adapter_names(model) if name.endswith("lora_A")]:
        module_name, _, own_name = a_name.rpartition(".")
        weight_name = own_name[: -len("lora_A")].removesuffix("_") or "weight"
        module = plain.get_submodule(module_name)
        weight = getattr(module, weight_name)
        a, b = (model.get_parameter(name) for name in (a_name, a_name[:-1] + "B"))
        is_transposed = bool(getattr(module, "is_transposed", False))
        weight.copy_(merged(weight, a, b, scale=scale, is_transposed=is_transposed))
    return plain
