"""The header of a safetensors file, checked before any of its bytes is trusted. No torch here.

    8 bytes: N, little-endian │ N bytes: JSON {name: {dtype, shape, data_offsets}} │ data, no holes

Format: https://huggingface.co/docs/safetensors (the limits are those of the reference
implementation, 0.8).
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_lightning.errors import CheckpointError
from moe_lightning.modeling.file_reading import (
    START_BYTES,
    open_regular,
    read_exactly,
    refuse_impostor,
)

MAX_HEADER_BYTES = 100_000_000
_MAX_INT64 = 2**63 - 1

# Bits of one element of each dtype of the format.
DTYPE_BITS: Mapping[str, int] = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "U8", "I8"), 8),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
PLAIN_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies on disk.

    Args:
        name: Name in the checkpoint.
        file: File that holds it.
        dtype: Dtype in the format's words, for example ``"BF16"``.
        shape: Its sizes.
        start: First byte, counted from the start of the file.
        end: One past its last byte, counted from the start of the file.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header.

    Args:
        file: The file.
        num_bytes: Size of the whole file.
        digest: SHA-256 of the header's bytes, length included, in hex.
        tensors: The file's tensors by name.
    """

    file: Path
    num_bytes: int
    digest: str
    tensors: dict[str, TensorInfo]


def read_header(file: Path) -> Header:
    """Read and check the header of a safetensors file.

    Args:
        file: The file.

    Returns:
        The header; every tensor lies inside the file, has the bytes its shape needs, and overlaps
        no other.

    Raises:
        CheckpointError: If the file is damaged; the message names the file, the tensor and the
            remedy.
    """
    fd = open_regular(file)
    try:
        num_bytes = os.fstat(fd).st_size
        start = read_exactly(fd, START_BYTES, 0)
        refuse_impostor(file, start)
        length = int.from_bytes(start[:8], "little")
        header = read_exactly(fd, min(8 + length, 8 + MAX_HEADER_BYTES, num_bytes), 0)
    except OSError as error:
        raise CheckpointError(
            f"{file}: cannot be read ({error.strerror}). Check the disk."
        ) from error
    finally:
        os.close(fd)
    tensors = parse_header(header, file=file, file_bytes=num_bytes)
    return Header(file, num_bytes, hashlib.sha256(header).hexdigest(), tensors)


def parse_header(header: bytes, *, file: Path, file_bytes: int) -> dict[str, TensorInfo]:
    """Check the first bytes of a safetensors file and find its tensors.

    Args:
        header: The file's first bytes, up to the end of its header if it has that many.
        file: The file, for messages and for the result.
        file_bytes: Size of the whole file.

    Returns:
        The file's tensors by name.

    Raises:
        CheckpointError: If anything in the header contradicts the format or the file's size.
    """
    length = int.from_bytes(header[:8], "little")
    if len(header) < 8:
        raise _damaged(file, f"is {file_bytes} bytes long, too short for a header")
    if length > MAX_HEADER_BYTES:
        raise _damaged(
            file,
            f"says that its header has {length:,} bytes, but the format allows "
            f"{MAX_HEADER_BYTES:,}",
        )
    if len(header) < 8 + length:
        raise _damaged(
            file, f"ends after {file_bytes:,} bytes, inside its header of {length:,} bytes"
        )
    entries = _parse_json(header[8 : 8 + length], file)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise _damaged(file, "has a __metadata__ that is not a JSON object")
    data_start = 8 + length
    tensors = {name: _parse_entry(name, entry, file, data_start) for name, entry in entries.items()}
    _check_layout(tensors, file, data_start, file_bytes)
    return tensors


def _parse_json(text: bytes, file: Path) -> dict[str, Any]:
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"has a header that is no JSON ({error})") from error
    if not isinstance(entries, dict):
        raise _damaged(file, "has a header that is not a JSON object")
    return entries


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in unique if keys.count(key) > 1)
        raise ValueError(f"key {twice!r} appears more than once")
    return unique


def _parse_entry(name: str, entry: object, file: Path, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise _damaged(file, f"has no dtype, shape and data_offsets for tensor {name!r}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(
            f"{file}: tensor {name!r} has the unknown dtype {dtype!r}. Download the file again, "
            f"or convert the checkpoint to one of {', '.join(sorted(PLAIN_FLOATS))}."
        )
    if not _is_sizes(shape):
        raise _damaged(file, f"says that tensor {name!r} has shape {shape}")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(file, f"says that tensor {name!r} has data_offsets {offsets}")
    num_elements = 1
    for size in shape:
        num_elements *= size
        if num_elements > _MAX_INT64:
            raise _damaged(
                file, f"says that tensor {name!r} has shape {shape}, more than any file can hold"
            )
    num_bits, num_bytes = num_elements * DTYPE_BITS[dtype], offsets[1] - offsets[0]
    if num_bits != 8 * num_bytes:
        raise _damaged(
            file,
            f"gives tensor {name!r} {num_bytes:,} bytes, but its shape {shape} in {dtype} takes "
            f"{num_bits // 8:,}",
        )
    return TensorInfo(
        name, file, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1]
    )


def _is_sizes(value: object) -> bool:
    # type() and not isinstance(): True is no size.
    return isinstance(value, list) and all(
        type(size) is int and 0 <= size <= _MAX_INT64 for size in value
    )


def _check_layout(
    tensors: Mapping[str, TensorInfo], file: Path, data_start: int, file_bytes: int
) -> None:
    end, last = data_start, "the header"
    for info in sorted(tensors.values(), key=lambda info: (info.start, info.end)):
        if info.start < end:
            raise _damaged(
                file,
                f"has tensor {info.name!r} overlap {last}: it starts {end - info.start:,} bytes "
                "early",
            )
        if info.start > end:
            raise _damaged(
                file, f"has a hole of {info.start - end:,} bytes before tensor {info.name!r}"
            )
        if info.end > file_bytes:
            raise CheckpointError(
                f"{file}: tensor {info.name!r} ends at byte {info.end:,}, beyond the end of the "
                f"file at {file_bytes:,}: the file is truncated, probably by a download that "
                "stopped. Download it again."
            )
        end, last = info.end, f"tensor {info.name!r}"
    if file_bytes > end:
        raise _damaged(file, f"has {file_bytes - end:,} extra bytes at the end, after {last}")


def _damaged(file: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{file}: the file is damaged: it {what}. Download or write it again.")
