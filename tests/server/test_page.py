"""The page of the server in a real browser, with the model that ships: paint, touch words, look, change, fail."""

import base64
import io
import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright

import gobelin
from gobelin.pipeline import Pipeline
from gobelin.server import ServerOptions, create_app
from gobelin.server.code_excerpts import code_excerpts

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROMPT = "a red circle left of a blue square"
VIEWS = ("paint", "change", "look", "compare", "how", "gallery")
DESK, PHONE = {"width": 1200, "height": 900}, {"width": 360, "height": 740}

expect.set_options(timeout=20_000)

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


@contextmanager
def opened_page(browser: Browser, address: str, state: Any = None) -> Iterator[Page]:
    """Open the page in a browser that remembers nothing, or a ``state``.

    No error may come up, and nothing be asked for that is not the server's.
    """
    context = browser.new_context(viewport=DESK, base_url=address, reduced_motion="reduce", storage_state=state)
    context.set_default_timeout(20_000)
    tab = context.new_page()
    errors: list[str] = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("console", lambda line: errors.append(line.text) if "Content Security Policy" in line.text else None)
    tab.on(
        "request", lambda asked: None if asked.url.startswith((address, "data:", "blob:")) else errors.append(asked.url)
    )
    open_view(tab)
    yield tab
    context.close()
    assert not errors


@pytest.fixture
def tab(browser: Browser, address: str) -> Iterator[Page]:
    """The page as somebody sees it who comes for the first time."""
    with opened_page(browser, address) as tab:
        yield tab


@pytest.fixture(scope="module")
def remembered(browser: Browser, address: str) -> Any:
    """What a browser remembers that painted one picture."""
    with opened_page(browser, address) as tab:
        paint(tab)
        expect_kept(tab, 1)
        return tab.context.storage_state(indexed_db=True)


@pytest.fixture
def painted(browser: Browser, address: str, remembered: Any) -> Iterator[Page]:
    """The page with a picture, which the server still knows."""
    with opened_page(browser, address, remembered) as tab:
        word_map(tab)
        yield tab


def open_view(tab: Page, view: str = "paint") -> None:
    tab.goto("/" if view == "paint" else f"/#{view}")
    tab.locator("body[data-ready]").wait_for()


def fill_in(tab: Page, prompt: str = PROMPT, **settings: object) -> Locator:
    """Fill in the form, and return its button."""
    tab.locator("#settings").evaluate("(fold) => { fold.open = true; }")
    for name, value in {"steps": 4, "seed": 3, **settings}.items():
        tab.locator(f"#setting-{name}").fill(str(value))
    tab.locator("#settings").evaluate("(fold) => { fold.open = false; }")
    tab.locator("#prompt").fill(prompt)
    return tab.get_by_role("button", name="Paint", exact=True)


def paint(tab: Page, prompt: str = PROMPT, **settings: object) -> Locator:
    """Paint, and return the word map."""
    fill_in(tab, prompt, **settings).click()
    return word_map(tab)


def word_map(tab: Page) -> Locator:
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


def record_progress(tab: Page, view: str) -> None:
    """Have the page record what it says while a job goes on, with the number of small pictures, in ``window.seen``."""
    tab.evaluate(
        """(view) => {
            window.seen = [];
            const line = document.querySelector(`#${view}-stage .loom-line`);
            const look = () => seen.push([line.textContent, document.querySelectorAll(".frames img").length]);
            new MutationObserver(look).observe(line, { childList: true });
        }""",
        view,
    )


def test_a_prompt_is_painted_before_ones_eyes(tab: Page) -> None:
    record_progress(tab, "paint")
    shown = paint(tab, steps=6)
    seen = tab.evaluate("window.seen")
    assert [line for line, _ in seen if line.startswith("Step 6 of 6")]
    assert max(frames for _, frames in seen) > 0  # there were previews
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


def test_a_word_lights_up_where_its_map_is_high(painted: Page) -> None:
    shown = word_map(painted)
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


def test_a_pixel_ranks_its_words(painted: Page) -> None:
    shown = word_map(painted)
    all_shares = shares(shown)
    _, rows, columns = all_shares.shape
    row, column = divmod(int(all_shares[words(shown).index("square")].argmax()), columns)
    box = shown.locator("canvas").bounding_box()
    assert box is not None
    place = {"x": (column + 0.5) / columns * box["width"], "y": (row + 0.5) / rows * box["height"]}
    shown.locator("canvas").hover(position=place)
    first = words(shown)[int(all_shares[:, row, column].argmax())]
    expect(shown.locator("li span").first).to_have_text(first)


def test_pinned_words_are_shown_together(painted: Page) -> None:
    shown = word_map(painted)
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
    painted.keyboard.press("Escape")
    assert np.array_equal(pixels(shown), plain)


def test_a_layer_and_a_head_are_chosen(painted: Page) -> None:
    shown = word_map(painted)
    before = shares(shown)
    shown.get_by_role("button", name="red", exact=True).click()
    with painted.expect_response(re.compile("/maps/0")):
        shown.get_by_label("Layers").select_option(index=1)
    expect(shown.get_by_label("Head")).to_be_enabled()
    with painted.expect_response(re.compile("head=0")):
        shown.get_by_label("Head").select_option("0")
    expect(shown.get_by_role("button", name="Unpin red")).to_be_visible()  # what was lit stays lit
    assert not np.array_equal(shares(shown), before)
    shown.get_by_label("Layers").select_option("")
    painted.wait_for_timeout(50)
    assert np.array_equal(shares(shown), before)


def test_a_photo_and_its_caption_have_a_map(tab: Page, tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    image = Image.new("RGB", (90, 60), "#202020")
    image.paste("#d02020", (10, 15, 45, 50))
    image.save(photo)
    open_view(tab, "look")
    tab.locator("#look-file input").set_input_files(photo)
    tab.locator("#look-file img").wait_for()
    tab.locator("#caption").fill("a red square")
    record_progress(tab, "look")
    tab.get_by_role("button", name="Look", exact=True).click()
    shown = tab.locator("#look-stage word-map")
    shown.get_by_role("button", name="red").hover()
    said = [line for line, _ in tab.evaluate("window.seen")]
    assert "At noise level 20 of 999: 1 of 1" in said
    assert not [line for line in said if line.startswith(("Step", "From noise"))]  # nothing is painted
    expect(shown.locator("figcaption")).to_contain_text("“red”: up to")
    expect(shown.locator(".note")).to_contain_text("On pictures of another kind")


def test_a_painting_is_cancelled(tab: Page) -> None:
    fill_in(tab, steps=150).click()
    tab.locator("#paint-stage .loom-line").get_by_text("Step").wait_for()
    with tab.expect_request(lambda request: request.method == "DELETE"):
        tab.get_by_role("button", name="Cancel").click()
    expect(tab.locator("#paint-form .line")).to_have_text("Cancelled.")
    paint(tab, steps=1)


def test_an_edit_stands_beside_its_picture(painted: Page) -> None:
    painted.get_by_role("link", name="Change").click()
    painted.get_by_label("The same picture, but").fill(PROMPT.replace("red", "green"))
    painted.get_by_role("button", name="Change", exact=True).click()
    maps = painted.locator("#change-result word-map")
    before, after = maps.nth(0), maps.nth(1)
    after.get_by_role("button", name="green").hover()
    expect(before.get_by_role("button", name="red")).to_have_attribute("aria-pressed", "true")  # the word it stands for
    expect(painted.locator("#change-result > .facts")).to_contain_text("% of the pixels changed")
    one, two = (np.asarray(opened(each.evaluate("(map) => map.data.image"))) for each in (before, after))
    assert 0 < (np.abs(one.astype(int) - two).max(axis=-1) > 16).mean() < 0.5


def sent(tab: Page, act: Callable[[], None]) -> dict[str, Any]:
    """The job that something asks the server for."""
    with tab.expect_request(lambda request: request.method == "POST" and request.url.endswith("/v1/jobs")) as asked:
        act()
    return asked.value.post_data_json


def test_a_word_is_given_a_place(painted: Page) -> None:
    painted.get_by_role("link", name="Change").click()
    painted.locator("#change label").filter(has_text="Places").click()
    painted.locator("#places-words label").filter(has_text="red circle").click()
    board = painted.locator("#places-board canvas")
    board.scroll_into_view_if_needed()
    box = board.bounding_box()
    assert box is not None
    painted.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.5 * box["height"])
    painted.mouse.down()
    painted.mouse.move(box["x"] + box["width"] - 2, box["y"] + box["height"] - 2, steps=4)
    painted.mouse.up()
    expect(painted.locator("#places-list")).to_contain_text(re.compile("50 % to (99|100) % across"))
    body = sent(painted, painted.get_by_role("button", name="Change", exact=True).click)
    (control,) = body["controls"]
    assert control["kind"] == "regions"
    assert control["regions"]["red circle"] == pytest.approx([0.5, 0.5, 1, 1], abs=0.02)
    assert body["settings"]["seed"] == 3
    expect(painted.locator("#change-result word-map")).to_have_count(2)


def test_a_word_weighs_more(painted: Page) -> None:
    painted.get_by_role("link", name="Change").click()
    painted.locator("#change label").filter(has_text="Weights").click()
    body = sent(painted, lambda: painted.locator("#weight-sliders").get_by_label("red").fill("2.5"))
    assert body["controls"] == [{"kind": "reweight", "words": {"red": 2.5}}]
    expect(painted.locator("#change-result word-map")).to_have_count(2)


def test_the_last_picture_is_there_after_a_reload(painted: Page) -> None:
    shown = word_map(painted)
    before = shares(shown)
    expect_kept(painted, 1)
    painted.reload()
    painted.locator("body[data-ready]").wait_for()
    shown.get_by_role("button", name="circle", exact=True).hover()
    expect(shown.locator("figcaption")).to_contain_text("“circle”: up to")
    assert np.array_equal(shares(shown), before)
    assert painted.locator("#prompt").input_value() == PROMPT
    assert painted.locator("#setting-seed").input_value() == "3"
    painted.get_by_role("link", name="Gallery").click()
    painted.get_by_role("button", name=f"Delete {PROMPT}").click()
    expect(painted.locator("#gallery-empty")).to_be_visible()


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


def test_a_full_store_is_said_in_words(tab: Page) -> None:
    tab.evaluate(
        """() => {
            IDBObjectStore.prototype.put = () => { throw new DOMException("full", "QuotaExceededError"); };
        }"""
    )
    paint(tab, steps=1)
    tab.get_by_role("link", name="Gallery").click()
    expect(tab.locator("#gallery-line")).to_contain_text("This browser's store is full")


def test_it_fits_a_phone(tab: Page) -> None:
    tab.set_viewport_size(PHONE)
    paint(tab, "a red circle and " + "a verylongwordthatnobodywouldeverwrite" * 4, steps=2)
    for view in VIEWS:
        tab.evaluate(f"location.hash = '{view}'")
        tab.locator(f"#{view}").wait_for()
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), view


def test_it_works_by_keys_alone(painted: Page) -> None:
    keys = painted.keyboard
    keys.press("Tab")
    keys.press("Enter")  # to the content
    keys.press("Tab")
    keys.press("Control+a")
    keys.type("a green ring")
    keys.press("Enter")
    shown = painted.locator("#paint-stage word-map")
    shown.get_by_role("button", name="green").wait_for()
    for _ in range(30):
        keys.press("Tab")
        if painted.evaluate("document.activeElement.shadowRoot?.activeElement?.textContent") == "ring":
            break
    expect(shown.locator("figcaption")).to_contain_text("“ring”: up to")
    keys.press("Enter")
    expect(shown.get_by_role("button", name="Unpin ring")).to_be_visible()
    keys.press("Tab")
    keys.press("ArrowRight")
    expect(shown.locator("figcaption")).to_contain_text("row 9, column 9: ")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_read_it(painted: Page, scheme: str) -> None:
    painted.emulate_media(color_scheme=scheme)
    for view in VIEWS:
        painted.evaluate(f"location.hash = '{view}'")
        painted.locator(f"#{view}").wait_for()
        found = Axe().run(painted)
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
    fill_in(tab, steps=2).click()
    expect(tab.locator("#paint-stage .loom-line")).to_have_text("Its queue is full. Trying again in 1 s")
    tab.locator("#paint-stage word-map").wait_for()


def test_a_server_that_went_away_comes_back(tab: Page) -> None:
    tab.route("**/v1/**", lambda route: route.abort())
    tab.get_by_role("button", name="Paint", exact=True).click()
    expect(tab.locator("#notice")).to_contain_text("The server does not answer. Trying again in")
    expect(tab.locator("#paint-form .line")).to_contain_text("The server does not answer")
    tab.unroute("**/v1/**")
    expect(tab.locator("#notice")).to_have_text("The server is back.")
    paint(tab, steps=2)


def test_a_wrong_setting_is_shown_at_its_field(tab: Page) -> None:
    fill_in(tab, steps=100_000).click()
    expect(tab.locator("#setting-steps")).to_have_attribute("aria-invalid", "true")
    expect(tab.locator("#setting-steps-problem")).to_contain_text("steps")
    assert tab.locator("#settings").get_attribute("open") is not None


def test_its_numbers_are_those_of_the_run(painted: Page) -> None:
    with painted.expect_response(re.compile("/explain")) as answered:
        painted.get_by_role("link", name="How it works").click()
    told = answered.value.json()
    expect(painted.locator("#how-total")).to_have_text("1.000")
    assert sum(told["softmax"]) == pytest.approx(1, abs=1e-3)
    scores = np.array(told["scores"])
    assert np.exp(scores) / np.exp(scores).sum() == pytest.approx(np.array(told["softmax"]), abs=1e-3)
    rows = painted.locator("#how-keys tr th").all_inner_texts()
    assert [row.lower() for row in rows if row.lower() in PROMPT.split()] == PROMPT.split()
    expect(painted.locator("details[data-code=softmax] summary")).to_contain_text("attention_probs, line")
    painted.locator("#lens").press("ArrowLeft")
    expect(painted.locator("#lens-place")).to_contain_text("held")


@pytest.mark.parametrize(
    "prompt", ['<img src=x onerror="alert`1`"> & &lt;b>', "עיגול אדום, ריבוע", "a 🟥 and 👩\u200d🎨 café " * 30]
)
def test_any_prompt_is_shown_as_it_is(tab: Page, prompt: str) -> None:
    shown = paint(tab, prompt, steps=2)
    assert shown.locator("h2").evaluate("(element) => element.textContent").strip() == prompt.strip()
    assert shown.locator("img").count() == 0
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_nothing_jumps_while_it_paints(tab: Page) -> None:
    button = fill_in(tab, steps=8)
    tab.wait_for_timeout(200)  # what is filled in makes room for itself
    tab.evaluate(
        """() => {
            window.shift = 0;
            new PerformanceObserver((list) => {
                for (const entry of list.getEntries()) if (!entry.hadRecentInput) window.shift += entry.value;
            }).observe({ type: "layout-shift" });
        }"""
    )
    button.click()
    word_map(tab)
    tab.wait_for_timeout(200)
    assert tab.evaluate("window.shift") < 0.02


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


def test_puzzles_know_their_answers(painted: Page) -> None:
    painted.get_by_role("link", name="How it works").click()
    puzzles = painted.locator(".puzzle")
    expect(puzzles).to_have_count(3)
    first, second, third = puzzles.all()
    for each in (first, second):
        each.get_by_role("button").first.click()
        expect(each.locator(".answer")).to_contain_text(re.compile("Yes|No"))
    third.locator("canvas").click()
    expect(painted.locator(".score")).to_contain_text(re.compile("[0-3] of 3 right"))


def test_the_figure_beside_a_map_is_the_published_one(tab: Page) -> None:
    """The model's file says what docs/attribution.md does, of sharp maps of own images at τ = 0.4."""
    published = (Path(__file__).parents[2] / "docs" / "attribution.md").read_text(encoding="utf-8")
    own = published.partition("own images that the grader found right")[2].partition("true scenes")[0]
    rows = re.findall(r"^\| (\w+) \| sharp \| [^|]+ \| ([\d.]+) ± ([\d.]+)", own, re.MULTILINE)
    figures = tab.evaluate("async () => (await (await fetch('v1/info')).json()).pointing")
    for kind, iou, interval in rows:
        assert (figures[kind]["iou"], figures[kind]["interval"]) == (float(iou), float(interval)), kind
    assert f"1/1 {figures['noun']['perfect']} " in own
    assert f"lights up everywhere: {figures['noun']['everywhere']} " in own


def test_lines_of_code_are_those_that_run() -> None:
    for part, excerpt in code_excerpts().items():
        lines = (Path(gobelin.__file__).parents[1] / excerpt["file"]).read_text(encoding="utf-8").splitlines()
        assert excerpt["marked"], part
        for number in excerpt["marked"]:
            assert lines[number - 1].strip() == excerpt["source"].splitlines()[number - excerpt["line"]].strip()


@pytest.mark.slow
def test_only_what_is_covered_is_painted_anew(painted: Page) -> None:
    painted.get_by_role("link", name="Change").click()
    painted.locator("#change label").filter(has_text="A part").click()
    painted.get_by_label("What to paint there").fill("a yellow star")
    board = painted.locator("#brush-board canvas")
    board.scroll_into_view_if_needed()
    box = board.bounding_box()
    assert box is not None
    painted.mouse.move(box["x"] + 0.1 * box["width"], box["y"] + 0.2 * box["height"])
    painted.mouse.down()
    painted.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 0.2 * box["height"], steps=5)
    painted.mouse.up()
    body = sent(painted, painted.get_by_role("button", name="Change", exact=True).click)
    mask = np.asarray(opened(body["settings"]["mask"]).convert("L"))
    assert mask.shape == (64, 64)
    assert mask[13, 16] == 255
    assert mask[50, 50] == 0
    maps = painted.locator("#change-result word-map")
    expect(maps).to_have_count(2)
    one, two = (np.asarray(opened(each.evaluate("(map) => map.data.image")).convert("RGB")) for each in maps.all())
    assert np.array_equal(one[mask < 128], two[mask < 128])
    assert not np.array_equal(one[mask >= 128], two[mask >= 128])


@pytest.mark.slow
def test_a_picture_of_ones_own_is_edited(tab: Page, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    image = Image.new("RGB", (64, 64), "#a0a0a0")
    image.paste("#d02020", (10, 15, 40, 45))
    image.save(photo)
    open_view(tab, "change")
    tab.locator("#change-file input").set_input_files(photo)
    tab.locator("#change-file img").wait_for()
    tab.get_by_label("What the picture shows").fill("a red square")
    tab.get_by_label("The same picture, but").fill("a green square")
    body = sent(tab, tab.get_by_role("button", name="Change", exact=True).click)
    assert opened(body["settings"]["init_image"]).size == (64, 64)
    before = tab.locator("#change-result word-map").first
    before.get_by_role("button", name="red").wait_for()
    shown = np.asarray(opened(before.evaluate("(map) => map.data.image")).convert("RGB"))
    assert np.abs(shown.astype(int) - np.asarray(image)).max() <= 1  # not the model's idea of it
    tab.locator("#change label").filter(has_text="Weights").click()
    tab.locator("#weight-sliders").get_by_label("red").fill("2")
    expect(tab.locator("#change-form .line")).to_contain_text("painted from noise")


@pytest.mark.slow
def test_a_table_compares_seeds_and_values(tab: Page) -> None:
    open_view(tab, "compare")
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
def test_a_broken_run_is_another_picture(painted: Page, broken: str) -> None:
    painted.get_by_role("link", name="How it works").click()
    painted.locator("#break-form label").filter(has_text=broken).click()
    painted.get_by_role("button", name="Paint it broken").click()
    maps = painted.locator("#break-result word-map, #break-result img.plain")
    expect(maps).to_have_count(2)
    expect(painted.locator("#break-result .facts")).not_to_contain_text("0.0 %")
