"""``export``: a training checkpoint as a Hugging Face directory."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from moe_lightning.errors import CheckpointError, UsageError
from moe_lightning.finetune.adapter_files import save_adapter
from moe_lightning.finetune.lora import is_adapter
from moe_lightning.modeling.sharded_export import export_sharded, read_adapters
from moe_lightning.modeling.training_checkpoint import (
    check_training_checkpoint,
    find_sharded,
    read_meta,
)
from moe_lightning.module import MoELightningModule


def run(arguments: Sequence[str]) -> int:
    """Run the verb.

    Args:
        arguments: The command line after the verb.

    Returns:
        0.
    """
    parser = ArgumentParser(
        prog="python -m moe_lightning export",
        description="Write a training checkpoint of fit as a Hugging Face directory.",
    )
    parser.add_argument(
        "--model.checkpoint", type=str, help="The checkpoint that fit started from.", required=True
    )
    parser.add_argument(
        "--ckpt_path",
        type=str,
        help="The training checkpoint of fit: a .ckpt file or directory.",
        required=True,
    )
    parser.add_argument(
        "--export_dir", type=str, help="The directory to write; made if missing.", required=True
    )
    parser.add_argument(
        "--dtype",
        type=str | None,
        choices=["float32", "bfloat16", "float16"],
        help="Precision of the weights on disk. The default is that of --model.checkpoint.",
    )
    options = parser.parse_args(list(arguments))
    export_checkpoint(
        options["model.checkpoint"], options.ckpt_path, options.export_dir, dtype=options.dtype
    )
    print(f"exported: {options.export_dir}")
    return 0


def export_checkpoint(
    checkpoint: str, ckpt_path: str, export_dir: str, *, dtype: str | None = None
) -> None:
    """Write a training checkpoint as a Hugging Face directory.

    Args:
        checkpoint: The checkpoint that fit started from.
        ckpt_path: The training checkpoint.
        export_dir: The directory to write.
        dtype: Precision of the weights on disk; None is that of ``checkpoint``.

    Raises:
        UsageError: If a path cannot be used.
        CheckpointError: If the two checkpoints do not belong together.
    """
    directory = find_sharded(Path(ckpt_path))
    if directory is None and not Path(ckpt_path).is_file():
        raise UsageError(f"--ckpt_path {ckpt_path}: no such file or directory.")
    check_training_checkpoint(ckpt_path)
    module = MoELightningModule(checkpoint, dtype="float32")
    if directory is not None:
        _export_directory(module, directory, Path(export_dir), dtype=dtype)
        return
    content = torch.load(ckpt_path, map_location="cpu", weights_only=True, mmap=True)
    state = content["state_dict"]
    if "lora" in content:
        adapters = {k.removeprefix("model."): t for k, t in state.items() if is_adapter(k)}
        _save_adapter(module, adapters.items(), content["lora"], Path(export_dir))
        return
    module.configure_model()
    assert module.model is not None
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{ckpt_path} was not trained from {checkpoint}: {error}") from error
    module.model.to(dtype=_dtype(module, dtype))
    module.export(export_dir)


def _export_directory(
    module: MoELightningModule, directory: Path, export_dir: Path, *, dtype: str | None
) -> None:
    meta = read_meta(directory)
    if not meta["left_out"]:
        export_sharded(
            directory, module.view, module.tokenizer, export_dir, dtype=_dtype(module, dtype)
        )
        return
    lora = meta["rest"].get("lora")
    if lora is None:
        raise CheckpointError(
            f"{directory} holds a part of the parameters that are no adapters, and cannot be "
            "exported. Train without freezing, or with --model.lora."
        )
    _save_adapter(module, read_adapters(directory), lora, export_dir)


def _save_adapter(
    module: MoELightningModule,
    tensors: Iterable[tuple[str, Tensor]],
    lora: Mapping[str, Any],
    export_dir: Path,
) -> None:
    save_adapter(
        export_dir, tensors, rank=lora["rank"], alpha=lora["alpha"], base=module.checkpoint
    )


def _dtype(module: MoELightningModule, asked: str | None) -> torch.dtype:
    """The precision on disk."""
    target = asked or module.view.config.get_text_config().dtype or "float32"
    found = getattr(torch, target) if isinstance(target, str) else target
    assert isinstance(found, torch.dtype), "the options and configs name dtypes"
    return found
