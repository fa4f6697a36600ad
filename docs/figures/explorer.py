"""Draw explorer.png: what the explorer begins with.

    python docs/figures/explorer.py

Needs Chromium, and the extra `browser`, which has playwright.
"""

import runpy
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

HERE = Path(__file__)


def main():
    explorer = runpy.run_path(str(HERE.parents[1] / "explorer" / "build.py"))
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = chromium.new_page(viewport={"width": 1280, "height": 800})
        address = "http://explorer.invalid/"
        page.route(address, lambda route: route.fulfill(body=explorer["page"]()))
        page.goto(address)
        page.screenshot(path=HERE.with_suffix(".png"))
        chromium.close()


if __name__ == "__main__":
    main()
