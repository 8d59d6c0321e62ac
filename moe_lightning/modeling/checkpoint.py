"""A checkpoint on disk, opened but not loaded: its config, its tensors, and lazy slices of them.

Bytes are read with plain ``pread``: a file that is truncated or unreachable after it was opened
ends in an error, where a memory map would end in a signal that nothing can catch. What a sound
checkpoint is, lives in ``checkpoint_files`` and ``preflight``; filling a model lives in
``loading``.
"""

import hashlib
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

import moe_lightning.demo
from moe_lightning.errors import CheckpointError
from moe_lightning.modeling.checkpoint_files import CheckpointFiles, check_files
from moe_lightning.modeling.file_reading import open_regular
from moe_lightning.modeling.host_memory import empty_pages
from moe_lightning.modeling.hub import download_checkpoint
from moe_lightning.modeling.safetensors_header import TensorInfo

__all__ = ["TORCH_DTYPES", "CheckpointView", "TensorInfo", "TensorSlice", "open_checkpoint"]

TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


class TensorSlice:
    """One tensor of a checkpoint, read when it is indexed; stands in for safetensors'
    ``get_slice``.

    ``[...]`` reads all of it. An integer or a slice of dim 0, alone or first in a tuple, reads only
    those rows' bytes. Every other index reads all and cuts.
    """

    def __init__(self, view: "CheckpointView", info: TensorInfo) -> None:
        self._view = view
        self._info = info

    def get_shape(self) -> list[int]:
        """The tensor's sizes."""
        return list(self._info.shape)

    def get_dtype(self) -> str:
        """The tensor's dtype in the format's words, for example ``"BF16"``."""
        return self._info.dtype

    def __getitem__(self, index: Any) -> Tensor:
        first, rest = (index[0], index[1:]) if isinstance(index, tuple) and index else (index, ())
        shape = self._info.shape
        if shape and isinstance(first, slice):
            start, stop, step = first.indices(shape[0])
            if step < 1:
                raise IndexError(
                    f"tensor {self._info.name!r}: the step of a slice must be at least 1, got "
                    f"{step}."
                )
            whole = self._read(start, max(start, stop))
            index = (slice(None, None, step), *rest)
        elif shape and isinstance(first, int) and not isinstance(first, bool):
            if not -shape[0] <= first < shape[0]:
                raise IndexError(
                    f"tensor {self._info.name!r}: index {first} is out of its {shape[0]} rows."
                )
            whole = self._read(first % shape[0], first % shape[0] + 1)
            index = (0, *rest)
        else:
            whole = self._read(0, shape[0] if shape else 1)
        part: Tensor = whole[index]
        # A small part must not keep all that was read alive.
        return part.clone() if part.numel() < whole.numel() else part.contiguous()

    def _read(self, start_row: int, stop_row: int) -> Tensor:
        info = self._info
        num_rows = info.shape[0] if info.shape else 1
        row_bytes = (info.end - info.start) // num_rows if num_rows else 0
        shape = (stop_row - start_row, *info.shape[1:]) if info.shape else ()
        return self._view._read_rows(info, info.start + start_row * row_bytes, shape)


class CheckpointView:
    """A checked checkpoint directory; reads nothing until a slice is indexed. Threads may share it.

    Args:
        files: The directory's files, checked.
        config: The model's config.
    """

    def __init__(self, files: CheckpointFiles, config: PreTrainedConfig) -> None:
        self.path = files.path
        self.config = config
        self.config_keys = frozenset(_all_keys(files.config))
        self.tensors: dict[str, TensorInfo] = files.tensors
        self.num_bytes = sum(info.end - info.start for info in files.tensors.values())
        self.bytes_read = 0
        self._files = files
        self._fds: dict[Path, int] = {}
        self._is_closed = False
        self._lock = threading.Lock()

    def slices(self, names: Iterable[str]) -> dict[str, TensorSlice]:
        """Lazy slices of some tensors.

        Args:
            names: Names of tensors of this checkpoint.

        Returns:
            A slice for each name.

        Raises:
            CheckpointError: If the checkpoint has no such tensor.
        """
        slices = {}
        for name in names:
            if name not in self.tensors:
                raise CheckpointError(
                    f"{self.path}: there is no tensor {name!r}. Check the name against the files."
                )
            slices[name] = TensorSlice(self, self.tensors[name])
        return slices

    def fingerprint(self) -> str:
        """A hash by which to tell checkpoints apart without reading their weights.

        Returns:
            SHA-256 in hex of config.json, the index, and each file's name, size and header.
        """
        digest = hashlib.sha256()
        parts = [self._files.config_bytes, self._files.index_bytes]
        for header in sorted(self._files.headers, key=lambda header: header.file.name):
            parts.append(f"{header.file.name}\0{header.num_bytes}\0{header.digest}".encode())
        for part in parts:
            digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()

    def close(self) -> None:
        """Close the files. Slices can no longer be read; names, shapes and the config stay."""
        with self._lock:
            self._is_closed = True
            while self._fds:
                os.close(self._fds.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # Unset if the constructor raised.
        if hasattr(self, "_lock"):
            self.close()

    def _descriptor(self, file: Path) -> int:
        with self._lock:
            if self._is_closed:
                raise CheckpointError(
                    f"{self.path}: the checkpoint was closed. Open it again with open_checkpoint()."
                )
            if file not in self._fds:
                self._fds[file] = open_regular(file)
            return self._fds[file]

    def _read_rows(self, info: TensorInfo, offset: int, shape: tuple[int, ...]) -> Tensor:
        if info.dtype not in TORCH_DTYPES:
            raise CheckpointError(
                f"{info.file}: tensor {info.name!r} is packed as {info.dtype}, which torch cannot "
                "compute with. Convert the checkpoint to BF16 first."
            )
        dtype = TORCH_DTYPES[info.dtype]
        tensor = empty_pages(shape, dtype)
        buffer = tensor.reshape(-1).view(torch.uint8).numpy().data
        fd, num_read = self._descriptor(info.file), 0
        while num_read < len(buffer):
            try:
                num_new = os.preadv(fd, [buffer[num_read:]], offset + num_read)
            except OSError as error:
                raise CheckpointError(
                    f"{info.file}: tensor {info.name!r} cannot be read ({error.strerror}). Check "
                    "the disk or the network file system, then run the same command again."
                ) from error
            if num_new == 0:
                raise CheckpointError(
                    f"{info.file}: tensor {info.name!r} ends at byte {info.end:,}, but the file "
                    f"now ends at {os.fstat(fd).st_size:,}: it was truncated after it was opened. "
                    "Download it again, and let nothing write to the checkpoint while it is in "
                    "use."
                )
            num_read += num_new
        with self._lock:
            self.bytes_read += num_read
        return tensor


def _all_keys(config: dict[str, Any]) -> Iterator[str]:
    """The keys of config.json, those of a nested text_config included."""
    for key, value in config.items():
        yield key
        if isinstance(value, dict):
            yield from value


def open_checkpoint(name: str | Path) -> CheckpointView:
    """Open a checkpoint and check its files; no weight is read.

    Args:
        name: ``"demo"`` for the checkpoint that ships with the package, a Hugging Face directory,
            or a hub id such as ``"allenai/OLMoE-1B-7B-0924"``, which is downloaded (safetensors,
            JSON and tokenizer files only).

    Returns:
        The opened checkpoint.

    Raises:
        CheckpointError: If there is no such checkpoint or its files are damaged.
    """
    files = check_files(_resolve(str(name)))
    try:
        # Never remote code, whatever config.json asks for.
        config = AutoConfig.from_pretrained(
            files.path, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:
        raise CheckpointError(
            f"{files.path / 'config.json'}: transformers cannot use this config (model_type "
            f"{files.config['model_type']!r}): {' '.join(str(error).split())}. Correct "
            "the file, or download it again."
        ) from error
    return CheckpointView(files, config)


def _resolve(name: str) -> Path:
    if name == "demo":
        path = moe_lightning.demo.checkpoint_path()
        if not path.is_dir():
            raise CheckpointError(
                f"{path}: the demo checkpoint is missing from this installation. Reinstall "
                "moe-lightning, or name another checkpoint with --model.checkpoint PATH."
            )
        return path
    if not name.strip():
        raise CheckpointError("--model.checkpoint is empty. Name a directory, a hub id, or `demo`.")
    path = Path(name).expanduser()
    if os.path.isdir(path):  # Path.is_dir() raises on names that are too long
        return path
    return download_checkpoint(name)
