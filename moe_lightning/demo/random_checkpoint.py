"""Random checkpoints of any family and size, for tests and benchmarks.

    sizes ─▶ config ─▶ model on meta ─▶ names and shapes as published ─▶ disk, tensor by tensor

No weight is ever held besides the one being written, so that the size on disk is the only limit.
The names and layouts are those of published checkpoints: transformers' own converters give them.
"""

import json
import math
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from moe_lightning.demo.random_config import ModelSize, make_config
from moe_lightning.demo.random_tokenizer import make_tokenizer
from moe_lightning.errors import UsageError

_DTYPES = {
    "float32": (torch.float32, "F32"),
    "float16": (torch.float16, "F16"),
    "bfloat16": (torch.bfloat16, "BF16"),
}
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_NAME_OF_DTYPE = dict(_DTYPES.values())


def make_checkpoint(
    out: str | Path,
    *,
    family: str = "qwen3_moe",
    hidden_size: int = 192,
    num_layers: int = 4,
    num_experts: int = 16,
    top_k: int = 2,
    expert_size: int = 192,
    num_heads: int = 6,
    num_kv_heads: int = 2,
    vocab_size: int = 2048,
    max_positions: int = 1024,
    tie: bool = False,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    seed: int = 0,
    tokenizer: str | Path | None = None,
    target_params: str | None = None,
    shard_bytes: int = 1 << 30,
    overrides: dict[str, object] | None = None,
) -> Path:
    """Write a random checkpoint as a Hugging Face directory and return its path.

    The weights of a tensor depend only on the seed and its name.

    Args:
        out: The directory to write; it must not exist yet, or be empty.
        family: The model_type, such as mixtral, qwen3_moe, olmoe, deepseek_v3 or gpt_oss.
        hidden_size: The width of the residual stream.
        num_layers: The number of decoder layers.
        num_experts: The number of routed experts of a layer.
        top_k: The number of experts that a token goes to.
        expert_size: The inner width of one expert.
        num_heads: The number of attention heads.
        num_kv_heads: The number of key and value heads.
        vocab_size: The number of token ids.
        max_positions: The number of positions.
        tie: Whether the output layer shares the weights of the embedding.
        dtype: The number format of the weights.
        seed: The seed of the weights.
        tokenizer: A directory with a tokenizer to use; by default a byte-level one is made.
        target_params: A number of parameters such as 200M or 1.5B, reached by scaling hidden_size
            and expert_size together; by default the sizes are taken as they are.
        shard_bytes: The size in bytes above which the weights are split over several files.
        overrides: Settings of the family's own configuration that replace what was derived.

    Returns:
        The directory.

    Raises:
        UsageError: The sizes don't fit together or the family, or `out` is in use.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"out '{out}' exists and is not an empty directory: choose a new one.")
    size = ModelSize(
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_experts=num_experts,
        top_k=top_k,
        expert_size=expert_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        vocab_size=vocab_size,
        max_positions=max_positions,
        tie=tie,
    )
    words = _load_tokenizer(tokenizer, size)
    token_ids = {name: getattr(words, name) for name in _TOKEN_IDS}

    def config_of(size: ModelSize) -> Any:
        return make_config(family, size, token_ids=token_ids, overrides=overrides or {})

    if target_params is not None:
        size = _scaled_to(_parse_count(target_params), size, config_of)
    config = config_of(size)
    model = _meta_model(config, _DTYPES[dtype][0])

    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    words.save_pretrained(str(temporary))
    model.config.architectures = [type(model).__name__]
    model.config.dtype = dtype
    model.config.save_pretrained(str(temporary))
    _save_generation_config(model.config, temporary)
    _write_weights(_published_tensors(model), temporary, seed=seed, shard_bytes=shard_bytes)
    if out.exists():
        out.rmdir()
    temporary.replace(out)
    return out


def count_parameters(config: Any) -> int:
    """Return the number of parameters of the model of a configuration, tied ones counted once."""
    model = _meta_model(config, torch.float32)
    return sum(math.prod(tensor.shape) for tensor in _saved_tensors(model).values())


def _load_tokenizer(path: str | Path | None, size: ModelSize) -> Any:
    if path is None:
        return make_tokenizer(size.vocab_size, max_positions=size.max_positions)
    from transformers import AutoTokenizer

    if not Path(path).is_dir():
        raise UsageError(f"tokenizer '{path}' is not a directory: give one with tokenizer.json.")
    words = AutoTokenizer.from_pretrained(str(path))
    if len(words) > size.vocab_size:
        raise UsageError(
            f"tokenizer '{path}' has {len(words)} tokens and the model only {size.vocab_size}: "
            f"give vocab_size {len(words)} or more."
        )
    return words


def _parse_count(text: str) -> int:
    units = {"K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9}
    try:
        return int(float(text[:-1]) * units[text[-1].upper()] if text[-1:].isalpha() else text)
    except (KeyError, ValueError, OverflowError):
        raise UsageError(
            f"target_params '{text}' is not a count: give a number such as 200M or 1.5B."
        ) from None


def _scaled_to(target: int, size: ModelSize, config_of: Callable[[ModelSize], Any]) -> ModelSize:
    """Scale both widths to just below `target` parameters, then the experts up to it."""
    ratio = size.expert_size / size.hidden_size

    def with_hidden(num_steps: int) -> ModelSize:
        hidden_size = 8 * size.num_heads * num_steps
        expert_size = max(8, round(hidden_size * ratio / 8) * 8)
        return replace(size, hidden_size=hidden_size, expert_size=expert_size)

    def with_experts(num_steps: int) -> ModelSize:
        return replace(scaled, expert_size=8 * num_steps)

    def largest_within(make: Callable[[int], ModelSize]) -> ModelSize:
        low, high = 1, 2
        while count_parameters(config_of(make(high))) <= target:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            is_within = count_parameters(config_of(make(middle))) <= target
            low, high = (middle, high) if is_within else (low, middle)
        return make(low)

    scaled = largest_within(with_hidden)
    return largest_within(with_experts)


def _meta_model(config: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # a family's own code, with sizes it was never tried with
        raise UsageError(
            f"family '{config.model_type}' can't be built from these sizes "
            f"({type(error).__name__}: {error}). Change them, or give overrides."
        ) from error


def _saved_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The meta tensors that a checkpoint of the model has, under the names of the model."""
    tied = model.all_tied_weights_keys
    ignored = set(model._keys_to_ignore_on_save or ())
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name not in tied and name not in ignored
    }


def _published_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The meta tensors of the model under the names and layouts of published checkpoints."""
    # transformers 5.23: what save_pretrained calls; it works on meta tensors as on real ones.
    from transformers.core_model_loading import revert_weight_conversion

    tensors: dict[str, torch.Tensor] = revert_weight_conversion(model, _saved_tensors(model))
    return tensors


def _save_generation_config(config: Any, directory: Path) -> None:
    from transformers import GenerationConfig

    GenerationConfig(
        do_sample=False, **{name: getattr(config, name) for name in _TOKEN_IDS}
    ).save_pretrained(str(directory))


def _random_tensor(name: str, like: torch.Tensor, seed: int) -> torch.Tensor:
    """Weights that make every term of the model visible in its output.

    A matrix keeps the scale of its input (standard deviation 1/sqrt(inputs)), a norm is near one
    but not one, and a bias is never zero.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    values = torch.empty(like.shape, dtype=torch.float32).normal_(generator=generator)
    if like.ndim >= 2:
        values.mul_(like.shape[-1] ** -0.5)
    elif name.endswith("weight"):
        values.mul_(0.1).add_(1.0)
    else:
        values.mul_(0.1)
    return values.to(like.dtype)


def _write_weights(
    tensors: dict[str, torch.Tensor], directory: Path, *, seed: int, shard_bytes: int
) -> None:
    shards: list[dict[str, torch.Tensor]] = [{}]
    num_bytes = 0
    for name, tensor in tensors.items():
        if shards[-1] and num_bytes + tensor.nbytes > shard_bytes:
            shards.append({})
            num_bytes = 0
        shards[-1][name] = tensor
        num_bytes += tensor.nbytes
    if len(shards) == 1:
        _write_safetensors(shards[0], directory / "model.safetensors", seed)
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _write_safetensors(shard, directory / file, seed)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_safetensors(tensors: dict[str, torch.Tensor], path: Path, seed: int) -> None:
    """Write a safetensors file tensor by tensor: header size, JSON header, then the bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": _NAME_OF_DTYPE[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            values = _random_tensor(name, tensor, seed).contiguous()
            file.write(values.view(torch.uint8).numpy().data)
