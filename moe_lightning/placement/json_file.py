"""Reading the JSON files of this package, written by hand too: every mistake has its message."""

import json
from pathlib import Path
from typing import Any

from moe_lightning.errors import UsageError


def read_text(path: str | Path, *, kind: str) -> str:
    """Read a text file.

    Args:
        path: The file.
        kind: What the file is, for messages: "a placement".

    Returns:
        Its text.

    Raises:
        UsageError: If the file is missing, a directory, unreadable or not UTF-8.
    """
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path}: not UTF-8 text (byte {error.start}), so it is not {kind}. Check the path, or "
            "save the file as UTF-8."
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"{path}: cannot be read as {kind} ({reason}). Give the path of a file that exists and "
            "may be read."
        ) from error


def parse_object(text: str, *, name: str, kind: str) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        text: The JSON text.
        name: The file, for messages.
        kind: What the text is, for messages: "a placement".

    Returns:
        The object.

    Raises:
        UsageError: If the text is not JSON, not an object, or repeats a key (of which JSON's
            readers would silently keep the last).
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{name}: not JSON, so it is not {kind} ({error}). Correct the file, or write it again."
        ) from error
    if not isinstance(value, dict):
        raise UsageError(
            f"{name}: holds a JSON {type(value).__name__}, but {kind} is an object, "
            '{"...": ...}. Check the path.'
        )
    return value


def layers_of(content: dict[str, Any], key: str, *, name: str) -> dict[int, list[Any]]:
    """Return the lists, one value per expert, that an object holds for each layer under a key.

    Args:
        content: The object.
        key: The key of the mapping from layer to list.
        name: The file, for messages.

    Returns:
        The list of each decoder layer, in ascending order of the layers.

    Raises:
        UsageError: If the key is missing, or what it holds is no mapping of layer numbers to lists.
    """
    layers = content.get(key)
    if not isinstance(layers, dict):
        state = "is missing" if key not in content else f"is {layers!r:.40}"
        raise UsageError(
            f'{name}: "{key}" {state}, but it must be an object of one list for each MoE layer, '
            f'{{"0": [...], "1": [...]}}. Correct the file, or write it again.'
        )
    for layer, per_expert in layers.items():
        if not (layer.isascii() and layer.isdigit() and str(int(layer[:9])) == layer):
            raise UsageError(
                f'{name}: "{key}" has the layer {layer!r:.40}. Layers are the numbers of the '
                'model\'s decoder layers, counted from 0: "0", "1", ... Correct the file.'
            )
        if not isinstance(per_expert, list) or not per_expert:
            raise UsageError(
                f'{name}: layer {layer} of "{key}" is {per_expert!r:.40}, but it must be a list '
                "of one value for each expert. Correct the file."
            )
    return {int(layer): layers[layer] for layer in sorted(layers, key=int)}


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r:.40} is there twice")
    return content
