"""How large a model is, from its config alone: nothing but config.json is read or downloaded."""

import os
import re
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from moe_lightning.errors import CheckpointError
from moe_lightning.experts.backends import bytes_of_experts, bytes_per_weight
from moe_lightning.experts.packed import projections
from moe_lightning.modeling.checkpoint import open_checkpoint
from moe_lightning.modeling.loading import build_on_meta
from moe_lightning.modeling.seam import MoELayer, find_moe_layers
from moe_lightning.modeling.sharding import tensor_parallel_styles
from moe_lightning.placement.footprint import LayerSizes, ModelSizes, TensorParallelPlan


def read_config(name: str) -> PreTrainedConfig:
    """The config of a checkpoint, whether its weights are here or not.

    Args:
        name: ``demo``, a directory, of which the headers are checked if it holds weights, or a hub
            id, of which only config.json is downloaded.

    Returns:
        The config.

    Raises:
        CheckpointError: If there is no such checkpoint, or it is damaged.
    """
    path = Path(name).expanduser()
    is_directory = os.path.isdir(path)
    is_hub_id = not os.path.exists(path) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)
    if not is_hub_id and not (is_directory and not any(path.glob("*.safetensors"))):
        with open_checkpoint(name) as view:
            return view.config
    try:
        # Never remote code, whatever config.json asks for.
        return AutoConfig.from_pretrained(
            path if is_directory else name, trust_remote_code=False, local_files_only=is_directory
        )
    except Exception as error:
        raise CheckpointError(
            f"{name!r}: transformers cannot use its config.json, or there is none: "
            f"{' '.join(str(error).split())}. Check --model.checkpoint: a directory, a hub id, or "
            "demo."
        ) from error


def measure(
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype,
    experts_backend: str = "auto",
    device_type: str = "cpu",
    lora_rank: int | None = None,
) -> ModelSizes:
    """Measure the model of a config.

    Args:
        config: The config.
        dtype: Dtype of the weights.
        experts_backend: How experts are computed in inference, which decides how many bytes their
            weights take; ``auto`` for training.
        device_type: ``cpu`` or ``cuda``.
        lora_rank: Rank of adapters on attention and on all experts; None is no adapters.

    Returns:
        The sizes of all parameters.

    Raises:
        CheckpointError: If transformers cannot build the model, or its experts cannot be found.
    """
    model = build_on_meta(config, dtype=dtype)
    text = config.get_text_config()
    moe_layers = {layer.layer: layer for layer in find_moe_layers(model)}
    embedding, head = _weight(model.get_input_embeddings()), _weight(model.get_output_embeddings())
    embedding_bytes = _bytes(embedding)
    head_bytes = 0 if head is None or head is embedding else _bytes(head)
    layers, in_layers = [], 0
    for index, decoder_layer in enumerate(_decoder_layers(model, moe_layers)):
        total = sum(_bytes(parameter) for parameter in decoder_layer.parameters())
        in_layers += total
        found = moe_layers.get(index)
        if found is None:
            layers.append(LayerSizes(total))
            continue
        unpacked = sum(_bytes(parameter) for parameter in found.experts.parameters())
        experts = bytes_of_experts(experts_backend, found.experts, device_type)
        layers.append(LayerSizes(total - unpacked, experts, found.num_experts))
    everything = sum(_bytes(parameter) for parameter in model.parameters())
    heads = (getattr(text, f"num_{kind}_heads", None) for kind in ("attention", "key_value"))
    return ModelSizes(
        name=type(model).__name__,
        dtype=str(dtype).removeprefix("torch."),
        row_bytes=text.hidden_size * dtype.itemsize,
        layers=tuple(layers),
        embedding_bytes=embedding_bytes,
        head_bytes=head_bytes,
        other_bytes=everything - in_layers - embedding_bytes - head_bytes,
        top_k=_top_k(text),
        num_heads=tuple(int(number) for number in heads if number),
        adapter_bytes=None
        if lora_rank is None
        else dtype.itemsize * _num_adapter_weights(model, list(moe_layers.values()), lora_rank),
        tensor_parallel=_tensor_parallel(model, list(moe_layers.values())),
        expert_itemsize=bytes_per_weight(experts_backend, dtype, device_type),
    )


def _decoder_layers(model: PreTrainedModel, moe_layers: dict[int, MoELayer]) -> nn.ModuleList:
    """The list that the MoE layers are in."""
    name = next(iter(moe_layers.values())).name
    prefix = name[: re.search(r"(^|\.)\d+\.", name).start()]  # type: ignore[union-attr]
    return cast(nn.ModuleList, model.get_submodule(prefix))


def _top_k(config: PreTrainedConfig) -> int:
    for name in ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"):
        number = getattr(config, name, None)
        if isinstance(number, int):
            return number
    raise CheckpointError(
        f"the config of {config.model_type} does not say to how many experts a token goes "
        "(num_experts_per_tok)."
    )


def _tensor_parallel(
    model: PreTrainedModel, moe_layers: list[MoELayer]
) -> TensorParallelPlan | None:
    styles = tensor_parallel_styles(model)
    if not any(layer.name in styles for layer in moe_layers):
        return None
    num_sums = 0
    cut: set[int] = set()
    for name, module in model.named_modules():
        style = styles.get(name, "")
        is_matrix = isinstance(module, nn.Linear | nn.Embedding)
        num_sums += style == "moe_tp_experts" or (is_matrix and "rowwise" in style)
        for own, parameter in module.named_parameters(recurse=False):
            how = styles.get(f"{name}.{own}", style)
            is_cut = "wise" in how and not (own == "bias" and "rowwise" in how)
            if is_cut:
                cut.add(id(parameter))
    head = model.get_output_embeddings()
    return TensorParallelPlan(
        whole_bytes=sum(_bytes(p) for p in model.parameters() if id(p) not in cut),
        num_sums=num_sums,
        gathers_logits=head is not None and id(head.weight) in cut,
    )


def _num_adapter_weights(model: PreTrainedModel, moe_layers: list[MoELayer], rank: int) -> int:
    """Weights of LoRA on every linear layer of attention, and on every expert's projections."""
    total = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and re.search(r"attn|attention", name):
            total += rank * (module.in_features + module.out_features)
    for layer in moe_layers:
        for projection in projections(layer.experts):
            weight = cast(Tensor, getattr(layer.experts, projection))
            total += layer.num_experts * rank * (weight.shape[1] + weight.shape[2])
    return total


def _weight(module: nn.Module | None) -> Tensor | None:
    return None if module is None else cast(Tensor, module.weight)


def _bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()
