"""The files of a checkpoint directory, checked against each other before anything is loaded.

    config.json ─ model_type ─ known to transformers?
    model.safetensors.index.json ─ files ─ headers ─ the same tensors?

Whether the tensors are those that the config derives is the business of ``preflight``.
"""

import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moe_lightning.errors import CheckpointError
from moe_lightning.modeling.file_reading import read_bytes, read_json_object, refuse_impostor
from moe_lightning.modeling.safetensors_header import PLAIN_FLOATS, Header, TensorInfo, read_header

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tiktoken.model",
)
_TOKENIZER_JSON = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
# What a directory without safetensors may hold instead, and what to do about it.
_OTHER_FORMATS: Mapping[str, str] = {
    "*.bin": "a pickle, which can run any code when it is loaded",
    "*.pt": "a pickle, which can run any code when it is loaded",
    "*.pth": "a pickle, which can run any code when it is loaded",
    "*.ckpt": "a pickle, which can run any code when it is loaded",
    "*.gguf": "a GGUF file, whose weights are quantized for llama.cpp",
    "*.distcp": "part of a distributed training checkpoint",
}
_REMEDIES: Mapping[str, str] = {
    "*.gguf": "Use the original safetensors checkpoint that it was made from.",
    "*.distcp": "Make a Hugging Face directory of it with `python -m moe_lightning export`.",
}
_CONVERT = (
    "Convert it to safetensors: load it where you trust it with "
    "AutoModelForCausalLM.from_pretrained() and write it with save_pretrained(), or use "
    "https://huggingface.co/spaces/safetensors/convert"
)


@dataclass(frozen=True, slots=True)
class CheckpointFiles:
    """What a sound checkpoint directory holds.

    Args:
        path: The directory.
        config: config.json, parsed.
        config_bytes: config.json, as it is on disk.
        index_bytes: The index, as it is on disk; empty where there is none.
        headers: One header for each safetensors file.
        tensors: All tensors by name.
    """

    path: Path
    config: dict[str, Any]
    config_bytes: bytes
    index_bytes: bytes
    headers: tuple[Header, ...]
    tensors: dict[str, TensorInfo]


def check_files(path: Path) -> CheckpointFiles:
    """Check that a directory holds a whole, undamaged checkpoint of a known model. Reads headers
    only.

    Args:
        path: The directory.

    Returns:
        Its files.

    Raises:
        CheckpointError: If not; the message names the file, the tensor, the cause and the remedy.
    """
    if not os.path.isdir(path):
        raise CheckpointError(f"{path}: there is no such directory. Check --model.checkpoint.")
    config_bytes, config = read_json_object(path / "config.json")
    _check_model_type(path / "config.json", config)
    if (path / "generation_config.json").exists():
        read_json_object(path / "generation_config.json")
    index_bytes, weight_map = _find_weights(path)
    named = config.get("transformers_weights")
    if named not in (None, INDEX_NAME if index_bytes else SINGLE_NAME):
        raise CheckpointError(
            f"{path / 'config.json'}: names the weights {named!r} (transformers_weights), which "
            f"is not supported. Rename them to {SINGLE_NAME} or {INDEX_NAME}, and remove the "
            "entry."
        )
    headers = tuple(read_header(path / file) for file in sorted(weight_map))
    tensors = _join(path, headers, weight_map)
    _check_not_quantized(path, config, tensors)
    return CheckpointFiles(path, config, config_bytes, index_bytes, headers, tensors)


def check_tokenizer(path: Path) -> None:
    """Check that a directory holds tokenizer files that can be read.

    Args:
        path: The checkpoint's directory.

    Raises:
        CheckpointError: If there is no tokenizer, or one of its files is damaged.
    """
    present = [
        name for name in _TOKENIZER_FILES if (path / name).exists() or (path / name).is_symlink()
    ]
    config_file = path / "tokenizer_config.json"
    if not present:
        if config_file.exists() and "auto_map" in read_json_object(config_file)[1]:
            raise CheckpointError(
                f"{config_file}: the tokenizer is remote code (auto_map), which is never run. "
                "Convert it to a tokenizer.json and put that beside config.json."
            )
        raise CheckpointError(
            f"{path}: has no tokenizer (none of {', '.join(_TOKENIZER_FILES)}). Copy the "
            "tokenizer's files of the original model into the directory, or write them with "
            "tokenizer.save_pretrained()."
        )
    for name in {*_TOKENIZER_JSON, *present}:
        file = path / name
        if file.exists() or file.is_symlink():
            if name.endswith(".json"):
                read_json_object(file)
            else:
                refuse_impostor(file, read_bytes(file))


def _check_model_type(file: Path, config: Mapping[str, Any]) -> None:
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(
            f"{file}: has no model_type, so that the kind of model is unknown. Use the "
            "config.json of a transformers model (not that of another framework, nor an "
            "adapter's)."
        )
    # With a known model_type an auto_map is harmless: transformers' own class is used, and the code
    # never run.
    if model_type not in CONFIG_MAPPING and "auto_map" in config:
        raise CheckpointError(
            f"{file}: model_type {model_type!r} needs remote code (auto_map), which is never run. "
            "Use a checkpoint of a model that is part of transformers."
        )
    if model_type not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{file}: model_type {model_type!r} is unknown to the installed transformers. Correct "
            "the spelling, or use a checkpoint of a model that is part of transformers."
        )


def _find_weights(path: Path) -> tuple[bytes, dict[str, set[str] | None]]:
    """The index's bytes, and for each file the tensors it must hold (None: whatever it holds)."""
    try:
        names = set(os.listdir(path))
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be listed ({error.strerror}). Make the directory readable: "
            f"chmod +rx {path.name}"
        ) from error
    if INDEX_NAME in names:
        index_bytes, weight_map = _read_index(path / INDEX_NAME)
        if SINGLE_NAME in names and SINGLE_NAME not in weight_map:
            raise CheckpointError(
                f"{path}: has both {SINGLE_NAME} and {INDEX_NAME}, which does not name it, so "
                "that there are two sets of weights. Delete the one that is out of date."
            )
        return index_bytes, dict(weight_map)
    if SINGLE_NAME in names:
        return b"", {SINGLE_NAME: None}
    shards = sorted(name for name in names if name.endswith(".safetensors"))
    if "adapter_config.json" in names:
        raise CheckpointError(
            f"{path}: holds an adapter (adapter_config.json), not a model. Merge it into its base "
            "model first (PEFT's merge_and_unload()), and name the merged directory."
        )
    if shards:
        raise CheckpointError(
            f"{path}: has {len(shards)} safetensors file(s) ({', '.join(shards[:3])}) but neither "
            f"{SINGLE_NAME} nor {INDEX_NAME} to say which tensors belong to the model. Download "
            "the index as well, or write the checkpoint again with save_pretrained()."
        )
    for pattern, what in _OTHER_FORMATS.items():
        if found := sorted(path.glob(pattern)):
            raise CheckpointError(
                f"{path}: has no safetensors weights; {found[0].name} is {what}. "
                f"{_REMEDIES.get(pattern, _CONVERT)}"
            )
    raise CheckpointError(
        f"{path}: has no weights ({SINGLE_NAME} or {INDEX_NAME}). Download the checkpoint again."
    )


def _read_index(file: Path) -> tuple[bytes, dict[str, set[str]]]:
    content, index = read_json_object(file)
    entries = index.get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise CheckpointError(
            f"{file}: has no weight_map, so that it does not say which file holds which tensor. "
            "Download it again."
        )
    tensors_of: dict[str, set[str]] = defaultdict(set)
    for tensor, name in entries.items():
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or "\0" in name:
            raise CheckpointError(
                f"{file}: puts tensor {tensor!r} into {name!r}, which is not the name of a file "
                "in the checkpoint's own directory. Do not use this checkpoint unless you know "
                "why; download it again from its source."
            )
        if not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{file}: puts tensor {tensor!r} into {name!r}, which is no safetensors. {_CONVERT}"
            )
        tensors_of[name].add(tensor)
    missing = sorted(name for name in tensors_of if not _exists(file.parent / name))
    if missing:
        raise CheckpointError(
            f"{file.parent}: lacks {len(missing)} of the {len(tensors_of)} files that {file.name} "
            f"names: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''} (tensor "
            f"{min(tensors_of[missing[0]])!r} and others). Download the missing files."
        )
    return content, tensors_of


def _exists(file: Path) -> bool:
    # A dangling link has its own message.
    return file.exists() or file.is_symlink()


def _join(
    path: Path, headers: tuple[Header, ...], weight_map: Mapping[str, set[str] | None]
) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for header in headers:
        expected = weight_map[header.file.name]
        if expected is not None and (absent := expected - header.tensors.keys()):
            raise CheckpointError(
                f"{header.file}: lacks {len(absent)} tensor(s) that {INDEX_NAME} puts into it: "
                f"{_first(absent)}. The index and the file are not of the same checkpoint; "
                "download both again."
            )
        if expected is not None and (extra := header.tensors.keys() - expected):
            raise CheckpointError(
                f"{header.file}: holds {len(extra)} tensor(s) that {INDEX_NAME} does not put into "
                f"it: {_first(extra)}. The index and the file are not of the same checkpoint; "
                "download both again."
            )
        tensors |= header.tensors
    if not tensors:
        raise CheckpointError(
            f"{path}: the safetensors files hold no tensors. Download the checkpoint again."
        )
    return tensors


def _first(names: set[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names)[:3]) + (", ..." if len(names) > 3 else "")


def _check_not_quantized(
    path: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> None:
    quantization = config.get("quantization_config") or config.get("quantization")
    packed = next((info for info in tensors.values() if info.dtype not in PLAIN_FLOATS), None)
    if not quantization or packed is None:
        return
    details = quantization if isinstance(quantization, dict) else {}
    method = details.get("quant_method") or f"{details.get('bits', 'unknown')}-bit"
    raise CheckpointError(
        f"{path / 'config.json'}: the weights are quantized with {method!r} (quantization_config; "
        f"for example tensor {packed.name!r} in {packed.file.name} is {packed.dtype}), which is "
        "not supported. Use an unquantized (BF16, F16 or F32) version of the checkpoint."
    )
