"""From a checkpoint to a model: built on meta, filled from lazy slices, any subset of experts of
any layer.

    config ──▶ model on meta ──▶ experts cut down ──▶ transformers' weight converters ◀── slices of
    wanted bytes

transformers' own converters do all renaming, merging and transposing. They are called once per
decoder layer, so that no more than one layer's tensors are in flight. To load experts {1, 3, 7},
their per-expert keys are renumbered to {0, 1, 2} (or the rows of a fused tensor are picked), and
nothing else is read.

Private names of transformers used here, as of 5.23: ``_from_config`` through AutoModel,
``_get_dtype_plan``, ``_finalize_model_loading``, ``_weight_conversions``.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from moe_lightning.errors import CheckpointError
from moe_lightning.modeling.checkpoint import CheckpointView
from moe_lightning.modeling.preflight import check_model
from moe_lightning.modeling.quiet import quiet_transformers
from moe_lightning.modeling.seam import MoELayer, find_moe_layers


def build_on_meta(
    config: PreTrainedConfig, *, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The model of a config with no memory behind its parameters.

    Args:
        config: A causal language model's config.
        dtype: Dtype of the parameters.

    Returns:
        The model on the meta device, in eval mode.

    Raises:
        CheckpointError: If transformers has no causal language model for the config, or cannot
            build it.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:
        raise CheckpointError(
            f"transformers cannot build a causal language model from this config.json (model_type "
            f"{config.model_type!r}): {error}. Check that the directory is a text model's and its "
            "config.json unedited."
        ) from error
    return model.eval()


def keep_experts(layer: MoELayer, expert_ids: Sequence[int]) -> None:
    """Cut a layer's experts module on meta down to some of its experts.

    Args:
        layer: The layer; its module is changed in place.
        expert_ids: Logical experts to keep, in the order of the rows to come.

    Raises:
        ValueError: If an expert does not exist or is named twice.
    """
    if len(set(expert_ids)) != len(expert_ids) or not all(
        0 <= e < layer.num_experts for e in expert_ids
    ):
        raise ValueError(
            f"experts {list(expert_ids)} of layer {layer.layer}: each must be in [0, "
            f"{layer.num_experts})."
        )
    for name, parameter in list(layer.experts.named_parameters(recurse=False)):
        shape = (len(expert_ids), *parameter.shape[1:])
        setattr(
            layer.experts,
            name,
            nn.Parameter(torch.empty(shape, dtype=parameter.dtype, device="meta")),
        )
    object.__setattr__(layer.experts, "num_experts", len(expert_ids))


def load_model(
    view: CheckpointView,
    *,
    device: torch.device,
    dtype: torch.dtype,
    experts: Mapping[int, Sequence[int]] | None = None,
    show_progress: bool = True,
) -> PreTrainedModel:
    """Load a checkpoint, or the part of it that this process needs.

    Args:
        view: The opened checkpoint.
        device: Where the weights go; each goes straight from its file.
        dtype: Dtype of the weights, except those that the family keeps in fp32.
        experts: For each MoE layer, the logical experts to load; None, or a layer left out, means
            all.
        show_progress: Whether to show a progress bar on stderr.

    Returns:
        The model in eval mode, with no tensor left on meta.

    Raises:
        CheckpointError: If the checkpoint and the model that its config describes do not match
            exactly.
        ValueError: If an expert, or a layer with experts, is asked for that does not exist.
    """
    model = build_on_meta(view.config, dtype=dtype)
    find_moe_layers(model)
    check_model(view, build_on_meta(view.config, dtype=dtype))
    slices: dict[str, Any] = view.slices(view.tensors)
    if experts is not None:
        slices = _select_experts(model, slices, experts)
    _fill(model, slices, view, device=device, dtype=dtype, show_progress=show_progress)
    model.generation_config = _generation_config(view)
    return model


def _fill(
    model: PreTrainedModel,
    slices: Mapping[str, Any],
    view: CheckpointView,
    *,
    device: torch.device,
    dtype: torch.dtype,
    show_progress: bool,
) -> None:
    load_config = LoadStateDictConfig(
        pretrained_model_name_or_path=str(view.path),
        device_map={"": device},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=get_model_conversion_mapping(model),
    )
    missing, unexpected = set(model.state_dict()), set[str]()
    conversions: dict[int, Any] = {}
    info = None
    num_bytes = sum(_num_bytes(view, name) for name in slices)
    with (
        quiet_transformers(),
        tqdm(
            total=num_bytes,
            unit="B",
            unit_scale=True,
            desc="Loading weights",
            disable=not show_progress,
            delay=1,
        ) as bar,
    ):
        for names in _by_layer(slices):
            part = {name: slices[name] for name in names}
            info, _ = convert_and_load_state_dict_in_model(model, part, load_config)
            problems = [*map(str, info.mismatched_keys), *info.conversion_errors.values()]
            if problems:
                raise CheckpointError(
                    f"{view.path}: tensors do not fit the model: {'; '.join(sorted(problems)[:3])}"
                )
            unexpected |= info.unexpected_keys
            missing &= info.missing_keys
            conversions |= {id(c): c for c in model._weight_conversions}
            bar.update(sum(_num_bytes(view, name) for name in names))
        if info is None:
            raise CheckpointError(f"{view.path} has no tensors.")
        info.missing_keys, info.unexpected_keys = missing, unexpected
        model._weight_conversions = list(conversions.values())
        # Takes out what the family leaves out, or ignores, on purpose.
        model._finalize_model_loading(model, load_config, info)
    if info.missing_keys or info.unexpected_keys:
        raise CheckpointError(
            f"{view.path}: the model lacks {sorted(info.missing_keys)[:3]}, and has no place for "
            f"{sorted(info.unexpected_keys)[:3]}."
        )
    _assert_materialised(model)


def _num_bytes(view: CheckpointView, name: str) -> int:
    # A renumbered expert has the size of any other expert; a name that is not on disk counts
    # nothing.
    info = view.tensors.get(name)
    return info.end - info.start if info is not None else 0


def _by_layer(names: Iterable[str]) -> Iterator[list[str]]:
    """Group names by their first number, the decoder layer; the rest is one group."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        number = re.search(r"\.(\d+)\.", name)
        groups[number.group(1) if number else ""].append(name)
    yield from groups.values()


def _select_experts(
    model: PreTrainedModel, slices: Mapping[str, Any], experts: Mapping[int, Sequence[int]]
) -> dict[str, Any]:
    """Cut the model's experts down, and the slices to those that fill them."""
    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    meta_state = model.state_dict()
    ids_of: dict[str, Sequence[int]] = {}
    layers = find_moe_layers(model)
    if unknown := experts.keys() - {layer.layer for layer in layers}:
        raise ValueError(
            f"layers {sorted(unknown)} have no experts, but experts were asked of them."
        )
    for layer in layers:
        if layer.layer in experts:
            parameters = [name for name, _ in layer.experts.named_parameters(recurse=False)]
            ids_of |= {f"{layer.name}.{name}": experts[layer.layer] for name in parameters}
            keep_experts(layer, experts[layer.layer])
    selected: dict[str, Any] = {}
    for key, piece in slices.items():
        target, pattern = rename_source_key(
            key, renamings, converters, model.base_model_prefix, meta_state
        )
        if target not in ids_of:
            selected[key] = piece
            continue
        ids = ids_of[target]
        number = _expert_number(key, pattern)
        if number is None:
            selected[key] = _PickedRows(piece, ids)
        elif int(number.group(1)) in ids:
            local = ids.index(int(number.group(1)))
            selected[f"{key[: number.start(1)]}{local}{key[number.end(1) :]}"] = piece
    return selected


def _expert_number(key: str, pattern: str | None) -> re.Match[str] | None:
    """Where a key on disk names one expert by number; None for a fused tensor of all experts."""
    if pattern is None or "*" not in pattern:
        return None
    return re.search(r"experts\.(\d+)\.", key)


class _PickedRows:
    """A lazy slice of some rows of a fused tensor, read when transformers asks for ``[...]``."""

    def __init__(self, piece: Any, rows: Sequence[int]) -> None:
        self._piece = piece
        self._rows = rows

    def __getitem__(self, _: object) -> Tensor:
        return torch.cat([self._piece[row : row + 1] for row in self._rows])

    def get_shape(self) -> list[int]:
        return [len(self._rows), *self._piece.get_shape()[1:]]

    def get_dtype(self) -> str:
        return str(self._piece.get_dtype())


def _generation_config(view: CheckpointView) -> GenerationConfig:
    if (view.path / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(view.path)
    return GenerationConfig.from_model_config(view.config)


def _assert_materialised(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor.device.type != "meta", f"{name} was left on meta"
    for name, buffer in model.named_buffers():
        # to_empty() leaves RoPE buffers as garbage, silently (transformers #45902).
        is_whole = not buffer.is_floating_point() or bool(buffer.isfinite().all())
        assert is_whole, f"buffer {name} was left uninitialised"
