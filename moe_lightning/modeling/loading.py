"""From a checkpoint to a model: built on meta, filled from lazy tensors, any subset of experts of
any layer.

    config ──▶ model on meta ──▶ experts cut down ──▶ transformers' weight converters ◀── wanted
    bytes

Which tensors are wanted lives in ``expert_selection``, how they get into the model in ``filling``.
"""

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from moe_lightning.errors import CheckpointError
from moe_lightning.modeling.checkpoint import CheckpointView
from moe_lightning.modeling.expert_selection import select_sources
from moe_lightning.modeling.filling import ModelFiller, assert_materialised
from moe_lightning.modeling.preflight import check_model
from moe_lightning.modeling.seam import MoELayer, find_moe_layers


def build_on_meta(
    config: PreTrainedConfig, *, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The model of a config with no memory behind its parameters.

    Args:
        config: A causal language model's config. The model gets a copy: what is set on it, its
            dtype or how experts are computed, is not set on the next model of the same config.
        dtype: Dtype of the parameters.

    Returns:
        The model on the meta device, in eval mode.

    Raises:
        CheckpointError: If transformers has no causal language model for the config, or cannot
            build it.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=dtype
            )
    except Exception as error:
        raise CheckpointError(
            f"transformers cannot build a causal language model from this config.json (model_type "
            f"{config.model_type!r}): {error}. Check that the directory is a text model's and its "
            "config.json unedited."
        ) from error
    return model.eval()


def load_model(
    view: CheckpointView,
    *,
    device: torch.device,
    dtype: torch.dtype,
    experts: Mapping[int, Sequence[int]] | None = None,
    on_layer: Callable[[MoELayer], None] | None = None,
    on_meta: Callable[[PreTrainedModel], None] | None = None,
    show_progress: bool = True,
) -> PreTrainedModel:
    """Load a checkpoint, or the part of it that this process needs.

    Args:
        view: The opened checkpoint.
        device: Where the weights go; each goes straight from its file.
        dtype: Dtype of the weights, except those that the family keeps in fp32.
        experts: For each MoE layer, the logical experts to load; None, or a layer left out, means
            all. With an empty list the layer's parameters are there and have no rows.
        on_layer: Called once for each MoE layer, in order, as soon as its experts are filled and
            before a later layer is read. It may take the experts' weights away to free their
            memory, as long as every parameter keeps its shape and a device other than meta; it must
            add no buffers. The rest of the model is not ready yet.
        on_meta: Called with the model on meta, its experts cut down, before anything is read. It
            may cut the model further: take modules out, and shard parameters. Only what is left is
            read.
        show_progress: Whether to show a progress bar on stderr.

    Returns:
        The model in eval mode, with no tensor left on meta.

    Raises:
        CheckpointError: If the checkpoint and the model that its config describes do not match
            exactly.
        ValueError: If an expert, or a layer with experts, is asked for that does not exist.
    """
    model = build_on_meta(view.config, dtype=dtype)
    layers = find_moe_layers(model)
    check_model(view, build_on_meta(view.config, dtype=dtype))
    sources = select_sources(model, view, experts or {})
    if on_meta is not None:
        on_meta(model)
        names = set(model.state_dict())
        sources = [source for source in sources if source.target.name in names]
        layers = [layer for layer in layers if layer.is_part_of(model)]
    filler = ModelFiller(model, path=view.path, device=device, dtype=dtype)
    filler.fill(sources, layers=layers, on_layer=on_layer, show_progress=show_progress)
    filler.finalize()
    model.generation_config = generation_config(view)
    return model


def load_experts(
    view: CheckpointView,
    *,
    device: torch.device,
    dtype: torch.dtype,
    experts: Mapping[int, Sequence[int]],
    on_layer: Callable[[MoELayer], None] | None = None,
    show_progress: bool = True,
) -> dict[int, nn.Module]:
    """Load some experts of some layers and nothing else.

    The checkpoint's tensors are not compared with its config again; :func:`load_model` of the same
    view has done that.

    Args:
        view: The opened checkpoint.
        device: Where the weights go; each goes straight from its file.
        dtype: Dtype of the weights, except those that the family keeps in fp32.
        experts: For each MoE layer, the logical experts to load, in the order of the rows; a layer
            left out has none here.
        on_layer: As for :func:`load_model`. The layer's router is on meta.
        show_progress: Whether to show a progress bar on stderr.

    Returns:
        For each layer with experts, the family's own experts module with only these, in eval mode.

    Raises:
        CheckpointError: If tensors of the experts are missing or do not fit.
        ValueError: If an expert, or a layer with experts, is asked for that does not exist.
    """
    model = build_on_meta(view.config, dtype=dtype)
    sources = select_sources(model, view, experts)
    layers = [layer for layer in find_moe_layers(model) if experts.get(layer.layer)]
    prefixes = tuple(f"{layer.name}." for layer in layers)
    wanted = [source for source in sources if source.target.name.startswith(prefixes)]
    filler = ModelFiller(model, path=view.path, device=device, dtype=dtype)
    filler.fill(wanted, layers=layers, on_layer=on_layer, show_progress=show_progress)
    for layer in layers:
        assert_materialised(layer.experts)
    return {layer.layer: layer.experts for layer in layers}


def generation_config(view: CheckpointView) -> GenerationConfig:
    """How the checkpoint's authors generate with it: its own file, or what its config says."""
    if (view.path / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(view.path)
    return GenerationConfig.from_model_config(view.config)
