"""The page of a reproduction in a real browser, headless Chromium."""

import html
import json
import os
import pathlib
import re
import shutil
import subprocess
from typing import Any

import pytest

from bsce_jax.report import page
from tests import example_page

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)} is on the PATH"
)

# Looks at the page in a frame of a given width, and writes what it sees as JSON. The
# page's own policy allows no script, so that all of this runs outside of it.
MEASURE = """
const frame = document.querySelector("iframe");
frame.onload = () => {
  const page = frame.contentDocument, root = page.documentElement;
  const images = [...page.images], seen = [];
  const overflow = () => root.scrollWidth - root.clientWidth;
  const before = overflow();
  for (const button of page.querySelectorAll("td button")) {
    button.click();
    const popover = page.getElementById(button.getAttribute("popovertarget"));
    const box = popover.getBoundingClientRect();
    const close = popover.querySelector(".close");
    const shown = popover.matches(":popover-open");
    const inside = box.left >= 0 && box.right <= root.clientWidth;
    const wide = popover.scrollWidth > popover.clientWidth;
    close.click();
    seen.push(shown && inside && !wide && !popover.matches(":popover-open"));
  }
  const visible = element => element.getBoundingClientRect().height > 20;
  document.querySelector("pre").textContent = JSON.stringify({
    width: root.clientWidth,
    overflow: [before, overflow()],
    tables: [...page.querySelectorAll("section table")].filter(visible).length,
    images: images.length,
    broken: images.filter(i => !i.complete || !i.naturalWidth || !visible(i)).length,
    requests: frame.contentWindow.performance.getEntriesByType("resource").length,
    font: parseFloat(frame.contentWindow.getComputedStyle(page.body).fontSize),
    popovers: seen,
  });
};
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Folder of a made-up reproduction and its page."""
    folder = tmp_path_factory.mktemp("reproduction")
    example_page.write_example(folder, example_page.REDUCED)
    page.write(folder)
    return folder


def browse(
    folder: pathlib.Path, file: pathlib.Path, *options: str
) -> subprocess.CompletedProcess[str]:
    """Opens a file without a network, with a profile and a home of its own."""
    assert BROWSER
    home = folder / "home"
    home.mkdir(exist_ok=True)
    return subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",  # root, in a container, has none
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            "--no-first-run",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            "--enable-logging=stderr",
            f"--user-data-dir={home / 'profile'}",
            *options,
            file.as_uri(),
        ],
        env={**os.environ, "HOME": str(home), "XDG_CONFIG_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


def console(stderr: str) -> list[str]:
    """What a page wrote on the browser's console: errors, refusals by its policy."""
    return [line for line in stderr.splitlines() if "CONSOLE" in line]


def measure(folder: pathlib.Path, width: int) -> dict[str, Any]:
    text = (folder / "report.html").read_text(encoding="utf-8")
    frame = f'<iframe width="{width}" height="800" srcdoc="{html.escape(text)}">'
    outside = folder / "outside.html"
    outside.write_text(
        f"<!DOCTYPE html><meta charset=utf-8><title>{width}</title>"
        f"<style>iframe {{ border: 0 }}</style>{frame}</iframe><pre></pre>"
        f"<script>{MEASURE}</script>",
        encoding="utf-8",
    )
    window = f"--window-size={width + 100},900"
    done = browse(folder, outside, "--dump-dom", window)
    assert console(done.stderr) == []
    written = re.search("<pre>(.+)</pre>", done.stdout)
    assert written, "the page did not load"
    return json.loads(html.unescape(written[1]))


@pytest.mark.parametrize("width", [375, 1280])
def test_tables_pictures_and_cells(folder: pathlib.Path, width: int) -> None:
    seen = measure(folder, width)
    assert seen["width"] == width
    assert seen["overflow"] == [0, 0]  # tables scroll in their own boxes
    assert seen["tables"] == 5  # Tables 1 and 5, Figures 4 and 5, the runs
    assert (seen["images"], seen["broken"]) == (13, 0)
    assert seen["requests"] == 0
    assert seen["font"] >= 16
    given = json.loads((folder / "manifest.json").read_text())["cells"]
    run = sum(bool(cell["runs"]) for cell in given)
    assert len(seen["popovers"]) == run and all(seen["popovers"])


def test_the_page_alone_has_no_errors_and_looks_like_one(folder: pathlib.Path) -> None:
    shot = folder / "page.png"
    options = (f"--screenshot={shot}", "--window-size=1280,1600")
    done = browse(folder, folder / "report.html", *options)
    assert console(done.stderr) == []
    from PIL import Image

    with Image.open(shot) as image:
        colours = image.convert("RGB").getcolors(1 << 24)
        assert image.size == (1280, 1600)
    assert (folder / "report.html").stat().st_size < 3e6
    assert len(colours) > 100  # text, tables and a warning, no blank page
    assert max(colours)[1] == (253, 253, 252)  # on the light scheme's ground


def test_print_has_the_tables_and_no_popovers(folder: pathlib.Path) -> None:
    if not shutil.which("pdftotext"):
        pytest.skip("no pdftotext on the PATH")
    printed = folder / "page.pdf"
    browse(folder, folder / "report.html", f"--print-to-pdf={printed}")
    words = subprocess.run(
        ["pdftotext", "-bbox", printed, "-"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    page_width = float(re.findall('<page width="([0-9.]+)"', words)[0])
    assert max(map(float, re.findall('xMax="([0-9.]+)"', words))) < page_width - 20
    text = " ".join(html.unescape(word) for word in re.findall(">(.+)</word>", words))
    for part in ("Not comparable with the paper", "Table 1", "Figure 5", "ImageNet"):
        assert part in text
    assert "PODNet w/" in text and "68.65" in text  # the last cell of Table 1
    assert "Close" not in text and "--workdir" not in text and "Select a" not in text
