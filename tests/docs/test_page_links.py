"""No dead link in the README and the documentation."""

import re
from urllib.parse import urlsplit

import pytest
from markdown_pages import ROOT, Page, all_pages

PAGES = [*all_pages(), "CONTRIBUTING.md"]


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(name):
    page = Page(name)
    dead = {link: why for link in page.links if (why := why_dead(page, link))}
    assert not dead


def why_dead(page: Page, link: str) -> str:
    """What is wrong with a link; empty if nothing is."""
    if re.match(r"\w+:", link):
        parts = urlsplit(link)  # by its form only: the tests need no network
        is_address = parts.scheme == "https" and re.search(r"\.\w+$", parts.netloc)
        return "" if is_address else "this is no address"
    path, _, anchor = link.partition("#")
    target = (page.path.parent / path).resolve() if path else page.path
    if not target.exists() or not target.is_relative_to(ROOT):
        return "no such file"
    if anchor and anchor not in Page(str(target.relative_to(ROOT))).anchors:
        return "no such heading"
    return ""


def test_a_dead_link_is_found(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(
        "# Its *own* `name`\n\n[](#its-own-name) [b](#other) [c](gone.md) [d](http:x)\n"
    )
    for module in ("test_page_links", "markdown_pages"):
        monkeypatch.setattr(f"{module}.ROOT", tmp_path)
    reasons = [why_dead(Page(str(page)), link) for link in Page(str(page)).links]
    assert reasons == ["", "no such heading", "no such file", "this is no address"]
