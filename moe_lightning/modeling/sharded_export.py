"""From a directory of shards to a Hugging Face directory, one decoder layer after the other.

    shards ─▶ a layer's tensors ─▶ transformers' reverse conversion ─▶ model-00001.safetensors ...

A model on meta knows the names; no model is ever filled. In memory are one layer, before and after
its conversion, and tensors that wait for their file to be full: at most SHARD_BYTES, or one larger
tensor. Private names of transformers used here, as of 5.23: ``revert_weight_conversion``,
``build_glob_alternation``, ``dot_natural_key``, ``_get_dtype_plan``, ``_keys_to_ignore_on_save``.
"""

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import (
    build_glob_alternation,
    dot_natural_key,
    revert_weight_conversion,
)

from moe_lightning.errors import CheckpointError, UsageError
from moe_lightning.modeling.checkpoint import CheckpointView
from moe_lightning.modeling.loading import build_on_meta, generation_config
from moe_lightning.modeling.sharded_state import OPTIMIZER, model_tensors, without_expert
from moe_lightning.modeling.training_checkpoint import SafeReader, read_meta, read_tensors

SHARD_BYTES = 2**30
ADAPTER = "lora_"


def export_sharded(
    directory: Path,
    view: CheckpointView,
    tokenizer: PreTrainedTokenizerBase,
    target: Path,
    *,
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a complete directory of shards as a Hugging Face directory.

    Args:
        directory: The shards, of a model that was saved whole (no adapters).
        view: The checkpoint that fit started from.
        tokenizer: Its tokenizer.
        target: Where to; made if missing, and it must hold no checkpoint.
        dtype: Precision on disk, of all weights that the family does not keep in float32.
        shard_bytes: Size of a file; a layer's tensor that is larger has a file of its own.

    Raises:
        UsageError: If the target holds a checkpoint, or cannot be written.
        CheckpointError: If shards are damaged, or not of this model.
    """
    if (target / "config.json").exists():
        raise UsageError(
            f"{target} holds a checkpoint already. Choose another directory, or remove it."
        )
    model = build_on_meta(view.config)
    stored = read_tensors(directory)
    aliases: dict[str, str] = read_meta(directory)["aliases"]
    by_layer = _by_layer(directory, model, stored, aliases)
    kept = model._get_dtype_plan(dtype)  # what stays in float32
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target, prefix=".export.") as temporary:
            files = _Files(Path(temporary), shard_bytes)
            for names in by_layer:
                layer = _read(directory, names, model, stored, aliases)
                layer = {n: t.to(_dtype_of(n, t, kept, dtype)) for n, t in layer.items()}
                for name, tensor in sorted(revert_weight_conversion(model, layer).items()):
                    files.add(name, tensor)
            files.finish()
            model.config.dtype = dtype
            model.config.architectures = [type(model).__name__]
            tokenizer.save_pretrained(temporary)
            if model.can_generate():
                generation_config(view).save_pretrained(temporary)
            # Last, since it makes the directory a checkpoint.
            model.config.save_pretrained(temporary)
            for file in sorted(Path(temporary).iterdir(), key=lambda f: f.name == "config.json"):
                file.rename(target / file.name)
    except OSError as error:
        raise UsageError(
            f"{target} cannot be written ({error.strerror or error}). Free space, or choose "
            "another directory."
        ) from error


def read_adapters(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Read the parameters of a directory that holds trained parameters only.

    Args:
        directory: The shards.

    Yields:
        Name and value of one after the other, experts together; buffers of the base are left out.

    Raises:
        CheckpointError: If the directory is damaged.
    """
    stored = read_tensors(directory)
    experts: dict[str, list[str]] = defaultdict(list)
    for key in sorted(stored, key=dot_natural_key):
        if not key.startswith(OPTIMIZER) and ADAPTER in key:
            experts[without_expert(key)[0]].append(key)
    for name, keys in experts.items():
        keys.sort(key=lambda key: without_expert(key)[1] or 0)
        size, dtype = stored[keys[0]].size, stored[keys[0]].properties.dtype
        if keys == [name]:
            whole = torch.empty(size, dtype=dtype)
            parts = {name: whole}
        else:
            whole = torch.empty((len(keys), *size), dtype=dtype)
            parts = dict(zip(keys, whole, strict=True))
        load(parts, storage_reader=SafeReader(directory), no_dist=True)
        yield name, whole


class _Files:
    """Safetensors files of a bounded size."""

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        self._directory = directory
        self._limit_bytes = limit_bytes
        self._waiting: dict[str, Tensor] = {}
        self._waiting_bytes = 0
        self._files: list[list[str]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self._waiting and self._waiting_bytes + tensor.nbytes > self._limit_bytes:
            self._write()
        # A view would keep all that it is of; the copy is no larger than what is written.
        self._waiting[name] = tensor.clone(memory_format=torch.contiguous_format)
        self._waiting_bytes += tensor.nbytes

    def finish(self) -> None:
        self._write()
        count = len(self._files)
        final = [
            "model.safetensors" if count == 1 else f"model-{i + 1:05}-of-{count:05}.safetensors"
            for i in range(count)
        ]
        for number, name in enumerate(final):
            self._path(number).rename(self._directory / name)
        if count > 1:
            where = {n: final[i] for i, names in enumerate(self._files) for n in names}
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": where}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (self._directory / "model.safetensors.index.json").write_text(text)

    def _path(self, number: int) -> Path:
        return self._directory / f"part-{number}.safetensors"

    def _write(self) -> None:
        save_file(self._waiting, self._path(len(self._files)), metadata={"format": "pt"})
        self._files.append(list(self._waiting))
        self._total_bytes += self._waiting_bytes
        self._waiting, self._waiting_bytes = {}, 0


def _by_layer(
    directory: Path,
    model: PreTrainedModel,
    stored: Mapping[str, TensorStorageMetadata],
    aliases: Mapping[str, str],
) -> Iterator[list[str]]:
    """The names that are exported, by decoder layer; those outside all layers one by one."""
    found = model_tensors(model)
    ignored = set(model._keys_to_ignore_on_save or ())
    names = [name for name in found.tensors if name not in ignored]
    have = {without_expert(key)[0] for key in stored if not key.startswith(OPTIMIZER)}
    missing = [name for name in names if aliases.get(name, name) not in have]
    unexpected = sorted(have - {aliases.get(n, n) for n in found.tensors} - set(found.aliases))
    if missing or unexpected:
        raise CheckpointError(
            f"{directory}: there is no {missing[:3]}, and no place in the model for "
            f"{unexpected[:3]}. Give the --model.checkpoint that fit started from."
        )
    groups: dict[tuple[int, str], list[str]] = defaultdict(list)
    for name in sorted(names, key=dot_natural_key):
        layer = next((int(part) for part in name.split(".") if part.isdigit()), -1)
        # What is outside all layers is converted alone: embeddings, the last norm, the head.
        groups[(layer, "" if layer >= 0 else name)].append(name)
    return iter(groups.values())


def _read(
    directory: Path,
    names: list[str],
    model: PreTrainedModel,
    stored: Mapping[str, TensorStorageMetadata],
    aliases: Mapping[str, str],
) -> dict[str, Tensor]:
    """Some of the model's tensors, whole."""
    shapes = {name: tensor.shape for name, tensor in model_tensors(model).tensors.items()}
    tensors: dict[str, Tensor] = {}
    parts: dict[str, Tensor] = {}
    for name in names:
        source = aliases.get(name, name)
        first = stored.get(source) or stored[f"{source}::expert0"]
        whole = tensors[name] = torch.empty(shapes[name], dtype=first.properties.dtype)
        if source in stored:
            parts[source] = whole
        else:
            parts |= {f"{source}::expert{e}": row for e, row in enumerate(whole)}
    for key, part in parts.items():
        if key not in stored or stored[key].size != part.shape:
            raise CheckpointError(
                f"{directory}: {key} is missing or has another size than in the model. Give the "
                "--model.checkpoint that fit started from."
            )
    load(parts, storage_reader=SafeReader(directory), no_dist=True)
    return tensors


def _dtype_of(
    name: str, tensor: Tensor, kept: Mapping[str, torch.dtype], dtype: torch.dtype
) -> torch.dtype:
    if not tensor.is_floating_point():
        return tensor.dtype
    alternation, pattern_of, _ = build_glob_alternation(list(kept))
    match = alternation.search(name) if kept else None
    return kept[pattern_of[match.lastgroup or ""]] if match else dtype
