"""The option parser's messages, without what only a Python programmer needs."""

import re


def plain_words(message: str) -> str:
    """Leave out of the parser's messages what speaks of Python's types."""
    lines = [line for line in message.splitlines() if line.strip()]
    lines = [line for line in lines if not _NOISE.search(line)]
    # Of several things that an option may be, text is never what was meant.
    if sum(line.strip().startswith("- ") for line in lines) > 1:
        lines = [line for line in lines if line.strip() != "- Expected a <class 'str'>"]
    if len(lines) == 1:
        lines = [lines[0].strip().removeprefix("- ")]
    text = "\n".join(lines)
    return re.sub(r"<class '([\w.]+)'>", r"\1", text).replace("typing.Literal", "one of ")


_NOISE = re.compile(
    r"^\s*((- )?Does not validate against|Subtypes:|Errors:|- Expected a <class 'NoneType'>"
    r"|Given value type:|Given value: (Namespace|NestedArg)\()"
)
