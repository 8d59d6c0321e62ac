"""A training file as token ids on disk, written once and memory-mapped by every process.

<key>/tokens.bin      uint16 or uint32, one a token
      is_learnt.bin   uint8, one a token
      documents.bin   int64, where each document starts, and where the last one ends
      meta.json       counts
"""

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from moe_lightning.data.documents import Document, DocumentFile
from moe_lightning.data.targets import TargetEncoder, TargetError
from moe_lightning.errors import UsageError

_LAYOUT = 1  # raise it when what the files hold changes
_CHUNK_DOCUMENTS = 256
_CHUNK_CHARS = 2**21


class TokenCache:
    """The tokens of a training file, as arrays that are read from disk when they are used.

    Args:
        directory: Where `write_cache` put them.

    Attributes:
        num_tokens: Number of tokens.
        num_documents: Number of documents.
        is_all_learnt: Whether every token is to be learnt, as in plain text.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        meta = json.loads((directory / "meta.json").read_text())
        self.num_tokens: int = meta["num_tokens"]
        self.num_documents: int = meta["num_documents"]
        self.is_all_learnt: bool = meta["num_learnt"] == meta["num_tokens"]
        self._dtype: str = meta["dtype"]
        self._arrays: dict[str, NDArray[Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map is a copy of the whole file: worker processes map it themselves.
        return self.__dict__ | {"_arrays": {}}

    @property
    def tokens(self) -> NDArray[np.unsignedinteger[Any]]:
        """Token ids of all documents, one after the other."""
        return self._map("tokens.bin", self._dtype)

    @property
    def is_learnt(self) -> NDArray[np.uint8]:
        """Whether each token is to be learnt, 1 or 0."""
        return self._map("is_learnt.bin", "uint8")

    @property
    def document_starts(self) -> NDArray[np.int64]:
        """Where each document starts in `tokens`; one more entry than documents, the end."""
        return self._map("documents.bin", "int64")

    def _map(self, name: str, dtype: str) -> NDArray[Any]:
        if name not in self._arrays:
            path = self.directory / name
            # A file of no bytes can't be mapped.
            self._arrays[name] = (
                np.memmap(path, dtype=dtype, mode="r")
                if path.stat().st_size
                else np.zeros(0, dtype=dtype)
            )
        return self._arrays[name]


def cache_key(file: DocumentFile, tokenizer: Any) -> str:
    """Return a name that changes with the file, the way it is read, and the tokenizer.

    Args:
        file: The training file, known by its path, size and time of change.
        tokenizer: The tokenizer, known by its vocabulary, rules and chat template.

    Returns:
        Sixteen hexadecimal digits.
    """
    stat = file.path.stat()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    facts = [
        _LAYOUT,
        str(file.path.resolve()),
        stat.st_size,
        stat.st_mtime_ns,
        file.format,
        type(tokenizer).__name__,
        tokenizer.eos_token_id,
        str(getattr(tokenizer, "chat_template", None)),
        rules,
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def write_cache(
    file: DocumentFile, tokenizer: Any, directory: Path, *, vocab_size: int, is_quiet: bool
) -> None:
    """Tokenise a training file into a directory, unless that has been done before.

    Args:
        file: The training file.
        tokenizer: The tokenizer.
        directory: The directory to make; it appears when it is complete.
        vocab_size: Number of rows of the model's embedding.
        is_quiet: Whether no progress bar is shown.

    Raises:
        UsageError: A line of the file is damaged or can't be tokenised, or the file is empty.
    """
    if (directory / "meta.json").is_file():
        return
    temporary = directory.with_name(f"{directory.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        _write(file, tokenizer, temporary, vocab_size=vocab_size, is_quiet=is_quiet)
        try:
            temporary.rename(directory)
        except OSError:
            if not (directory / "meta.json").is_file():  # else another process was faster
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(
    file: DocumentFile, tokenizer: Any, directory: Path, *, vocab_size: int, is_quiet: bool
) -> None:
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    encoder = TargetEncoder(tokenizer)
    document_starts = array("q", [0])
    num_tokens = num_learnt = 0
    with (
        (directory / "tokens.bin").open("wb") as tokens_file,
        (directory / "is_learnt.bin").open("wb") as is_learnt_file,
        tqdm(
            total=file.num_bytes,
            desc=f"Tokenising {file.path.name}",
            unit="B",
            unit_scale=True,
            disable=True if is_quiet else None,
        ) as bar,
    ):
        for chunk in _chunks(file):
            try:
                encoded = encoder.encode(chunk)
            except TargetError as error:
                raise file.error(error.document.line, str(error)) from error.__cause__
            for document, (ids, is_learnt) in zip(chunk, encoded, strict=True):
                if ids and max(ids) >= vocab_size:
                    raise file.error(
                        document.line,
                        f"the tokenizer gave the token id {max(ids)}, but the model knows 0 to "
                        f"{vocab_size - 1}: tokenizer and checkpoint do not belong together.",
                    )
                np.array(ids, dtype=dtype).tofile(tokens_file)
                np.array(is_learnt, dtype="uint8").tofile(is_learnt_file)
                num_tokens += len(ids)
                num_learnt += sum(is_learnt)
                if document.is_end:
                    document_starts.append(num_tokens)
            bar.update(file.num_bytes_read - bar.n)
    if num_tokens == 0:
        raise UsageError(f"{file.path} has no text: give a file with at least one document.")
    with (directory / "documents.bin").open("wb") as documents_file:
        document_starts.tofile(documents_file)
    meta = {
        "source": str(file.path),
        "dtype": dtype,
        "num_tokens": num_tokens,
        "num_learnt": num_learnt,
        "num_documents": len(document_starts) - 1,
    }
    (directory / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def _chunks(file: DocumentFile) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    num_chars = 0
    for document in file:
        chunk.append(document)
        num_chars += len(document.text) + len(document.prompt or "")
        if len(chunk) == _CHUNK_DOCUMENTS or num_chars > _CHUNK_CHARS:
            yield chunk
            chunk, num_chars = [], 0
    if chunk:
        yield chunk
