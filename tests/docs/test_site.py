"""The site builds without a warning, needs no other host, has all public names, fits a phone."""

import re
import subprocess
import sys
from importlib import import_module

import pytest
from markdown_pages import ROOT

sys.path.append(str(ROOT / "scripts"))
from look_at_site import measure, pages_of

# What a browser fetches by itself; links that a reader may follow are not.
FETCHED = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"(?:https?:)?//|"
    r"<link\b(?![^>]*rel=\"(?:canonical|next|prev)\")[^>]*\bhref=\"(?:https?:)?//"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    directory = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", directory],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return directory


def test_it_needs_no_other_host(site):
    pages = pages_of(site)
    assert len(pages) > 10
    for page in pages:
        assert not FETCHED.search((site / page).read_text()), page
    for style in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//", style.read_text()), style


def test_every_public_name_has_its_reference(site):
    documented = set(re.findall(r'id="(moe_lightning\.[\w.]+)"', reference(site)))
    for module in ("", ".callbacks", ".metrics", ".tasks", ".errors"):
        home = import_module(f"moe_lightning{module}")
        names = getattr(home, "__all__", None) or [n for n in vars(home) if n.endswith("Error")]
        for name in names:
            thing = getattr(home, name)
            if hasattr(thing, "__qualname__"):
                assert f"{thing.__module__}.{thing.__qualname__}" in documented


def reference(site):
    return "".join(path.read_text() for path in (site / "reference").glob("*.html"))


def test_every_public_name_says_what_it_is(site):
    roles = re.findall(r":(?:class|func|meth|mod):`", reference(site))
    assert not roles, "cross-references are Markdown here"


def test_no_page_is_wider_than_a_phone(site):
    for found in measure(site, pages_of(site), 390):
        assert found["width"] == 390
        assert found["overflow"] == 0, found
        assert not found["wide"], found
        assert not found["broken"], found
        assert not found["unlabelled"], found
