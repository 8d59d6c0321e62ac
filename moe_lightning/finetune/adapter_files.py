"""PEFT's adapter directories, in and out.

    adapter_config.json          what is adapted, rank and alpha
    adapter_model.safetensors    the adapters

How tensors are named and laid out in there lives in ``adapter_layout``.
"""

import json
import os
import tempfile
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_lightning.errors import CheckpointError, UsageError
from moe_lightning.experts.adapters import LORA_A, LORA_B
from moe_lightning.extras import how_to_install
from moe_lightning.finetune.adapter_layout import (
    expert_keys,
    experts_from_peft,
    experts_to_peft,
    linear_key,
)

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# What would change what the adapter computes, and must be off.
_UNSUPPORTED = (
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "trainable_token_indices",
    "lora_bias",
    "fan_in_fan_out",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
)


class AdapterFile:
    """A LoRA adapter on disk, in PEFT's layout.

    Args:
        path: Its directory.

    Attributes:
        rank: Rank of its adapters.
        alpha: What gives its scale as alpha / rank.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        config = self._config()
        self.rank = int(config["r"])
        is_rank_stabilised = bool(config.get("use_rslora"))
        self.alpha = float(config["lora_alpha"]) * (self.rank**0.5 if is_rank_stabilised else 1)
        self._target_parameters: list[str] = list(config.get("target_parameters") or ())
        if not (path / WEIGHTS_FILE).is_file():
            raise UsageError(f"lora.adapter: {path} has no {WEIGHTS_FILE}.")

    def _config(self) -> dict[str, Any]:
        file = self.path / CONFIG_FILE
        try:
            config = json.loads(file.read_bytes())
            kind, rank, alpha = config["peft_type"], config["r"], config["lora_alpha"]
        except OSError as error:
            raise UsageError(
                f"lora.adapter: {file} cannot be read ({error.strerror}). Give the directory of a "
                "PEFT adapter."
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{file} is not the config of a LoRA adapter: {error}."
            ) from error
        if kind != "LORA" or not isinstance(rank, int) or rank < 1 or not alpha > 0:
            raise CheckpointError(
                f"{file}: peft_type is {kind!r}, r {rank!r}, lora_alpha {alpha!r}; only LORA with "
                "both above 0 can be loaded."
            )
        used = [name for name in _UNSUPPORTED if config.get(name)]
        if config.get("bias", "none") != "none":
            used.append("bias")
        if used:
            raise CheckpointError(
                f"{file}: the adapter uses {', '.join(used)}, which cannot be loaded. Merge it "
                "into the base model with PEFT, and start from that."
            )
        assert isinstance(config, dict), "it has keys"
        return config

    @cached_property
    def keys(self) -> frozenset[str]:
        """The names of the adapter's tensors."""
        try:
            with safe_open(self.path / WEIGHTS_FILE, "pt") as file:
                return frozenset(file.keys())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path / WEIGHTS_FILE} cannot be read: {error}.") from error

    def projections_of(self, projections: tuple[str, ...]) -> tuple[str, ...]:
        """Those of the experts' projections that the adapter adapts.

        Args:
            projections: The names of the projections, in the order of the module's parameters.

        Returns:
            Some of them, in that order.
        """
        adapted = {name.rpartition(".")[2] for name in self._target_parameters}
        return tuple(name for name in projections if name in adapted)

    def linear(self, name: str, letter: str) -> Tensor:
        """Read one matrix of a linear layer's adapter.

        Args:
            name: The layer's name in the model.
            letter: ``lora_A`` or ``lora_B``.

        Returns:
            ``[P, in]`` or ``[out, P]``.

        Raises:
            CheckpointError: If it cannot be read.
        """
        return self._read(linear_key(name, letter))

    def experts_a(self, key: str, expert_ids: Iterable[int], *, num_experts: int) -> Tensor:
        """Read A of some experts of a projection, and nothing of the others.

        Args:
            key: The tensor's name in the file.
            expert_ids: Logical experts.
            num_experts: Logical experts of the layer.

        Returns:
            ``[len(expert_ids), P, X]``.

        Raises:
            CheckpointError: If it cannot be read.
        """
        r = self.rank
        ids = list(expert_ids)
        try:
            with safe_open(self.path / WEIGHTS_FILE, "pt") as file:
                matrix = file.get_slice(key)
                height, width = matrix.get_shape()
                self._check_experts(key, height, num_experts)
                rows = [matrix[e * r : (e + 1) * r] for e in ids]
                return torch.stack(rows) if rows else torch.empty(0, r, width)
        except (OSError, SafetensorError) as error:
            raise self._unreadable(key, error) from error

    def experts_b(self, key: str, expert_ids: Iterable[int], *, num_experts: int) -> Tensor:
        """Read B of some experts of a projection; the file has them interleaved.

        Args:
            key: The tensor's name in the file.
            expert_ids: Logical experts.
            num_experts: Logical experts of the layer.

        Returns:
            ``[len(expert_ids), Y, P]``.

        Raises:
            CheckpointError: If it cannot be read.
        """
        matrix = self._read(key)
        self._check_experts(key, matrix.shape[1], num_experts)
        return experts_from_peft(matrix, LORA_B, num_experts=num_experts)[list(expert_ids)]

    def _check_experts(self, key: str, size: int, num_experts: int) -> None:
        if size != self.rank * num_experts:
            raise CheckpointError(
                f"{self.path}: {key} holds {size} ranks, and {num_experts} experts of rank "
                f"{self.rank} have {self.rank * num_experts}: it was made for another model."
            )

    def _read(self, key: str) -> Tensor:
        try:
            with safe_open(self.path / WEIGHTS_FILE, "pt") as file:
                tensor: Tensor = file.get_tensor(key)
                return tensor
        except (OSError, SafetensorError) as error:
            raise self._unreadable(key, error) from error

    def _unreadable(self, key: str, error: Exception) -> CheckpointError:
        return CheckpointError(f"{self.path / WEIGHTS_FILE}: {key} cannot be read: {error}.")


def save_adapter(
    directory: Path, tensors: Iterable[tuple[str, Tensor]], *, rank: int, alpha: float, base: str
) -> None:
    """Write adapters as a directory that ``peft.PeftModel.from_pretrained`` loads.

    Args:
        directory: Where to; made if missing. An adapter there is replaced.
        tensors: The adapters' parameters by our names, whole, A and B of each; taken one at a time
            and kept on the host.
        rank: Rank of the adapters.
        alpha: What gives their scale as alpha / rank.
        base: Directory or hub id of the base model.

    Raises:
        UsageError: If peft is not installed, or the directory cannot be written.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise UsageError(f"writing a PEFT adapter needs peft: {how_to_install('peft')}.") from error
    matrices: dict[str, Tensor] = {}
    modules: set[str] = set()
    projections: dict[str, list[str]] = {}
    for name, tensor in tensors:
        module, _, own_name = name.rpartition(".")
        letter = own_name[-len(LORA_A) :]
        projection = own_name.removesuffix(letter).removesuffix("_")
        tensor = tensor.detach().cpu()
        if not projection:
            modules.add(module)
            matrices[linear_key(module, letter)] = tensor.contiguous()
            continue
        matrices[name] = experts_to_peft(tensor, letter).contiguous()
        if projection not in projections.setdefault(module, []):
            projections[module].append(projection)
    for module, adapted in projections.items():
        # The families have the projection up first, whatever the order of the tensors.
        in_order = tuple(sorted(adapted, key=lambda projection: projection == "down_proj"))
        for name, key in expert_keys(module, in_order).items():
            matrices[key] = matrices.pop(name)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # type: ignore[arg-type]
        target_modules=sorted({name.rpartition(".")[2] for name in modules}),
        target_parameters=sorted(
            {
                ".".join([*m.split(".")[-2:], p])
                for m, adapted in projections.items()
                for p in adapted
            }
        )
        or None,
        base_model_name_or_path=base,
        inference_mode=True,
    )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".adapter.") as temporary:
            save_file(matrices, Path(temporary) / WEIGHTS_FILE, metadata={"format": "pt"})
            config.save_pretrained(temporary)
            for file in (WEIGHTS_FILE, CONFIG_FILE):
                os.replace(Path(temporary) / file, directory / file)
    except OSError as error:
        raise UsageError(f"{directory} cannot be written ({error.strerror}).") from error
