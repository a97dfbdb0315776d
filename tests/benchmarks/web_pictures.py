"""The documentation's pictures of the page: each page of the demo's index, on a desktop and on a phone.

    uv run probelog-index demo && uv run python -m tests.benchmarks.web_pictures --index probelog-demo/store

Needs Chromium. Light on a desktop, dark on a phone; WebP, some ten kilobytes each.
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

import probelog
from tests.support.paths import CHECKOUT
from tests.support.processes.web_server import page as served

PAGES = {
    "front": "/",
    "search": "/search?q=dog",
    "model": "/models/emberfield/heron-small",
    "use": "/use/emberfield/heron-small?logit=3",
    "tree": "/tree/brightwater/heron-v1",
    "index": "/index",
}
SIZES = {"desktop": ((1100, 760), "light"), "phone": ((360, 740), "dark")}
_LARGEST = 100_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--index", required=True, help="of the demo")
    parser.add_argument("--out", type=Path, default=CHECKOUT / "docs/images")
    given = parser.parse_args()
    with served(probelog.open_index(given.index)) as address, sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for size, ((width, height), scheme) in SIZES.items():
            context = chromium.new_context(
                base_url=address, viewport={"width": width, "height": height}, color_scheme=scheme
            )
            for name, path in PAGES.items():
                tab = context.new_page()
                tab.goto(path)
                tab.wait_for_load_state("networkidle")
                picture = Image.open(io.BytesIO(tab.screenshot())).convert("RGB")
                file = given.out / f"web-{name}-{size}.webp"
                picture.save(file, quality=75, method=6)
                assert file.stat().st_size < _LARGEST
                print(f"{file}: {file.stat().st_size:,} bytes")
        chromium.close()


if __name__ == "__main__":
    main()
