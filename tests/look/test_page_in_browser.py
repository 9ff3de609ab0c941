"""The page in a real browser: words light up their pixels, pixels rank their words, by mouse and by keys, offline."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, sync_playwright

from gobelin.attention import AttentionSite
from gobelin.look.heatmaps import HeatMaps
from gobelin.look.page import word_map_element, word_map_page
from gobelin.tokenizer import Tokenizer
from gobelin.words import list_words

ROWS, COLUMNS = 4, 6
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def word_maps(prompt: str = "a red ring") -> HeatMaps:
    """Two steps of "a red ring": "red" is all in the left half, "ring" all in the right."""
    tokenizer = Tokenizer.train(["a red ring"], vocab_size=530, max_length=60)
    words = tokenizer.words(prompt)
    probs = torch.zeros(2, 1, ROWS, COLUMNS, 60)
    probs[..., 0] = 0.1
    if prompt == "a red ring":
        probs[..., : COLUMNS // 2, list(words.tokens("red"))] = 0.9
        probs[0, ..., COLUMNS // 2 :, list(words.tokens("ring"))] = 0.5
        probs[1, ..., COLUMNS // 2 :, list(words.tokens("ring"))] = 0.7
    site = AttentionSite(name="up.attn2", kind="cross", downscale=1, heads=1)
    picture = Image.new("RGB", (8 * COLUMNS, 8 * ROWS), "white")
    return HeatMaps(words=words, maps={site: probs.flatten(2, 3)}, latent_size=(ROWS, COLUMNS), image=picture)


DESK, PHONE = pytest.param((1000, 800), id="desk"), pytest.param((360, 720), id="phone")


@pytest.fixture(params=[DESK, PHONE])
def tab(request: pytest.FixtureRequest, browser: Browser) -> Iterator[Page]:
    """A tab without a network, in which no error may come up."""
    width, height = request.param
    context = browser.new_context(viewport={"width": width, "height": height}, offline=True)
    tab = context.new_page()
    errors: list[str] = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    yield tab
    context.close()
    assert not errors


on_a_desk = pytest.mark.parametrize("tab", [DESK], indirect=True)  # where the width is of no matter


@pytest.fixture
def shown(tab: Page, tmp_path: Path) -> Page:
    """The page of "a red ring"."""
    return opened(tab, tmp_path, word_map_page(word_maps()))


def opened(tab: Page, folder: Path, page: str) -> Page:
    file = folder / "look.html"
    file.write_text(page, encoding="utf-8")
    tab.goto(file.as_uri())
    tab.locator("figcaption").first.get_by_text("Point at a word").wait_for()
    return tab


def pixel(tab: Page, column: int, row: int) -> list[int]:
    """The canvas' colour in the middle of a patch."""
    where = [(column + 0.5) / COLUMNS, (row + 0.5) / ROWS]
    return tab.evaluate(
        """([x, y]) => {
            const canvas = document.querySelector("word-map").shadowRoot.querySelector("canvas");
            const context = canvas.getContext("2d");
            return [...context.getImageData(x * canvas.width, y * canvas.height, 1, 1).data].slice(0, 3);
        }""",
        where,
    )


@on_a_desk
def test_words_beside_light_up_and_those_of_no_rank_are_not_listed(tab: Page, tmp_path: Path) -> None:
    maps = word_maps()
    also = replace(maps, words=list_words(["a dog"], [1]))  # whose share is that of BOS: 10 % everywhere
    negative = word_maps()
    page = opened(
        tab, tmp_path, word_map_page(replace(maps, also_traced=also, negative_traced=negative), parts=["bos"])
    )
    assert "looked for beside it" in page.locator("h2").inner_text()
    page.get_by_role("button", name="a dog").hover()
    assert "“a dog”: up to 10 %" in page.locator("figcaption").inner_text()
    assert sorted(word for word, *_ in ranking(page)) == ["a", "a dog", "red", "ring"]
    page.get_by_role("button", name="red").last.hover()  # the negative prompt's
    assert sum(pixel(page, 1, 1)) > sum(pixel(page, 4, 1)) + 100


def ranking(tab: Page | Locator) -> list[tuple[str, str]]:
    return [tuple(item.locator("span").all_inner_texts()) for item in tab.locator("li").all()]


def test_a_word_lights_up_what_it_painted(shown: Page) -> None:
    before = pixel(shown, 1, 1)
    assert before == [255, 255, 255]
    shown.get_by_role("button", name="red").hover()
    left, right = pixel(shown, 1, 1), pixel(shown, 4, 1)
    assert sum(left) > sum(right) + 100
    assert "up to 90 %" in shown.locator("figcaption").inner_text()
    assert shown.locator(".scale").inner_text().split("\n") == ["0.0 %", "90 %"]
    shown.get_by_role("button", name="ring").hover()
    assert sum(pixel(shown, 4, 1)) > sum(pixel(shown, 1, 1)) + 100
    shown.locator("h3").hover()
    assert pixel(shown, 1, 1) == before


def test_a_patch_ranks_the_words_behind_it(shown: Page) -> None:
    canvas = shown.locator("canvas")
    box = canvas.bounding_box()
    assert box is not None
    canvas.hover(position={"x": box["width"] * 2.5 / 6, "y": box["height"] / 2})
    assert ranking(shown)[0] == ("red", "90 %")
    canvas.hover(position={"x": box["width"] * 3.5 / 6, "y": box["height"] / 2})
    assert ranking(shown)[0] == ("ring", "60 %")
    assert shown.locator("h3").inner_text() == "Words behind this patch"


@on_a_desk
def test_a_slider_goes_through_the_steps(shown: Page) -> None:
    canvas = shown.locator("canvas")
    canvas.press("ArrowRight")  # the middle patch, in the right half
    figures = {"0": "60 %", "1": "50 %", "2": "70 %"}
    for step, share in figures.items():
        shown.locator("input").fill(step)
        assert ranking(shown)[0] == ("ring", share)
    assert shown.locator("label span").inner_text() == "2 of 2"


@on_a_desk
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
    for _ in range(9):
        shown.locator("canvas").press("ArrowLeft")
    assert shown.locator("figcaption").inner_text().startswith("row 3, column 1: ")
    shown.keyboard.press("ArrowUp")
    assert shown.locator("figcaption").inner_text().startswith("row 2, column 1: ")
    shown.keyboard.press("Escape")
    assert red.get_attribute("aria-pressed") == "false"
    assert shown.locator("h3").inner_text() == "Words, over the whole image"


def test_it_fits_its_window(shown: Page) -> None:
    assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_several_maps_on_one_page_keep_apart(tab: Page, tmp_path: Path) -> None:
    two = word_map_element(word_maps()) + word_map_element(word_maps())
    opened(tab, tmp_path, f"<!doctype html><meta charset=utf-8>{two}")
    first, second = tab.locator("word-map").all()
    first.get_by_role("button", name="red").hover()
    assert "up to 90 %" in first.locator("figcaption").inner_text()
    assert "Point at a word" in second.locator("figcaption").inner_text()
    second.locator("canvas").press("ArrowRight")
    assert second.locator("h3").inner_text() == "Words behind this patch"
    assert first.locator("h3").inner_text() == "Words, over the whole image"
    tab.keyboard.press("Escape")
    assert [one.locator("h3").inner_text() for one in (first, second)] == ["Words, over the whole image"] * 2


@on_a_desk
def test_a_notebook_can_show_it_again_and_again(tab: Page, tmp_path: Path) -> None:
    opened(tab, tmp_path, word_map_page(word_maps()))
    # As JupyterLab does: the markup is set, then each script is replaced by a copy, which runs.
    tab.evaluate(
        """(markup) => {
            const cell = document.createElement("div");
            cell.innerHTML = markup;
            document.body.append(cell);
            for (const script of cell.querySelectorAll("script")) {
                const copy = document.createElement("script");
                copy.type = script.type;
                copy.textContent = script.textContent;
                script.replaceWith(copy);
            }
        }""",
        word_map_element(word_maps()),
    )
    first, second = tab.locator("word-map").all()
    second.get_by_role("button", name="ring").focus()
    assert "“ring”: up to" in second.locator("figcaption").inner_text()
    second.evaluate("(element) => element.remove()")
    tab.keyboard.press("Escape")
    assert first.locator("li").count() == 3


@on_a_desk
def test_data_can_be_given_and_changed(shown: Page) -> None:
    shown.evaluate(
        """() => {
            const [given] = document.querySelectorAll("word-map");
            const later = document.createElement("word-map");
            later.data = { ...given.data, words: ["a", "blue", "ring"], text: [["blue", 1], [" ring", null]] };
            document.body.append(later);
        }"""
    )
    later = shown.locator("word-map").nth(1)
    assert later.get_by_role("button").all_inner_texts() == ["blue"]
    assert "blue" in [name for name, _ in ranking(later)]
    later.evaluate("(element) => { element.data = { ...element.data, steps: 1 }; }")
    assert later.locator("input").is_hidden()


@pytest.mark.parametrize(
    "prompt",
    [
        "</script><img src=x onerror=alert(1)> red",
        '<!--<script> & &lt;b> say "$data" `${alert(1)}` red',
        "עיגול אדום, ריבוע",
        "a 🟥 and 👩\u200d🎨 café",
    ],
)
def test_any_prompt_is_shown_as_it_is(tab: Page, tmp_path: Path, prompt: str) -> None:
    opened(tab, tmp_path, word_map_page(word_maps(prompt)))
    assert tab.locator("h2").evaluate("(element) => element.textContent") == prompt
    assert tab.title().split() == prompt.split()
    assert tab.locator("img").count() == 0
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    leftward = tab.locator("h2").evaluate("(element) => getComputedStyle(element).direction") == "rtl"
    assert leftward == prompt.startswith("ע")
