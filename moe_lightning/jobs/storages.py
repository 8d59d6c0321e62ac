"""Opening a job's place: a local directory, or a URL."""

from pathlib import Path

from moe_lightning.jobs.local_storage import LocalStorage
from moe_lightning.jobs.storage import Storage


def is_url(place: str) -> bool:
    """Whether a place is a URL such as ``s3://bucket/run``, not a local path."""
    return "://" in place


def open_storage(place: str | Path) -> Storage:
    """Open the place of a job.

    Args:
        place: A directory, or a URL that fsspec knows.

    Returns:
        Its storage; nothing has been read or written.

    Raises:
        UsageError: If fsspec does not know the URL's protocol, or lacks the package for it.
    """
    if is_url(str(place)):
        from moe_lightning.jobs.url_storage import UrlStorage

        return UrlStorage(str(place))
    return LocalStorage(Path(place))
