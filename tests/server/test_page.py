"""The server's page in a real browser, on the model that ships: paint, touch words, look, change, and what may go wrong."""

import base64
import io
import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Locator, Page, Route, expect, sync_playwright

from gobelin.pipeline import Pipeline
from gobelin.server import ServerOptions, create_app

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROMPT = "a red circle left of a blue square"
VIEWS = ("paint", "change", "look", "compare", "how", "gallery")
DESK, PHONE = {"width": 1200, "height": 900}, {"width": 360, "height": 740}

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A server on a free port, in a thread."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app = create_app(Pipeline.from_pretrained(), ServerOptions())
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}/"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def context(browser: Browser, address: str) -> Iterator[BrowserContext]:
    made = browser.new_context(viewport=DESK, base_url=address, accept_downloads=True, reduced_motion="reduce")
    made.set_default_timeout(20_000)
    yield made
    made.close()


@pytest.fixture
def tab(context: BrowserContext) -> Iterator[Page]:
    """The page, in which no error of its own may come up."""
    opened = context.new_page()
    errors: list[str] = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    open_page(opened)
    yield opened
    assert not errors


def open_page(tab: Page, view: str = "paint") -> None:
    tab.goto(f"/#{view}")
    tab.locator("body[data-ready]").wait_for()


def paint(tab: Page, prompt: str = PROMPT, **settings: object) -> Locator:
    """Type a prompt, press Paint, and return the word map."""
    settings = {"steps": 6, "seed": 3, **settings}
    tab.locator("#settings summary").click()
    for name, value in settings.items():
        field = tab.locator(f"#setting-{name}")
        field.select_option(str(value)) if name == "sampler" else field.fill(str(value))
    tab.locator("#settings summary").click()
    tab.locator("#prompt").fill(prompt)
    tab.get_by_role("button", name="Paint", exact=True).click()
    shown = tab.locator("#paint-stage word-map")
    shown.locator("figcaption").get_by_text("Point at a word").wait_for()
    return shown


def shares(shown: Locator) -> np.ndarray:
    """What the page was given, as [words, rows, columns]: the mean of the steps."""
    data = shown.evaluate("(element) => element.data")
    levels = np.frombuffer(base64.b64decode(data["shares"]), np.uint8)
    levels = levels.reshape(data["steps"], len(data["words"]), data["rows"], data["columns"])
    return levels[0] / 255 * np.array(data["tops"])[:, None, None]


def words(shown: Locator) -> list[str]:
    return shown.evaluate("(element) => element.data.words")


def pixels(shown: Locator) -> np.ndarray:
    """The canvas of a word map."""
    url = shown.locator("canvas").evaluate("(canvas) => canvas.toDataURL()")
    return np.asarray(opened(url).convert("RGB"), dtype=float)


def opened(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def patches(image: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The mean of an image [H, W, C] over patches, and over its channels."""
    height, width, _ = image.shape
    image = image[: height // rows * rows, : width // columns * columns].mean(axis=-1)
    return image.reshape(rows, height // rows, columns, width // columns).mean(axis=(1, 3))


def test_a_prompt_is_painted_before_ones_eyes(tab: Page) -> None:
    seen: list[str] = []
    tab.expose_function("seen", seen.append)
    tab.evaluate(
        "new MutationObserver(() => seen(document.querySelector('.loom-line')?.textContent ?? ''))"
        ".observe(document.querySelector('#paint-stage'), {subtree: true, childList: true, characterData: true})"
    )
    shown = paint(tab)
    assert any(line.startswith("Step 6 of 6") for line in seen)
    assert words(shown) == PROMPT.split()
    assert tab.locator("#paint-stage .facts").first.inner_text().startswith("seed 3 · ddpm, 6 steps · guidance 3")
    settings = json.loads(downloaded(tab, tab.get_by_role("button", name="settings", exact=True)))
    assert (settings["prompt"], settings["seed"], settings["steps"]) == (PROMPT, 3, 6)
    picture = Image.open(io.BytesIO(downloaded(tab, tab.get_by_role("button", name="picture", exact=True))))
    assert picture.size == (64, 64)
    assert "a red circle" in picture.text["parameters"]


def downloaded(tab: Page, button: Locator) -> bytes:
    with tab.expect_download() as started:
        button.click()
    return Path(started.value.path()).read_bytes()


def test_a_word_lights_up_where_its_map_is_high(tab: Page) -> None:
    shown = paint(tab)
    before = pixels(shown)
    number = words(shown).index("circle")
    shown.get_by_role("button", name="circle", exact=True).hover()
    lit = pixels(shown)
    assert np.abs(lit - before).mean() > 5
    share = shares(shown)[number]
    values = (share - share.min()) / np.ptp(share)
    bright = patches(lit, *share.shape)
    assert bright[values > 0.6].mean() > bright[values < 0.1].mean() + 40
    assert np.corrcoef(bright.ravel(), values.ravel())[0, 1] > 0.7


def test_a_pixel_ranks_its_words(tab: Page) -> None:
    shown = paint(tab)
    all_shares = shares(shown)
    _, rows, columns = all_shares.shape
    row, column = divmod(int(all_shares[words(shown).index("square")].argmax()), columns)
    box = shown.locator("canvas").bounding_box()
    assert box is not None
    place = {"x": (column + 0.5) / columns * box["width"], "y": (row + 0.5) / rows * box["height"]}
    shown.locator("canvas").hover(position=place)
    first = words(shown)[int(all_shares[:, row, column].argmax())]
    expect(shown.locator("li span").first).to_have_text(first)


def test_pinned_words_are_shown_together(tab: Page) -> None:
    shown = paint(tab)
    plain = pixels(shown)
    for name in ("circle", "square"):
        shown.get_by_role("button", name=name, exact=True).click()
    legend = shown.get_by_role("group", name="Pinned words")
    assert legend.get_by_role("button").all_inner_texts() == ["circle", "square"]
    shown.locator("h3").hover()
    both = pixels(shown)
    orange, blue = np.array([0xE6, 0x9F, 0]), np.array([0x56, 0xB4, 0xE9])
    for name, colour in (("circle", orange), ("square", blue)):
        share = shares(shown)[words(shown).index(name)]
        row, column = divmod(int(share.argmax()), share.shape[1])
        side = both.shape[0] // share.shape[0]
        found = both[int((row + 0.5) * side), int((column + 0.5) * side)]
        assert np.abs(found - colour).mean() < 60
    legend.get_by_role("button", name="Unpin circle").click()
    tab.keyboard.press("Escape")
    assert np.array_equal(pixels(shown), plain)


def test_a_layer_and_a_head_are_chosen(tab: Page) -> None:
    shown = paint(tab)
    before = shares(shown)
    shown.get_by_role("button", name="red", exact=True).click()
    with tab.expect_response(re.compile("/maps/0")):
        shown.get_by_label("Layers").select_option(index=1)
    expect(shown.get_by_label("Head")).to_be_enabled()
    with tab.expect_response(re.compile("head=0")):
        shown.get_by_label("Head").select_option("0")
    expect(shown.get_by_role("button", name="Unpin red")).to_be_visible()  # what was lit stays lit
    assert not np.array_equal(shares(shown), before)
    shown.get_by_label("Layers").select_option("")
    tab.wait_for_timeout(50)
    assert np.array_equal(shares(shown), before)


def test_a_photo_and_its_caption_have_a_map(tab: Page, tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    image = Image.new("RGB", (90, 60), "#202020")
    image.paste("#d02020", (10, 15, 45, 50))
    image.save(photo)
    open_page(tab, "look")
    tab.locator("#look-file input").set_input_files(photo)
    tab.locator("#look-file img").wait_for()
    tab.locator("#caption").fill("a red square")
    tab.get_by_role("button", name="Look", exact=True).click()
    shown = tab.locator("#look-stage word-map")
    shown.get_by_role("button", name="red").hover()
    expect(shown.locator("figcaption")).to_contain_text("“red”: up to")
    assert shares(shown)[2].max() > 0


def test_a_painting_is_cancelled(tab: Page) -> None:
    tab.locator("#settings summary").click()
    tab.locator("#setting-steps").fill("150")
    tab.get_by_role("button", name="Paint", exact=True).click()
    tab.locator(".loom-line").get_by_text("Step").wait_for()
    with tab.expect_request(lambda request: request.method == "DELETE"):
        tab.get_by_role("button", name="Cancel").click()
    expect(tab.locator("#paint-form .line")).to_have_text("Cancelled.")
    expect(tab.get_by_role("button", name="Paint", exact=True)).to_be_visible()
    paint(tab)


def test_an_edit_stands_beside_its_picture(tab: Page) -> None:
    paint(tab, steps=8)
    tab.get_by_role("link", name="Change").click()
    tab.get_by_label("The same picture, but").fill(PROMPT.replace("red", "green"))
    tab.get_by_role("button", name="Change", exact=True).click()
    before, after = tab.locator("#change-result word-map").nth(0), tab.locator("#change-result word-map").nth(1)
    after.get_by_role("button", name="green").hover()
    expect(before.get_by_role("button", name="red")).to_have_attribute("aria-pressed", "true")  # the word it stands for
    expect(tab.locator("#change-result > .facts")).to_contain_text("% of the pixels changed")
    one, two = (np.asarray(opened(each.evaluate("(map) => map.data.image"))) for each in (before, after))
    assert 0 < (np.abs(one.astype(int) - two).max(axis=-1) > 16).mean() < 0.5


def sent(tab: Page, act: Callable[[], None]) -> dict[str, Any]:
    """The job that something asks the server for."""
    with tab.expect_request(lambda request: request.method == "POST" and request.url.endswith("/v1/jobs")) as asked:
        act()
    return asked.value.post_data_json


def test_a_word_is_given_a_place(tab: Page) -> None:
    paint(tab)
    tab.get_by_role("link", name="Change").click()
    tab.locator("label").filter(has_text="Places").click()
    tab.locator("#places-words label").filter(has_text="circle").click()
    board = tab.locator("#places-board canvas")
    board.scroll_into_view_if_needed()
    box = board.bounding_box()
    assert box is not None
    tab.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.5 * box["height"])
    tab.mouse.down()
    tab.mouse.move(box["x"] + box["width"] - 2, box["y"] + box["height"] - 2, steps=4)
    tab.mouse.up()
    expect(tab.locator("#places-list")).to_contain_text("50 % to 99 % across")
    body = sent(tab, tab.get_by_role("button", name="Change", exact=True).click)
    (control,) = body["controls"]
    assert control["kind"] == "regions"
    assert control["regions"]["circle"] == pytest.approx([0.5, 0.5, 1, 1], abs=0.02)
    assert body["settings"]["seed"] == 3
    expect(tab.locator("#change-result word-map")).to_have_count(2)


def test_a_word_weighs_more(tab: Page) -> None:
    paint(tab)
    tab.get_by_role("link", name="Change").click()
    tab.locator("label").filter(has_text="Weights").click()
    body = sent(tab, lambda: tab.locator("#weight-sliders").get_by_label("red").fill("2.5"))
    assert body["controls"] == [{"kind": "reweight", "words": {"red": 2.5}}]
    expect(tab.locator("#change-result word-map")).to_have_count(2)


def test_the_last_picture_is_there_after_a_reload(tab: Page) -> None:
    shown = paint(tab)
    before = shares(shown)
    expect_kept(tab, 1)
    tab.reload()
    tab.locator("body[data-ready]").wait_for()
    shown.get_by_role("button", name="circle", exact=True).hover()
    expect(shown.locator("figcaption")).to_contain_text("“circle”: up to")
    assert np.array_equal(shares(shown), before)
    assert tab.locator("#prompt").input_value() == PROMPT
    assert tab.locator("#setting-seed").input_value() == "3"
    tab.get_by_role("link", name="Gallery").click()
    tab.get_by_role("button", name=f"Delete {PROMPT}").click()
    expect(tab.locator("#gallery-empty")).to_be_visible()


def expect_kept(tab: Page, count: int) -> None:
    tab.wait_for_function(
        """async (count) => {
            const { promise, resolve } = Promise.withResolvers();
            indexedDB.open("gobelin").onsuccess = ({ target: { result } }) => {
                const asked = result.transaction("runs").objectStore("runs").count();
                asked.onsuccess = () => resolve(asked.result);
            };
            return (await promise) === count;
        }""",
        arg=count,
    )


def test_it_fits_a_phone(tab: Page) -> None:
    tab.set_viewport_size(PHONE)
    paint(tab, "a red circle and " + "a verylongwordthatnobodywouldeverwrite" * 4, steps=4)
    for view in VIEWS:
        tab.evaluate(f"location.hash = '{view}'")
        tab.locator(f"#{view}").wait_for()
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), view


def test_it_works_by_keys_alone(tab: Page) -> None:
    tab.locator("#prompt").focus()
    tab.keyboard.press("Control+a")
    tab.keyboard.type(PROMPT)
    tab.keyboard.press("Enter")
    shown = tab.locator("#paint-stage word-map")
    shown.locator("figcaption").get_by_text("Point at a word").wait_for()
    for _ in range(60):
        tab.keyboard.press("Tab")
        focused = tab.evaluate("document.activeElement.shadowRoot?.activeElement?.textContent ?? ''")
        if focused == "circle":
            break
    expect(shown.locator("figcaption")).to_contain_text("“circle”: up to")
    tab.keyboard.press("Enter")
    expect(shown.get_by_role("button", name="Unpin circle")).to_be_attached()
    shown.locator("canvas").focus()
    tab.keyboard.press("ArrowRight")
    expect(shown.locator("figcaption")).to_contain_text("row 9, column 9")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_read_it(tab: Page, scheme: str) -> None:
    tab.emulate_media(color_scheme=scheme)
    paint(tab, steps=4)
    for view in VIEWS:
        tab.evaluate(f"location.hash = '{view}'")
        tab.locator(f"#{view}").wait_for()
        found = Axe().run(tab)
        assert found.violations_count == 0, found.generate_report()


def test_a_busy_server_is_asked_again(tab: Page) -> None:
    refusals = iter([True])

    def refuse_once(route: Route) -> None:
        if next(refusals, False):
            error = {"message": "the queue is full", "type": "busy", "field": None}
            route.fulfill(status=429, headers={"Retry-After": "1"}, json={"error": error})
        else:
            route.continue_()

    tab.route("**/v1/jobs", refuse_once)
    tab.get_by_role("button", name="Paint", exact=True).click()
    expect(tab.locator(".loom-line")).to_have_text("Its queue is full. Trying again in 1 s")
    tab.locator("#paint-stage word-map").wait_for()


def test_a_server_that_went_away_comes_back(tab: Page) -> None:
    tab.route("**/v1/**", lambda route: route.abort())
    tab.get_by_role("button", name="Paint", exact=True).click()
    expect(tab.locator("#notice")).to_contain_text("The server does not answer. Trying again in")
    expect(tab.locator("#paint-form .line")).to_contain_text("The server does not answer")
    tab.unroute("**/v1/**")
    expect(tab.locator("#notice")).to_have_text("The server is back.")
    paint(tab, steps=4)


def test_a_wrong_setting_is_shown_at_its_field(tab: Page) -> None:
    tab.locator("#settings summary").click()
    tab.locator("#setting-steps").fill("100000")
    tab.get_by_role("button", name="Paint", exact=True).click()
    expect(tab.locator("#setting-steps")).to_have_attribute("aria-invalid", "true")
    expect(tab.locator("#setting-steps-problem")).to_contain_text("steps")
    assert tab.locator("#settings").get_attribute("open") is not None


def test_its_numbers_are_those_of_the_run(tab: Page) -> None:
    paint(tab)
    with tab.expect_response(re.compile("/explain")) as answered:
        tab.get_by_role("link", name="How it works").click()
    told = answered.value.json()
    expect(tab.locator("#how-total")).to_have_text("1.000")
    assert sum(told["softmax"]) == pytest.approx(1, abs=1e-3)
    scores = np.array(told["scores"])
    assert np.exp(scores) / np.exp(scores).sum() == pytest.approx(np.array(told["softmax"]), abs=1e-3)
    rows = tab.locator("#how-keys tr th").all_inner_texts()
    assert [row.lower() for row in rows if row.lower() in PROMPT.split()] == PROMPT.split()
    expect(tab.locator("details[data-code=softmax] summary")).to_contain_text("attention.py, line")
    tab.locator("#lens").press("ArrowLeft")
    expect(tab.locator("#lens-place")).to_contain_text("held")


@pytest.mark.parametrize(
    "prompt", ['<img src=x onerror="alert(1)"> & &lt;b>', "עיגול אדום, ריבוע", "a 🟥 and 👩\u200d🎨 café " * 30]
)
def test_any_prompt_is_shown_as_it_is(tab: Page, prompt: str) -> None:
    shown = paint(tab, prompt, steps=2)
    assert shown.locator("h2").evaluate("(element) => element.textContent").strip() == prompt.strip()
    assert shown.locator("img").count() == 0
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_nothing_jumps_while_it_paints(tab: Page) -> None:
    tab.evaluate(
        """() => {
            window.shift = 0;
            new PerformanceObserver((list) => {
                for (const entry of list.getEntries()) if (!entry.hadRecentInput) window.shift += entry.value;
            }).observe({ type: "layout-shift" });
        }"""
    )
    paint(tab, steps=25)
    tab.wait_for_timeout(300)
    assert tab.evaluate("window.shift") < 0.1


def test_a_picture_gives_its_settings_back(tab: Page, tmp_path: Path) -> None:
    paint(tab, negative_prompt="a star", guidance="2.5")
    file = tmp_path / "picture.png"
    file.write_bytes(downloaded(tab, tab.get_by_role("button", name="picture", exact=True)))
    tab.locator("#prompt").fill("something else")
    tab.locator("#settings summary").click()
    tab.locator("#read-settings").set_input_files(file)
    expect(tab.locator("#prompt")).to_have_value(PROMPT)
    expect(tab.locator("#setting-negative_prompt")).to_have_value("a star")
    expect(tab.locator("#setting-guidance")).to_have_value("2.5")


def test_puzzles_know_their_answers(tab: Page) -> None:
    paint(tab)
    tab.get_by_role("link", name="How it works").click()
    first, second, third = tab.locator(".puzzle").all()
    for each in (first, second):
        each.get_by_role("button").first.click()
        expect(each.locator(".answer")).to_contain_text(re.compile("Yes|No"))
    third.locator("canvas").click()
    expect(tab.locator(".score")).to_contain_text(re.compile("[0-3] of 3 right"))


@pytest.mark.slow
def test_only_what_is_covered_is_painted_anew(tab: Page) -> None:
    paint(tab, steps=12)
    tab.get_by_role("link", name="Change").click()
    tab.locator("label").filter(has_text="A part").click()
    tab.get_by_label("What to paint there").fill("a yellow star")
    board = tab.locator("#brush-board canvas")
    board.scroll_into_view_if_needed()
    box = board.bounding_box()
    assert box is not None
    tab.mouse.move(box["x"] + 0.1 * box["width"], box["y"] + 0.2 * box["height"])
    tab.mouse.down()
    tab.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 0.2 * box["height"], steps=5)
    tab.mouse.up()
    body = sent(tab, tab.get_by_role("button", name="Change", exact=True).click)
    mask = np.asarray(opened(body["settings"]["mask"]).convert("L"))
    assert mask.shape == (64, 64)
    assert mask[13, 16] == 255
    assert mask[50, 50] == 0
    maps = tab.locator("#change-result word-map")
    expect(maps).to_have_count(2)
    one, two = (np.asarray(opened(each.evaluate("(map) => map.data.image")).convert("RGB")) for each in maps.all())
    assert np.array_equal(one[mask < 128], two[mask < 128])
    assert not np.array_equal(one[mask >= 128], two[mask >= 128])


@pytest.mark.slow
def test_a_table_compares_seeds_and_values(tab: Page) -> None:
    open_page(tab, "compare")
    tab.locator("#compare-prompt").fill(PROMPT)
    tab.locator("#compare-setting").select_option("steps")
    tab.locator("#compare-values").fill("2, 4")
    tab.locator("#compare-seeds").fill("3")
    tab.get_by_role("button", name="Compare", exact=True).click()
    expect(tab.locator("#compare-table img")).to_have_count(6)
    tab.locator("#compare-table button").last.click()
    expect(tab.locator("#paint-stage .facts").first).to_contain_text("seed 3 · ddpm, 4 steps")


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["Words shuffled", "This layer silenced", "BOS removed"])
def test_a_broken_run_is_another_picture(tab: Page, broken: str) -> None:
    paint(tab, steps=12)
    tab.get_by_role("link", name="How it works").click()
    tab.locator("#break-form label").filter(has_text=broken).click()
    tab.get_by_role("button", name="Paint it broken").click()
    maps = tab.locator("#break-result word-map, #break-result img.plain")
    expect(maps).to_have_count(2)
    expect(tab.locator("#break-result .facts")).not_to_contain_text("0.0 %")
