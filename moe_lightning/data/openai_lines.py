"""Lines of an OpenAI batch file: `{"custom_id", "method", "url", "body"}`.

A field of the body that would change the answer and is not supported is an error, never ignored:
a wrong answer costs more than a row in `errors.jsonl`.
Source of the format: https://platform.openai.com/docs/guides/batch (July 2025).
"""

from collections.abc import Mapping
from typing import Any

from moe_lightning.data.fields import RecordError, type_name

_TEXT_FIELD = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}
_OPTIONS = ("temperature", "top_p", "seed", "stop")
_LENGTHS = ("max_tokens", "max_completion_tokens")
# These do not change the answer.
_IGNORED = frozenset(
    ("model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
)
# Unsupported fields, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "stream": (False,),
    "echo": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none",),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}


def is_openai_line(obj: Mapping[str, Any]) -> bool:
    """Tell a line of an OpenAI batch file from an own row.

    Args:
        obj: The parsed line.

    Returns:
        Whether it has a `body`, or a `custom_id` and a `url`.
    """
    return "body" in obj or ("custom_id" in obj and "url" in obj)


def unwrap_openai_line(obj: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the body of an OpenAI batch line into the fields of an own row.

    Args:
        obj: The parsed line.

    Returns:
        The row's `prompt` or `messages` and its options, without its id.

    Raises:
        RecordError: If the line asks for something that is not supported, naming the field.
    """
    method = obj.get("method")
    if method not in (None, "POST"):
        raise RecordError(f"'method' must be 'POST', not {method!r}")
    url = obj.get("url")
    if not isinstance(url, str) or url not in _TEXT_FIELD:
        raise RecordError(f"'url' must be one of {', '.join(_TEXT_FIELD)}, not {url!r}")
    body = obj.get("body")
    if not isinstance(body, Mapping):
        raise RecordError(f"'body' must be an object, not {type_name(body)}")

    text_field = _TEXT_FIELD[url]
    used = (text_field, *_OPTIONS, *_LENGTHS)
    for name, value in body.items():
        if name in used or name in _IGNORED or value is None:
            continue
        # `1 == True` in Python, so the type counts too; 0 and 0.0 ask for the same.
        if not any(
            value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
            for neutral in _NEUTRAL.get(str(name), ())
        ):
            raise RecordError(
                f"{'body.' + str(name)!r} is not supported (its value is {repr(value)[:60]}); "
                "remove it"
            )
    if body.get(text_field) is None:
        raise RecordError(f"'body.{text_field}' is missing, which {url} needs")

    lengths = {name: body[name] for name in _LENGTHS if body.get(name) is not None}
    if len(lengths) == 2 and lengths["max_tokens"] != lengths["max_completion_tokens"]:
        raise RecordError(f"'body' gives two different lengths: {lengths}; keep one of them")
    fields = {name: body[name] for name in (text_field, *_OPTIONS) if body.get(name) is not None}
    if lengths:
        fields["max_new_tokens"] = next(iter(lengths.values()))
    return fields
