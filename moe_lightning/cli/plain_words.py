"""The option parser's messages, without what only a Python programmer needs."""

import re

from moe_lightning.extras import EXTRAS, how_to_install


def plain_words(message: str) -> str:
    """Leave out of the parser's messages what speaks of Python's types."""
    lines = [line for line in message.splitlines() if line.strip()]
    lines = [line for line in lines if not _NOISE.search(line)]
    # Of several things that an option may be, text is never what was meant.
    if sum(line.strip().startswith("- ") for line in lines) > 1:
        lines = [line for line in lines if line.strip() != "- Expected a <class 'str'>"]
    if len(lines) == 1:
        lines = [lines[0].strip().removeprefix("- ")]
    text = _MISSING.sub(_with_our_extra, "\n".join(lines))
    return re.sub(r"<class '([\w.]+)'>", r"\1", text).replace("typing.Literal", "one of ")


_NOISE = re.compile(
    r"^\s*((- )?Does not validate against|Subtypes:|Errors:|- Expected a <class 'NoneType'>"
    r"|Given value type:|Given value: (Namespace|NestedArg)\()"
)
_MISSING = re.compile(r"Requirement '(\w+)[^']*' not met\. HINT: Try running `[^`]*`")


def _with_our_extra(missing: re.Match[str]) -> str:
    """Lightning says how to install any version; this package's extra has one that goes with it."""
    package = missing[1]
    return f"{package} is missing: {how_to_install(package)}" if package in EXTRAS else missing[0]
