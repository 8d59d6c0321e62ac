"""Checks of single fields of a row, shared by own rows and OpenAI batch lines."""

from collections.abc import Mapping
from typing import Any


class RecordError(ValueError):
    """One row that cannot be used; the other rows can.

    Args:
        message: What is wrong with the row and what to do.
        id: The row's id where it could be read.
    """

    def __init__(self, message: str, *, id: str | int | None = None) -> None:
        super().__init__(message)
        self.id = id


def type_name(value: object) -> str:
    """Name a parsed JSON value's type as JSON does.

    Args:
        value: What `json.loads` returned.

    Returns:
        Such as "a list", or the Python class for values that JSON does not have.
    """
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    names |= {int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def bad_value(field: str, value: object, wanted: str) -> RecordError:
    """Build the error of a field with a wrong value.

    Args:
        field: The field's name.
        value: The value.
        wanted: What it must be.

    Returns:
        The error.
    """
    shown = repr(value)
    return RecordError(f"{field!r} must be {wanted}, not {shown[:80]}")


def check_text(value: object, *, field: str) -> None:
    """Check that a value is a string that can be written as UTF-8.

    Args:
        value: The value.
        field: The field's name, for the error.

    Raises:
        RecordError: If it is not.
    """
    if not isinstance(value, str):
        raise RecordError(f"{field!r} must be a string, not {type_name(value)}")
    if value.isascii():
        return
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RecordError(
            f"{field!r} holds half of a surrogate pair (\\u{ord(value[error.start]):04x} at "
            f"character {error.start}), which is no text; write the whole pair or remove it"
        ) from None


def parse_messages(messages: object) -> list[dict[str, Any]]:
    """Check a conversation and bring every content into the form of one string.

    Args:
        messages: The field's value.

    Returns:
        The messages, without null fields.

    Raises:
        RecordError: If it is no list of `{"role", "content"}`, or holds more than text.
    """
    if not isinstance(messages, list | tuple) or not messages:
        what = "an empty list" if isinstance(messages, list | tuple) else type_name(messages)
        raise RecordError(
            f'\'messages\' must be a list like [{{"role": "user", "content": "..."}}], not {what}'
        )
    return [_parse_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _parse_message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RecordError(f"{where} must be an object, not {type_name(message)}")
    role = message.get("role")
    check_text(role, field=f"{where}.role")
    if not role:
        raise RecordError(f"{where}.role is empty; use system, user or assistant")
    for name in ("tool_calls", "function_call"):
        if message.get(name):
            raise RecordError(f"{where}.{name} is not supported; only messages of text are")
    content = message.get("content")
    if isinstance(content, list | tuple):
        # Templates of text models print a list of parts as Python would; joined, all can read it.
        content = "".join(_part_text(p, f"{where}.content[{i}]") for i, p in enumerate(content))
    check_text(content, field=f"{where}.content")
    rest = {str(k): v for k, v in message.items() if v is not None}
    return {**rest, "role": role, "content": content}


def _part_text(part: object, where: str) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, Mapping) else type_name(part)
        raise RecordError(
            f'{where} must be {{"type": "text", "text": "..."}}, not {kind!r}; the model reads text'
        )
    text = part.get("text")
    check_text(text, field=f"{where}.text")
    return str(text)
