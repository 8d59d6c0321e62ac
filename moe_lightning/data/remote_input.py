"""Inputs that are elsewhere are copied to this machine, since rows are read twice."""

from pathlib import Path

import fsspec

from moe_lightning.errors import UsageError
from moe_lightning.extras import with_extra


def fetch_input(url: str) -> Path:
    """Copy a file to the temporary directory of this machine, until this process ends.

    Args:
        url: Such as ``s3://bucket/prompts.jsonl``.

    Returns:
        The copy, with the file's own name.

    Raises:
        UsageError: If there is no such file, or no way to it.
    """
    try:
        return Path(fsspec.open_local(f"simplecache::{url}", simplecache={"same_names": True}))
    except (ValueError, ImportError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"the input {url} cannot be fetched: {with_extra(reason)}.") from error
