"""The report of a run: what it says, what it is safe from, and how a browser shows it."""

import html
import json
import re
import shutil
import subprocess

import pytest
from runs import make_run

from moe_lightning.errors import UsageError
from moe_lightning.reports import write_report

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
)
# Added to a copy of the page, whose own policy allows no scripts.
MEASURE = """<script>
addEventListener("load", () => {
  const root = document.documentElement;
  const found = {
    overflow: root.scrollWidth - root.clientWidth,
    width: innerWidth,
    headings: [...document.querySelectorAll("h1, h2")].map(each => each.textContent),
    images: [...document.images].map(each => each.complete && each.naturalWidth > 100),
    unlabelled: [...document.images].filter(each => !each.alt).length,
    hidden: [...document.querySelectorAll("li")].filter(each => !each.offsetHeight).length,
  };
  const result = parent.document.createElement("pre");
  result.id = "measured";
  result.textContent = JSON.stringify(found);
  parent.document.body.append(result);
});
</script>"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    directory = tmp_path_factory.mktemp("small")
    make_run(directory, num_layers=4, num_experts=16, num_slots=2)
    return directory


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    directory = tmp_path_factory.mktemp("large")
    make_run(directory, num_layers=60, num_experts=256, num_slots=16)
    return directory


def text_of(page):
    return re.sub(
        r"\s+", " ", re.sub(r"<style>.*?</style>|<[^>]+>", " ", page.read_text(), flags=re.S)
    )


def test_it_says_what_happened(small):
    text = text_of(write_report(small))
    assert "998 of 1,000 rows answered in 1 min 40 s, 1,050 tokens/s. 2 could not be" in text
    assert "MoE layers took 41.0 % of the time" in text
    assert "Most waited for: 1:cuda:1, 3.3 s (61.0 % of all waiting)." in text
    assert "2 x NVIDIA H100 80GB HBM3" in text
    assert "333.33 MB/s" in text, "achieved on the link"


def test_it_needs_nothing_else_and_runs_nothing(small):
    page = write_report(small).read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "default-src 'none'" in page
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_all_layers_of_a_large_model_are_there(large):
    page = write_report(large)
    assert text_of(page).count("All 60 layers") == 2
    assert page.stat().st_size < 3e6


@pytest.mark.parametrize("kept", ["run.json", "routing_balance.json", "communication_time.json"])
def test_what_is_missing_says_how_to_get_it(kept, small, tmp_path):
    shutil.copy(small / kept, tmp_path)
    text = text_of(write_report(tmp_path))
    for file, callback in {
        "run.json": "Throughput",
        "routing_balance.json": "RoutingBalance",
        "communication_time.json": "CommunicationTime",
    }.items():
        assert (f"give the callback {callback}" in text) == (file != kept)


def test_a_run_that_failed_is_said_to_have(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"exit_reason": "interrupted"}))
    assert "The run did not finish: interrupted." in text_of(write_report(tmp_path))


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no run has written"):
        write_report(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UsageError, match=r"run\.json: cannot be read"):
        write_report(tmp_path)


def browse(page, *options):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert browser, "no browser to test the report with: scripts/install_browser.sh"
    profile = page.with_name("profile")
    done = subprocess.run(
        [browser, *QUIETLY, f"--user-data-dir={profile}", *options, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("size", ["small", "large"])
def test_a_browser_shows_it(size, width, request, tmp_path):
    page = write_report(request.getfixturevalue(size))
    copy = tmp_path / "copy.html"
    text = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text())
    text = html.escape(text.replace("</body>", f"{MEASURE}</body>"))
    # In a frame, since a window cannot be as narrow as a phone.
    copy.write_text(f'<iframe width="{width}" height="900" frameborder="0" srcdoc="{text}">')
    dom = browse(copy, "--dump-dom", "--window-size=1400,1000")
    found = json.loads(re.search(r'<pre id="measured">(.*?)</pre>', dom)[1])
    assert found["width"] == width
    assert found["overflow"] == 0, "nothing is wider than the window"
    assert found["headings"][1:] == ["Throughput", "Routing", "Communication", "How it was run"]
    assert found["images"] == [True]
    assert found["unlabelled"] == found["hidden"] == 0


def test_its_own_policy_lets_pictures_through(small, tmp_path):
    picture = tmp_path / "page.png"
    browse(write_report(small), f"--screenshot={picture}", "--window-size=800,1600")
    from matplotlib.image import imread

    pixels = imread(picture)[..., :3]
    # The heat map's deep blue and red are in it.
    assert ((pixels[..., 2] > 0.35) & (pixels[..., 0] < 0.1)).mean() > 0.003
