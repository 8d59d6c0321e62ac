"""JSON objects as strangers send them: read within bounds, written so that they can be read.

Text can take 30 times its size once it is objects (`[[],[],...`), and time that grows faster than
its length (long numbers), so both are bounded before anything is built.
"""

import json
from math import isfinite
from typing import Any, NoReturn

from typing_extensions import Buffer

MAX_CONTROL_BYTES = 16 * 2**20
MAX_CONTROL_VALUES = 2**20
MAX_CONTROL_DEPTH = 16

_MAX_NUMBER_CHARS = 32  # enough for any 64-bit integer or double, as Python writes it


def to_json(body: dict[str, Any]) -> bytes:
    """Write an object.

    Args:
        body: What `json` can write, without NaN and infinities; keys that are no strings, and
            tuples, would be read as strings and lists.

    Returns:
        ASCII.

    Raises:
        ValueError: If the text is too long, or a number is not finite.
    """
    raw = json.dumps(body, allow_nan=False, separators=(",", ":")).encode("ascii")
    if len(raw) > MAX_CONTROL_BYTES:
        raise ValueError(f"a body of {len(raw)} bytes")
    return raw


def from_json(raw: Buffer) -> dict[str, Any]:
    """Read an object.

    Args:
        raw: UTF-8.

    Returns:
        The object.

    Raises:
        ValueError: If it is no JSON object, too large, too deep, or has numbers that are not finite
            or longer than 64-bit numbers are.
        RecursionError: If it is so deep that not even its depth can be found out.
    """
    num_bytes = memoryview(raw).nbytes
    if num_bytes > MAX_CONTROL_BYTES:
        raise ValueError(f"a body of {num_bytes} bytes")
    text = str(raw, "utf-8")
    if sum(map(text.count, ",[{")) > MAX_CONTROL_VALUES:  # some are in strings: no matter
        raise ValueError("a body of too many values")
    body = _DECODER.decode(text)
    if not isinstance(body, dict):
        raise ValueError("the body is no JSON object")
    _check_depth(body)
    return body


def _check_depth(body: dict[str, Any]) -> None:
    level: list[Any] = [body]
    for _ in range(MAX_CONTROL_DEPTH):
        items = (item.values() if isinstance(item, dict) else item for item in level)
        level = [child for item in items for child in item if isinstance(child, dict | list)]
        if not level:
            return
    raise ValueError(f"a body of more than {MAX_CONTROL_DEPTH} levels")


def _integer(text: str) -> int:
    if len(text) > _MAX_NUMBER_CHARS:
        raise ValueError(f"a number of {len(text)} characters in the body")
    return int(text)


def _finite(text: str) -> float:
    if len(text) > _MAX_NUMBER_CHARS or not isfinite(number := float(text)):
        raise ValueError("a number that no double holds in the body")
    return number


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} in the body")


_DECODER = json.JSONDecoder(parse_int=_integer, parse_float=_finite, parse_constant=_no_constant)
