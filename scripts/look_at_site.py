"""Pictures of the documentation site, as a phone and a desktop show it; see --help.

    python -m mkdocs build --strict && python scripts/look_at_site.py --to pictures

Needs Chromium: scripts/install_browser.sh.
"""

import argparse
import html
import json
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIETLY = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
# Of each frame: how much wider than its window it is, and by what; pictures that did not load.
MEASURE = """
const frames = [...document.querySelectorAll("iframe")];
const found = frames.map(frame => {
  const page = frame.contentDocument, root = page.documentElement;
  const scrolls = element => {
    for (let up = element; up && up !== page.body; up = up.parentElement)
      if (["auto", "scroll", "hidden"].includes(getComputedStyle(up).overflowX)) return true;
  };
  const wide = [...page.querySelectorAll(".md-content *")].filter(
    each => each.getBoundingClientRect().right > root.clientWidth + 1 && !scrolls(each));
  return {
    page: frame.dataset.page,
    width: root.clientWidth,
    overflow: root.scrollWidth - root.clientWidth,
    wide: wide.slice(0, 3).map(each => each.outerHTML.slice(0, 200)),
    broken: [...page.images].filter(each => !each.naturalWidth).map(each => each.src),
    unlabelled: [...page.querySelectorAll(".md-content img")].filter(each => !each.alt).length,
    headings: page.querySelectorAll("h1").length,
  };
});
const result = document.createElement("pre");
result.id = "measured";
result.textContent = JSON.stringify(found);
document.body.append(result);
"""


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served(directory: Path) -> Iterator[str]:
    """The address at which a directory is served, on this machine only."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=directory)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def browse(address: str, *options: str) -> str:
    """What a browser says about an address."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise FileNotFoundError("there is no browser: scripts/install_browser.sh")
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, *QUIETLY, f"--user-data-dir={profile}", *options, address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def measure(site: Path, pages: list[str], width: int) -> list[dict[str, object]]:
    """What pages are like at a width, all in one browser.

    Args:
        site: The built site.
        pages: Paths in it.
        width: In pixels. Frames are as narrow as a phone; windows cannot be.
    """
    frames = "".join(_frame(page, width, 900) for page in pages)
    harness = site / "measure.html"
    harness.write_text(
        f"<!doctype html><body>{frames}<script>addEventListener('load', () => "
        f"setTimeout(() => {{{MEASURE}}}, 1500))</script></body>"
    )
    try:
        with served(site) as address:
            dom = browse(f"{address}/measure.html", "--dump-dom", "--virtual-time-budget=20000")
    finally:
        harness.unlink()
    measured = re.search(r'<pre id="measured">(.*?)</pre>', dom, re.DOTALL)
    assert measured, "the pages were not there in time"
    return json.loads(html.unescape(measured[1]))


def _frame(page: str, width: int, height: int) -> str:
    source = html.escape(page)
    size = f'width="{width}" height="{height}" frameborder="0"'
    return f'<iframe data-page="{source}" src="{source}" {size}></iframe>'


def take_picture(site: Path, page: str, width: int, to: Path, *, height: int = 1600) -> None:
    """Write a picture of the top of a page, in a frame of a width."""
    harness = site / "picture.html"
    frame = _frame(page, width, height)
    harness.write_text(f'<!doctype html><body style="margin:0">{frame}</body>')
    try:
        with served(site) as address:
            size = f"--window-size={max(width, 500)},{height}"
            browse(
                f"{address}/picture.html", f"--screenshot={to}", size, "--virtual-time-budget=5000"
            )
    finally:
        harness.unlink()


def pages_of(site: Path) -> list[str]:
    """Paths of a built site's pages."""
    paths = (path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    return sorted(path for path in paths if path != "404.html")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--site", type=Path, default=ROOT / "build/site")
    parser.add_argument("--to", type=Path, default=ROOT / "build/pictures", help="a folder")
    parser.add_argument("--pages", nargs="*", help="such as index.html; the default is all")
    parser.add_argument("--widths", nargs="*", type=int, default=[390, 1280])
    parser.add_argument("--height", type=int, default=1600)
    options = parser.parse_args()
    options.to.mkdir(parents=True, exist_ok=True)
    pages = options.pages or pages_of(options.site)
    for width in options.widths:
        for found in measure(options.site, pages, width):
            if found["overflow"] or found["wide"] or found["broken"]:
                print(json.dumps(found, indent=1))
        for page in pages:
            name = page.removesuffix(".html").replace("/", "-")
            picture = options.to / f"{name}-{width}.png"
            take_picture(options.site, page, width, picture, height=options.height)
            print(picture)


if __name__ == "__main__":
    main()
