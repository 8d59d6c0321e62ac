"""Every message that the page quotes is still one of the package's."""

import ast
import re
from functools import cache

import pytest
from markdown_pages import ROOT

PAGE = ROOT / "docs/troubleshooting.md"
QUOTES = re.findall(r"\*\*`([^`]+)`\*\*", PAGE.read_text())
GAP = "…"


@cache
def texts() -> list[str]:
    """All strings of the package, a gap in place of what is filled in."""
    found = []
    for path in (ROOT / "moe_lightning").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else GAP for p in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return [" ".join(text.split()) for text in found]


def literal(quote: str) -> str:
    """The longest part of a quoted message that does not differ from case to case."""
    return max((part.strip() for part in quote.split(GAP)), key=len)


@pytest.mark.parametrize("quote", QUOTES)
def test_the_message_is_in_the_package(quote):
    part = literal(quote)
    assert len(part) >= 11, "too little to know it by"
    assert any(part in text for text in texts()), f"no message says {part!r}"


def test_the_page_has_all_kinds():
    assert len(QUOTES) == len(set(QUOTES)) > 60


def test_a_message_that_is_gone_is_seen():
    assert literal("…: the disk was full. Make … room") == ": the disk was full. Make"
    assert not any(literal("…: the disk was full. Make … room") in text for text in texts())
