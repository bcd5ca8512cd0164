"""The screenshots of README: docs/pictures/report.png and search.png.

    python -m tools.make_screenshots demo-run ['a red heart']

Takes the root of a finished run; `make demo` makes one. Builds its search index and serves it for
the second picture. Needs the extra dev, and chromium or google-chrome on PATH.
"""

import io
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode

from PIL import Image
from playwright.sync_api import Page, sync_playwright

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
WIDTH = 1280  # pixels
HEIGHTS = {"report": 1550, "search": 800}  # pixels: down to the tree and the map; three rows
COLORS = 256
LARGEST = 300_000  # bytes of a picture
RATECLUSTER = [sys.executable, "-m", "pipeline"]


@contextmanager
def serve(root: str) -> Iterator[str]:
    """The URL of `ratecluster serve` on a free port."""
    subprocess.run([*RATECLUSTER, "index", "--root", root], check=True)
    command = [*RATECLUSTER, "serve", "--root", root, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        try:
            yield server.stdout.readline().split()[0]
        finally:
            server.terminate()


def save(page: Page, url: str, name: str, root: Path) -> None:
    """Save the top of a page as a PNG with a palette, which is a third of the size."""
    page.set_viewport_size({"width": WIDTH, "height": HEIGHTS[name]})
    page.goto(url)
    page.wait_for_timeout(1500)  # milliseconds: charts move into place
    page.get_by_text(str(root), exact=True).first.evaluate(f"e => e.textContent = '{root.name}'")
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    path = PICTURES / f"{name}.png"
    image.quantize(COLORS).save(path, optimize=True)
    size = path.stat().st_size
    print(f"{path}: {size:,} bytes")
    assert size <= LARGEST, f"{path} is larger than {LARGEST:,} bytes"


def main(root: str, query: str = "a red heart") -> None:
    """Make both pictures."""
    folder = Path(root).absolute()
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright, serve(root) as site:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        page = browser.new_page(color_scheme="light")
        save(page, (folder / "report" / "index.html").as_uri(), "report", folder)
        save(page, f"{site}text?{urlencode({'q': query})}", "search", folder)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
