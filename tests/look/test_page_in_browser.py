"""The page in a real browser: words light up their pixels, pixels rank their words, by mouse and by keys, offline."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from gobelin.attention import AttentionSite
from gobelin.look.heatmaps import HeatMaps
from gobelin.look.page import page
from gobelin.tokenizer import Tokenizer

ROWS, COLUMNS = 4, 6
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(params=[(1000, 800), (360, 720)], ids=["desk", "phone"])
def shown(request: pytest.FixtureRequest, browser: Browser, tmp_path: Path) -> Iterator[Page]:
    """A page for two steps of "a red ring": "red" is all in the left half, "ring" all in the right."""
    width, height = request.param
    tokenizer = Tokenizer.train(["a red ring"], vocab_size=530, max_length=8)
    words = tokenizer.words("a red ring")
    probs = torch.zeros(2, 1, ROWS, COLUMNS, 8)
    probs[..., 0] = 0.1
    probs[..., : COLUMNS // 2, list(words.tokens("red"))] = 0.9
    probs[0, ..., COLUMNS // 2 :, list(words.tokens("ring"))] = 0.5
    probs[1, ..., COLUMNS // 2 :, list(words.tokens("ring"))] = 0.7
    site = AttentionSite(name="up.attn2", kind="cross", downscale=1, heads=1)
    picture = Image.new("RGB", (8 * COLUMNS, 8 * ROWS), "white")
    maps = HeatMaps(words=words, maps={site: probs.flatten(2, 3)}, latent_size=(ROWS, COLUMNS), picture=picture)
    file = tmp_path / "look.html"
    file.write_text(page(maps), encoding="utf-8")
    context = browser.new_context(viewport={"width": width, "height": height}, offline=True)
    tab = context.new_page()
    errors: list[str] = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    tab.goto(file.as_uri())
    tab.wait_for_function("document.querySelectorAll('li').length === 3")
    yield tab
    context.close()
    assert not errors


def pixel(tab: Page, column: int, row: int) -> list[int]:
    """The canvas' colour in the middle of a patch."""
    where = [(column + 0.5) / COLUMNS, (row + 0.5) / ROWS]
    return tab.evaluate(
        """([x, y]) => {
            const canvas = document.querySelector("canvas"), context = canvas.getContext("2d");
            return [...context.getImageData(x * canvas.width, y * canvas.height, 1, 1).data].slice(0, 3);
        }""",
        where,
    )


def ranking(tab: Page) -> list[tuple[str, str]]:
    return [tuple(item.locator("span").all_inner_texts()) for item in tab.locator("li").all()]


def test_a_word_lights_up_what_it_painted(shown: Page) -> None:
    before = pixel(shown, 1, 1)
    assert before == [255, 255, 255]
    shown.get_by_role("button", name="red").hover()
    left, right = pixel(shown, 1, 1), pixel(shown, 4, 1)
    assert sum(left) > sum(right) + 100
    assert "up to 90 %" in shown.locator("figcaption").inner_text()
    shown.get_by_role("button", name="ring").hover()
    assert sum(pixel(shown, 4, 1)) > sum(pixel(shown, 1, 1)) + 100
    shown.locator("h2").hover()
    assert pixel(shown, 1, 1) == before


def test_a_patch_ranks_the_words_behind_it(shown: Page) -> None:
    canvas = shown.locator("canvas")
    box = canvas.bounding_box()
    assert box is not None
    canvas.hover(position={"x": box["width"] * 2.5 / 6, "y": box["height"] / 2})
    assert ranking(shown)[0] == ("red", "90 %")
    canvas.hover(position={"x": box["width"] * 3.5 / 6, "y": box["height"] / 2})
    assert ranking(shown)[0] == ("ring", "60 %")
    assert shown.locator("h2").inner_text() == "Words behind this patch"


def test_a_slider_goes_through_the_steps(shown: Page) -> None:
    canvas = shown.locator("canvas")
    canvas.press("ArrowRight")  # the middle patch, in the right half
    figures = {"0": "60 %", "1": "50 %", "2": "70 %"}
    for step, share in figures.items():
        shown.locator("input").fill(step)
        assert ranking(shown)[0] == ("ring", share)
    assert shown.locator("label span").inner_text() == "2 of 2"


def test_it_works_by_keys_and_says_what_it_shows(shown: Page) -> None:
    shown.keyboard.press("Tab")
    shown.keyboard.press("Tab")
    red = shown.get_by_role("button", name="red")
    assert red.get_attribute("aria-pressed") == "true"
    shown.locator("canvas").focus()
    shown.keyboard.press("ArrowLeft")
    assert shown.locator("figcaption").inner_text().startswith("row 3, column 4: ring 60 %")
    shown.keyboard.press("ArrowLeft")
    assert shown.locator("figcaption").inner_text().startswith("row 3, column 3: red 90 %")
    shown.keyboard.press("Escape")
    assert red.get_attribute("aria-pressed") == "false"
    assert shown.locator("h2").inner_text() == "Words, over the whole picture"


def test_it_fits_its_window(shown: Page) -> None:
    assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth")
