"""Filling a model on meta with a checkpoint's tensors, one decoder layer after the other.

    sources ─▶ layers ─▶ parts ─▶ transformers' converters, in threads ─▶ model ─▶ on_layer(layer)

transformers' own converters do all renaming, merging and transposing. They start to read all that
they are given at once and keep it until its turn comes, so they are given little: the tensors that
are merged into one, or several such groups if they are small. In flight, beside what stays, are
thus at most PART_BYTES, or what becomes one tensor if that is more.

Private names of transformers used here, as of 5.23: ``convert_and_load_state_dict_in_model``,
``build_glob_alternation``, ``LoadStateDictConfig``, ``_get_dtype_plan``,
``_finalize_model_loading``, ``_is_hf_initialized``, ``_dtensor_from_local_like``.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    build_glob_alternation,
    convert_and_load_state_dict_in_model,
)
from transformers.distributed.sharding_utils import _dtensor_from_local_like
from transformers.distributed.utils import is_dtensor
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils.loading_report import LoadStateDictInfo

from moe_lightning.errors import CheckpointError
from moe_lightning.experts.freed_memory import give_back_freed_memory
from moe_lightning.modeling.expert_selection import Source
from moe_lightning.modeling.quiet import quiet_transformers
from moe_lightning.modeling.seam import MoELayer

PART_BYTES = 2**28


@dataclass(slots=True)
class _Stage:
    """The tensors of one decoder layer, and the MoE layers that they complete."""

    sources: list[Source] = field(default_factory=list)
    layers: list[MoELayer] = field(default_factory=list)


class ModelFiller:
    """Fills a model on meta, or some of its layers' experts.

    Args:
        model: The model; changed in place.
        path: The checkpoint's directory, for messages.
        device: Where the weights go.
        dtype: Dtype of the weights, except those that the family keeps in fp32.
    """

    def __init__(
        self, model: PreTrainedModel, *, path: Path, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._model = model
        self._path = path
        self._device = device
        self._dtype_plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
        self._load_config = LoadStateDictConfig(
            pretrained_model_name_or_path=str(path),
            device_map={"": device},
            dtype=dtype,
            dtype_plan=self._dtype_plan,
            weight_mapping=get_model_conversion_mapping(model),
        )
        # What has its values already, such as adapters, is not of the checkpoint.
        self._missing = {
            name
            for name, tensor in model.state_dict(keep_vars=True).items()
            if not getattr(tensor, "_is_hf_initialized", False)
        }
        self._unexpected = set[str]()
        self._info: LoadStateDictInfo | None = None

    def fill(
        self,
        sources: Iterable[Source],
        *,
        layers: Iterable[MoELayer],
        on_layer: Callable[[MoELayer], None] | None,
        show_progress: bool,
    ) -> None:
        """Read tensors into the model, in the order of the layers.

        Args:
            sources: The tensors.
            layers: The MoE layers whose experts are among them.
            on_layer: Called for each of the layers as soon as its experts are filled and before a
                later layer is read.
            show_progress: Whether to show a progress bar on stderr.

        Raises:
            CheckpointError: If a tensor cannot be read, does not fit, or is missing from a layer's
                experts.
        """
        by_layer = _by_layer(self._without_empty(sources), layers)
        num_elements = sum(s.tensor.num_elements for stage in by_layer for s in stage.sources)
        itemsize = self._load_config.dtype.itemsize
        with (
            quiet_transformers(),
            tqdm(
                total=num_elements * itemsize,
                unit="B",
                unit_scale=True,
                desc="Loading weights",
                disable=not show_progress,
                delay=1,
            ) as bar,
        ):
            for stage in by_layer:
                for part in _parts(stage.sources, itemsize):
                    self._fill_part(part)
                    bar.update(sum(s.tensor.num_elements for s in part) * itemsize)
                for layer in stage.layers:
                    self._finish_experts(layer)
                    if on_layer is not None:
                        on_layer(layer)
                        # Parameters that are new would be initialised at random by finalize().
                        for parameter in layer.experts.parameters():
                            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
                give_back_freed_memory()

    def _without_empty(self, sources: Iterable[Source]) -> list[Source]:
        """Leave out what fills parameters of which this rank has no row; they become empty."""
        empty = set()
        for name, parameter in list(self._model.named_parameters()):
            if is_dtensor(parameter) and parameter.to_local().numel() == 0:
                local = torch.empty(
                    parameter.to_local().shape, dtype=parameter.dtype, device=self._device
                )
                module, _, own_name = name.rpartition(".")
                full = nn.Parameter(
                    _dtensor_from_local_like(local, parameter),
                    requires_grad=parameter.requires_grad,
                )
                full._is_hf_initialized = True  # type: ignore[attr-defined]
                setattr(self._model.get_submodule(module), own_name, full)
                self._missing.discard(name)
                empty.add(name)
        return [source for source in sources if source.target.name not in empty]

    def finalize(self) -> None:
        """Tie weights, make buffers, and check that nothing is missing.

        Raises:
            CheckpointError: If the checkpoint lacks tensors of the model, or has others.
        """
        info = self._info
        if info is None:
            raise CheckpointError(f"{self._path} has no tensors.")
        info.missing_keys, info.unexpected_keys = self._missing, self._unexpected
        with quiet_transformers():
            # Takes out what the family leaves out, or ignores, on purpose.
            self._model._finalize_model_loading(self._model, self._load_config, info)
        if info.missing_keys or info.unexpected_keys:
            raise CheckpointError(
                f"{self._path}: the model lacks {sorted(info.missing_keys)[:3]}, and has no place "
                f"for {sorted(info.unexpected_keys)[:3]}."
            )
        assert_materialised(self._model)

    def _fill_part(self, part: Sequence[Source]) -> None:
        tensors = {source.name: source.tensor for source in part}
        info, _ = convert_and_load_state_dict_in_model(self._model, tensors, self._load_config)
        problems = [*map(str, info.mismatched_keys), *info.conversion_errors.values()]
        if problems:
            raise CheckpointError(
                f"{self._path}: tensors do not fit the model: {'; '.join(sorted(problems)[:3])}"
            )
        self._unexpected |= info.unexpected_keys
        self._missing &= info.missing_keys
        self._info = info

    def _finish_experts(self, layer: MoELayer) -> None:
        if layer.num_experts == 0:
            for name, parameter in list(layer.experts.named_parameters(recurse=False)):
                full_name = f"{layer.name}.{name}"
                empty = torch.empty(
                    parameter.shape,
                    dtype=self._planned_dtype(full_name) or parameter.dtype,
                    device=self._device,
                )
                setattr(layer.experts, name, nn.Parameter(empty))
                getattr(layer.experts, name)._is_hf_initialized = True
                self._missing.discard(full_name)
        names = {f"{layer.name}.{name}" for name in layer.experts.state_dict()}
        if lacking := sorted(names & self._missing):
            raise CheckpointError(
                f"{self._path}: the experts of layer {layer.layer} lack {lacking[:3]}."
            )

    def _planned_dtype(self, name: str) -> torch.dtype | None:
        """The dtype that the family insists on for a parameter, as transformers finds it."""
        if not self._dtype_plan:
            return None
        alternation, pattern_of, _ = build_glob_alternation(list(self._dtype_plan))
        match = alternation.search(name)
        return self._dtype_plan[pattern_of[match.lastgroup or ""]] if match else None


def _by_layer(sources: Iterable[Source], layers: Iterable[MoELayer]) -> list[_Stage]:
    """Group by decoder layer, in order; tensors outside all layers come first."""
    stages: dict[int, _Stage] = defaultdict(_Stage)
    for source in sources:
        stages[-1 if source.target.layer is None else source.target.layer].sources.append(source)
    for layer in layers:
        stages[layer.layer].layers.append(layer)
    return [stages[index] for index in sorted(stages)]


def _parts(sources: Iterable[Source], itemsize: int) -> Iterator[list[Source]]:
    """Cut a layer's tensors into parts to be in flight together; what is merged stays whole."""
    merged: dict[str, list[Source]] = defaultdict(list)
    for source in sources:
        merged[source.target.name].append(source)
    part: list[Source] = []
    part_bytes = 0
    for group in merged.values():
        group_bytes = sum(source.tensor.num_elements for source in group) * itemsize
        if part and part_bytes + group_bytes > PART_BYTES:
            yield part
            part, part_bytes = [], 0
        part, part_bytes = part + group, part_bytes + group_bytes
    if part:
        yield part


def assert_materialised(module: nn.Module) -> None:
    """Check that no tensor of a loaded module was left without memory or without values.

    Args:
        module: The module.
    """
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        assert tensor.device.type != "meta", f"{name} was left on meta"
    for name, buffer in module.named_buffers():
        # to_empty() leaves RoPE buffers as garbage, silently (transformers #45902).
        is_whole = not buffer.is_floating_point() or bool(buffer.isfinite().all())
        assert is_whole, f"buffer {name} was left uninitialised"
