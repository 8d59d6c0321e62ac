"""The rows of an input file, from parsed JSON to token ids, and the errors of single rows.

    JSON object ── parse_record ──▶ Record ── Encoder ──▶ Row ── plan_batches ──▶ RowBatch
                        └────────── RowError ◀──┘

Nothing here touches files, tokenizers or torch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moe_lightning.data.fields import (
    RecordError,
    bad_value,
    check_text,
    parse_messages,
    type_name,
)
from moe_lightning.data.openai_lines import is_openai_line, unwrap_openai_line

__all__ = [
    "Record",
    "RecordError",
    "Row",
    "RowBatch",
    "RowError",
    "RowOptions",
    "parse_options",
    "parse_record",
]

MAX_NEW_TOKENS_LIMIT = 2**31 - 1
# What torch.Generator.manual_seed accepts.
SEED_MIN, SEED_MAX = -(2**63), 2**64 - 1


@dataclass(frozen=True, slots=True)
class RowOptions:
    """What a row says about its own generation; None means that the task's option holds.

    Args:
        max_new_tokens: Number of tokens to generate at most.
        temperature: Sampling temperature; 0 is greedy.
        top_p: Share of the probability mass to sample from.
        seed: Seed of the row's sampling.
        stop: Texts that end the answer.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Record:
    """A well-formed row before it is tokenised; exactly one of `prompt` and `messages` is set.

    Args:
        row: Position among the input's rows, from 0; bad rows count, blank lines do not.
        line: Line in the file, from 1; `row + 1` in Parquet.
        id: The row's own id, or the line number.
        prompt: The text to continue.
        messages: The conversation to answer; every content is a string.
        options: The row's own options.
        offset: Where its line begins in the file, in bytes; None where rows are no lines.
    """

    row: int
    line: int
    id: str | int
    prompt: str | None
    messages: list[dict[str, Any]] | None
    options: RowOptions
    offset: int | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """A tokenised row. The arguments are those of `Record`, with `token_ids` for the text."""

    row: int
    line: int
    id: str | int
    token_ids: list[int]
    options: RowOptions
    offset: int | None = None


@dataclass(frozen=True, slots=True)
class RowError:
    """A row that could not be computed: one line of `errors.jsonl`.

    Args:
        row: Position among the input's rows, from 0.
        line: Line in the file, from 1; None where the rows do not come from a file.
        id: The row's id; None where it could not be read.
        stage: Where it failed.
        error: What is wrong, why, and what to do.
        offset: Where its line begins in the file, in bytes; None where rows are no lines.
    """

    row: int
    line: int | None
    id: str | int | None
    stage: Literal["read", "encode", "compute"]
    error: str
    offset: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the row of `errors.jsonl`."""
        return {
            "id": self.id,
            "line": self.line,
            "offset": self.offset,
            "stage": self.stage,
            "error": self.error,
        }


class RowBatch:
    """The rows of one planned batch, in the plan's order.

    Deliberately not a dataclass: Lightning walks into dataclasses, down to every token id, when it
    moves a batch to a device or converts its precision, and refuses the frozen ones inside.

    Args:
        index: Number of the batch in the plan.
        rows: The rows to compute.
        errors: Rows of this batch that failed between planning and use.
    """

    __slots__ = ("errors", "index", "rows")

    def __init__(self, index: int, rows: list[Row], errors: list[RowError]) -> None:
        self.index = index
        self.rows = rows
        self.errors = errors

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RowBatch):
            return NotImplemented
        return (self.index, self.rows, self.errors) == (other.index, other.rows, other.errors)

    __hash__ = None  # type: ignore[assignment]  # mutable, as a dataclass with eq would be

    def __repr__(self) -> str:
        return f"RowBatch(index={self.index}, rows={self.rows!r}, errors={self.errors!r})"


def parse_record(obj: object, *, row: int, line: int, offset: int | None = None) -> Record:
    """Check one parsed row and bring it into the one form that the rest of the package knows.

    Args:
        obj: Own rows `{"id", "prompt" | "messages"}` with the optional fields of `RowOptions`, or
            lines of an OpenAI batch file. Other fields of own rows are ignored.
        row: Position among the input's rows, from 0.
        line: Line in the file, from 1; the id of a row that has none.
        offset: Where the line begins in the file, in bytes.

    Returns:
        The record.

    Raises:
        RecordError: If the row cannot be used.
    """
    if not isinstance(obj, Mapping):
        raise RecordError(
            f'a row must be a JSON object like {{"id": 1, "prompt": "..."}}, not {type_name(obj)}'
        )
    is_openai = is_openai_line(obj)
    id_field = "custom_id" if is_openai else "id"
    row_id = _parse_id(obj.get(id_field), field=id_field, line=line)
    try:
        fields = unwrap_openai_line(obj) if is_openai else obj
        for name in ("max_tokens", "max_completion_tokens"):
            if fields.get(name) is not None:
                raise RecordError(f"{name!r} is not an option of a row; call it 'max_new_tokens'")
        prompt, messages = fields.get("prompt"), fields.get("messages")
        if prompt is None and messages is None:
            raise RecordError(
                "neither 'prompt' nor 'messages' is given; the row has "
                f"{sorted(map(str, fields))[:20] or 'no fields'}"
            )
        if prompt is not None and messages is not None:
            raise RecordError("both 'prompt' and 'messages' are given; keep one of them")
        if prompt is not None:
            check_text(prompt, field="prompt")
        return Record(
            row=row,
            line=line,
            id=row_id,
            prompt=prompt,
            messages=None if messages is None else parse_messages(messages),
            options=parse_options(fields),
            offset=offset,
        )
    except RecordError as error:
        raise RecordError(str(error), id=row_id) from None


def parse_options(fields: Mapping[str, Any]) -> RowOptions:
    """Read the optional fields of a row; null counts as absent.

    Args:
        fields: The row.

    Returns:
        The options.

    Raises:
        RecordError: If a value is out of range or of the wrong type.
    """
    max_new_tokens = fields.get("max_new_tokens")
    if max_new_tokens is not None and not (
        _is_int(max_new_tokens) and 1 <= max_new_tokens <= MAX_NEW_TOKENS_LIMIT
    ):
        raise bad_value("max_new_tokens", max_new_tokens, f"an int in 1..{MAX_NEW_TOKENS_LIMIT}")
    temperature = _parse_number(fields, "temperature", "a number >= 0")
    if temperature is not None and temperature < 0:
        raise bad_value("temperature", temperature, "a number >= 0")
    top_p = _parse_number(fields, "top_p", "a number above 0 and at most 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise bad_value("top_p", top_p, "a number above 0 and at most 1")
    seed = fields.get("seed")
    if seed is not None and not (_is_int(seed) and SEED_MIN <= seed <= SEED_MAX):
        raise bad_value("seed", seed, "an int of 64 bits")
    stop = fields.get("stop")
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, Sequence) or not all(isinstance(s, str) and s for s in stops):
        raise bad_value("stop", stop, "a text or a list of texts, none of them empty")
    for text in stops:
        check_text(text, field="stop")
    if max_new_tokens is temperature is top_p is seed is None and not stops:
        return _NO_OPTIONS
    return RowOptions(max_new_tokens, temperature, top_p, seed, tuple(stops))


# One shared value for the many rows that have no options of their own.
_NO_OPTIONS = RowOptions()


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _parse_number(fields: Mapping[str, Any], name: str, wanted: str) -> float | None:
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise bad_value(name, value, wanted)
    try:
        number = float(value)
    except OverflowError:  # an int of more than 308 digits
        number = math.inf
    if not math.isfinite(number):
        raise bad_value(name, value, wanted)
    return number


def _parse_id(value: object, *, field: str, line: int) -> str | int:
    if value is None:
        return line
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RecordError(f"{field!r} must be a string or a whole number, not {type_name(value)}")
    if isinstance(value, str):
        check_text(value, field=field)
    return value
