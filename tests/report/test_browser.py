"""The page in a real browser: `apt-get install chromium`, then `pytest -m browser`."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gqa_convert.report.writing import write_report
from tests.report.make_run import write_run

pytestmark = pytest.mark.browser
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTHS = (320, 390, 768, 1280)

# A page around the page, which measures it at every width once it is there.
PROBE = """<!doctype html><pre id="result"></pre><iframe id="page" src="report.html"></iframe>
<style>iframe{height:900px;border:0}</style>
<script>
page.onload = () => {
  const inner = page.contentDocument, seen = {};
  const style = page.contentWindow.getComputedStyle(inner.body);
  seen.colors = [style.backgroundColor, style.color];
  seen.requests = page.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name);
  seen.widths = WIDTHS.map(width => {
    page.style.width = width + "px";
    const box = inner.querySelector(".scroll"), root = inner.documentElement;
    box.scrollLeft = 150;
    const key = box.querySelector("tbody th").getBoundingClientRect();
    const drawn = [...inner.querySelectorAll("figure svg")].map(svg => svg.getBoundingClientRect().width);
    return {over: root.scrollWidth - root.clientWidth, moved: box.scrollLeft,
            key: key.left - box.getBoundingClientRect().left, share: key.width / box.clientWidth, drawn};
  });
  const table = inner.querySelector("table"), column = 3;
  const cells = () => [...table.tBodies[0].rows].map(row => row.cells[column].textContent.trim());
  const button = table.tHead.rows[0].cells[column].querySelector("button");
  seen.sorted = [0, 1].map(() => {
    button.click();
    return [button.parentElement.getAttribute("aria-sort"), cells()];
  });
  result.textContent = JSON.stringify(seen);
};
</script>"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("matplotlib", reason="the report extra is not installed")
    if BROWSER is None:
        pytest.skip("no chromium is installed")
    folder = write_run(tmp_path_factory.mktemp("run"))
    write_report(folder)
    (folder / "probe.html").write_text(PROBE.replace("WIDTHS", json.dumps(WIDTHS)))
    return folder


def look(run: Path, *flags: str) -> tuple[dict[str, Any], str]:
    """What the probe measured, and what the browser complained of."""
    command = [str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom", *flags]
    done = subprocess.run([*command, f"file://{run}/probe.html"], capture_output=True, text=True, timeout=120)
    (result,) = re.findall(r'<pre id="result">(.*?)</pre>', done.stdout)
    return json.loads(result.replace("&quot;", '"')), "\n".join(re.findall(r".*CONSOLE.*", done.stderr))


def test_it_fits_every_screen_and_asks_for_nothing(run: Path) -> None:
    seen, complaints = look(run)
    assert complaints == ""
    assert seen["requests"] == []
    for width, measured in zip(WIDTHS, seen["widths"], strict=True):
        assert measured["over"] <= 0, f"scrolls sideways at {width}"
        assert abs(measured["key"]) < 1, f"the key column is gone at {width}"
        assert measured["share"] < 0.45
        assert all(0.5 * min(width, 500) < drawn <= width for drawn in measured["drawn"])
    assert seen["widths"][0]["moved"] > 0, "the table scrolls by itself on a phone"


def test_a_heading_sorts_its_table_up_and_down(run: Path) -> None:
    (up, rising), (down, falling) = look(run)[0]["sorted"]
    assert (up, down) == ("ascending", "descending")
    numbers = [float(cell.split()[0]) for cell in rising if cell]
    assert len(set(numbers)) > 2
    assert numbers == sorted(numbers)
    assert [float(cell.split()[0]) for cell in falling if cell] == numbers[::-1]
    assert all(rising[: len(numbers)])
    assert all(falling[: len(numbers)])  # what has no figure stands last either way


def brightness(color: str) -> float:
    return sum(int(part) for part in re.findall(r"\d+", color)[:3]) / 3


def test_it_follows_the_reader_into_the_dark(run: Path) -> None:
    (paper, ink), (dark_paper, dark_ink) = look(run)[0]["colors"], look(run, "--force-dark-mode")[0]["colors"]
    assert brightness(paper) > 200 > 80 > brightness(ink)
    assert brightness(dark_paper) < 50 < 180 < brightness(dark_ink)
