"""Take pictures of the server's page in Chromium, with the model that ships: those of the docs, and more to look at.

python scripts/page_pictures.py docs/images            # page.png, how-it-works.png
python scripts/page_pictures.py /tmp/page --all        # each view, on a desk and on a phone, light and dark, and errors
"""

import argparse
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import uvicorn
from playwright.sync_api import Browser, Page, ViewportSize, sync_playwright

from gobelin.pipeline import Pipeline
from gobelin.server import create_app

PROMPT, LIT = "a red circle to the left of a blue star", "circle"
DESK, PHONE = ViewportSize(width=1200, height=900), ViewportSize(width=360, height=740)


@contextmanager
def serving() -> Iterator[str]:
    """Serve the model that ships, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(create_app(Pipeline.from_pretrained()), port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}/"
    server.should_exit = True
    thread.join()


def opened(
    browser: Browser, address: str, size: ViewportSize = DESK, scheme: Literal["light", "dark"] = "light"
) -> Page:
    """Open the page in a browser that remembers nothing."""
    tab = browser.new_context(viewport=size, color_scheme=scheme, base_url=address).new_page()
    tab.goto("/")
    tab.locator("body[data-ready]").wait_for()
    return tab


def paint(tab: Page) -> None:
    """Paint with seed 3, and light up a word."""
    tab.locator("#settings").evaluate("(fold) => { fold.open = true; }")
    tab.locator("#setting-seed").fill("3")
    tab.locator("#settings").evaluate("(fold) => { fold.open = false; }")
    tab.locator("#prompt").fill(PROMPT)
    tab.get_by_role("button", name="Paint", exact=True).click()
    shown = tab.locator("#paint-stage word-map")
    shown.locator("figcaption").get_by_text("Point at a word").wait_for()
    shown.get_by_role("button", name=LIT, exact=True).hover()
    tab.wait_for_timeout(600)


def how_it_works(tab: Page) -> None:
    """Open the view, and wait for its numbers."""
    tab.get_by_role("link", name="How it works").click()
    tab.locator("#how-shapes tr").first.wait_for()
    tab.wait_for_timeout(600)


def edited(tab: Page) -> None:
    """Change a word."""
    tab.get_by_role("link", name="Change").click()
    tab.get_by_label("The same picture, but").fill(PROMPT.replace("blue", "green"))
    tab.get_by_role("button", name="Change", exact=True).click()
    after = tab.locator("#change-result word-map").last
    after.get_by_role("button", name="green").hover()
    tab.wait_for_timeout(600)


def main(folder: Path, everything: bool) -> None:
    """Take the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with serving() as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = opened(browser, address)
        paint(tab)
        tab.screenshot(path=folder / "page.png")
        how_it_works(tab)
        tab.evaluate("scrollTo(0, document.querySelector('#how-keys').closest('article').offsetTop - 24)")
        tab.wait_for_timeout(300)
        tab.screenshot(path=folder / "how-it-works.png", clip={"x": 0, "y": 0, "width": 1200, "height": 760})
        if not everything:
            return
        tab.screenshot(path=folder / "how-it-works-all.png", full_page=True)
        edited(tab)
        tab.screenshot(path=folder / "editing.png", full_page=True)
        tab.get_by_role("link", name="Gallery").click()
        tab.wait_for_timeout(500)
        tab.screenshot(path=folder / "gallery.png")
        for name, tab in (
            ("phone", opened(browser, address, PHONE)),
            ("dark", opened(browser, address, scheme="dark")),
        ):
            paint(tab)
            tab.screenshot(path=folder / f"{name}.png", full_page=True)
            how_it_works(tab)
            tab.screenshot(path=folder / f"{name}-how-it-works.png", full_page=True)
        tab = opened(browser, address)
        tab.route("**/v1/**", lambda route: route.abort())
        tab.get_by_role("button", name="Paint", exact=True).click()
        tab.locator("#notice").wait_for()
        tab.screenshot(path=folder / "away.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("--all", action="store_true", help="each view, not only those of the docs")
    options = parser.parse_args()
    main(options.folder, options.all)
