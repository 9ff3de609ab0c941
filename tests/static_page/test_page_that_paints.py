"""The page in a real browser: it paints Python's pictures, words light up their pixels, and what goes wrong is said."""

import base64
import contextlib
import io
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page
from playwright.sync_api import Error as PlaywrightError
from tests.static_page.conftest import HAS_RUNTIME, served

from gobelin.attention import Trace
from gobelin.checkpoint import Model
from gobelin.formats.png import read_png_settings
from gobelin.look.page import word_map_data
from gobelin.look.sharp_maps import sharp_trace
from gobelin.pipeline import Pipeline

pytestmark = pytest.mark.skipif(not HAS_RUNTIME, reason="no onnxruntime-web in the cache folder: gobelin page gets it")

MOST = 2  # levels of 255 that a pixel may differ
NO_MEMORY = "class { constructor() { throw new RangeError('could not allocate memory'); } }"
PROMPT = "a red ring and a blue star"


@pytest.fixture(scope="module")
def site(small_page: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site whose page lies in a folder below its root."""
    root = tmp_path_factory.mktemp("site")
    shutil.copytree(small_page, root / "deep" / "page")
    return root


@pytest.fixture(scope="module")
def tab(browser: Browser, site: Path) -> Iterator[Page]:
    """One tab for many tests, as the runtime takes long to load; no error may come up, and nothing from elsewhere."""
    context = without_service_workers(browser)
    tab = context.new_page()
    wrong: list[str] = []
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    with served(site) as root:
        tab.on("request", lambda asked: None if asked.url.startswith((root, "data:")) else wrong.append(asked.url))
        tab.goto(f"{root}/deep/page/")
        paint(tab)
        yield tab
    context.close()
    assert not wrong


def without_service_workers(browser: Browser) -> BrowserContext:
    """A browser without service workers, in which a load is one load, and there is one thread."""
    context = browser.new_context()
    context.add_init_script("delete Navigator.prototype.serviceWorker;")
    return context


def paint(tab: Page, prompt: str = PROMPT, seed: int = 0) -> Page:
    """Type a prompt and a seed, and wait until that is painted."""
    begin(tab, prompt, seed)
    wait(tab)
    return tab


def begin(tab: Page, prompt: str, seed: int = 0) -> None:
    tab.evaluate("document.querySelector('details').open = true")
    tab.get_by_label("Prompt").fill(prompt)
    tab.get_by_label("Seed").fill(str(seed))
    tab.evaluate("document.querySelector('#status').textContent = ''")
    tab.get_by_label("Prompt").press("Enter")


def wait(tab: Page) -> None:
    until(tab, "document.querySelector('#status').textContent.startsWith('Painted in')")


def until(tab: Page, condition: str) -> None:
    """Wait until a condition holds; Playwright's own way needs ``eval``, which the page forbids."""
    for _ in range(6000):
        with contextlib.suppress(PlaywrightError):  # of a page that loads again
            if tab.evaluate(condition):
                return
        assert not tab.get_by_role("alert").is_visible(), tab.get_by_role("alert").inner_text()
        tab.wait_for_timeout(20)
    raise AssertionError(f"it never came to {condition}")


def painted(tab: Page) -> dict[str, Any]:
    return tab.locator("word-map").evaluate("(element) => element.data")


def pixels(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB"), dtype=int)


def shares(data: dict[str, Any]) -> np.ndarray:
    """The shares that packed data stands for: [steps, words, rows, columns]."""
    levels = np.frombuffer(base64.b64decode(data["shares"]), dtype=np.uint8)
    levels = levels.reshape(data["steps"], len(data["words"]), data["rows"], data["columns"])
    return levels / 255 * np.array(data["tops"])[:, None, None]


def compare(tab: Page, model: Model, prompt: str, seed: int) -> None:
    """Compare picture, previews and maps with Python's."""
    data = painted(tab)
    warnings.simplefilter("ignore")  # of a prompt that is cut
    pipe = Pipeline(model)
    side = model.unet.config.sample_size
    trace = sharp_trace(model.unet.attention_sites, (side, side), model.head_weights)
    settings: dict[str, Any] = {"seed": seed, "weights": "none"}
    previews = [step.preview() for step in pipe.start(prompt, **settings)]
    result = pipe(prompt, **settings, trace="sharp")
    apart_by = Trace(sites=trace.sites, per_step=True, per_head=trace.per_head)
    each = pipe(prompt, **settings, trace=apart_by).heatmaps[0].sharpened(trace.head_weights)
    whole, apart = word_map_data(result.heatmaps[0]), word_map_data(each)
    assert data["text"] == [list(piece) for piece in whole["text"]]
    assert (data["words"], data["steps"], data["weighted"]) == (whole["words"], 1 + each.steps, whole["weighted"])
    assert np.abs(shares(data)[0] - shares(whole)[0]).max() < 0.01
    assert np.abs(shares(data)[1:] - shares(apart)[1:]).max() < 0.01
    for ours, theirs in zip(data["images"], [result.images[0], *previews], strict=True):
        assert np.abs(pixels(ours) - np.asarray(theirs, dtype=int)).max() <= MOST


@pytest.mark.parametrize(("prompt", "seed"), [(PROMPT, 0), ("a 🟥 ring, (blue:1.3) café " * 3, 2**32 + 7)])
def test_it_paints_what_python_paints(tab: Page, small_model: Model, prompt: str, seed: int) -> None:
    paint(tab, prompt, seed)
    compare(tab, small_model, prompt, seed)


def test_head_weights_make_its_maps(browser: Browser, weighted_page: Path, weighted_model: Model) -> None:
    context = without_service_workers(browser)
    tab = context.new_page()
    with served(weighted_page) as address:
        tab.goto(f"{address}/")
        paint(tab)
        compare(tab, weighted_model, PROMPT, 0)
        paint(tab, "!!!")  # no words
        assert painted(tab)["words"] == []
        paint(tab)
    element = tab.locator("word-map")
    element.get_by_role("button", name="ring").hover()
    assert "likely" in element.locator("figcaption").inner_text()
    assert "overlap by 50" in tab.locator("#trust").inner_text()
    context.close()


@pytest.mark.slow
def test_the_shipped_model_paints_what_python_paints(browser: Browser, shipped_page: Path, shipped: Model) -> None:
    assert sum(file.stat().st_size for file in shipped_page.rglob("*") if file.is_file()) < 30e6
    tab = browser.new_page()
    with served(shipped_page) as address:
        tab.goto(f"{address}/")
        wait(tab)
        for prompt, seed in (("a red circle to the left of a blue star", 0), ("three green rings", 7), ("dogs", 3)):
            paint(tab, prompt, seed)
            compare(tab, shipped, prompt, seed)
    assert "never taught “dogs”" in tab.locator("#notes").inner_text()
    tab.close()


def test_words_light_up_pixels_and_pixels_rank_words(tab: Page) -> None:
    element = paint(tab).locator("word-map")
    element.get_by_role("button", name="ring").hover()
    assert "“ring”: up to" in element.locator("figcaption").inner_text()
    element.locator("canvas").hover()
    assert element.locator("h3").inner_text() == "Words behind this patch"
    assert sorted(element.locator("li span:first-child").all_inner_texts()) == sorted(PROMPT.split())


def test_what_is_lit_stays_lit_while_it_is_painted(tab: Page) -> None:
    element = paint(tab).locator("word-map")
    element.get_by_role("button", name="ring").focus()
    painted_again = tab.evaluate(
        """async () => {
            const [element, status] = ["word-map", "#status"].map((one) => document.querySelector(one));
            const caption = element.shadowRoot.querySelector("figcaption");
            const seen = [];
            document.querySelector("#another").click();
            while (!status.textContent.startsWith("Painted") || seen.length === 0) {
                await new Promise((resolve) => new MutationObserver(resolve).observe(status, { childList: true }));
                seen.push([status.textContent, caption.textContent]);
            }
            return seen;
        }"""
    )
    assert [said for said, _ in painted_again[:4]] == [f"Step {step} of 4" for step in range(1, 5)]
    assert all("“ring”: up to" in caption for _, caption in painted_again)


def test_the_slider_goes_through_previews_and_maps(tab: Page) -> None:
    element = paint(tab).locator("word-map")
    before = element.locator("canvas").evaluate("(canvas) => canvas.toDataURL()")
    element.locator("input[type=range]").fill("1")
    assert element.locator("label span").inner_text() == "1 of 4"
    until(tab, f"document.querySelector('word-map').shadowRoot.querySelector('canvas').toDataURL() !== '{before}'")


def test_another_seed_and_pictures_from_before(tab: Page) -> None:
    paint(tab, "it's a ring")
    first = painted(tab)
    begin(tab, "a blue ring")
    wait(tab)
    tab.evaluate("document.querySelector('#status').textContent = ''")
    tab.get_by_role("button", name="Another").click()
    wait(tab)
    assert painted(tab)["words"] == ["a", "blue", "ring"]
    assert int(tab.get_by_label("Seed").input_value()) > 0
    assert tab.evaluate("location.hash").startswith("#prompt=a+blue+ring&seed=")
    tab.locator("#past button").nth(2).click()
    assert painted(tab) == first
    assert tab.get_by_label("Prompt").input_value() == "it's a ring"
    assert (
        tab.locator("#command").inner_text()
        == "gobelin generate --model small 'it'\\''s a ring' --seed 0 --weights none"
    )


def test_the_saved_picture_carries_its_settings(tab: Page, small_model: Model, tmp_path: Path) -> None:
    paint(tab, "it's a ring 🟥", 5)
    with tab.expect_download() as saved:
        tab.get_by_role("button", name="Save the picture").click()
    assert saved.value.suggested_filename == "it-s-a-ring-5.png"
    file = tmp_path / "saved.png"
    saved.value.save_as(file)
    assert read_png_settings(file) == Pipeline(small_model).start("it's a ring 🟥", seed=5, weights="none").settings[0]
    assert np.array_equal(np.asarray(Image.open(file).convert("RGB"), dtype=int), pixels(painted(tab)["image"]))


def test_it_stops_within_a_step(tab: Page) -> None:
    paint(tab)
    before = painted(tab)["image"]
    steps = tab.evaluate(
        """async () => {
            const [steps, paint, stop, status] = ["steps", "paint", "stop", "status"].map((id) =>
                document.querySelector(`#${id}`));
            const seen = [];
            let change;
            new MutationObserver(() => {
                seen.push(status.textContent);
                change();
            }).observe(status, { childList: true });
            const next = () => new Promise((resolve) => { change = resolve; });
            steps.value = 50;
            paint.click();
            await next();
            stop.click();
            while (seen.at(-1) !== "Stopped.") await next();
            steps.value = 4;
            return seen;
        }"""
    )
    assert len(steps) <= 4, steps  # two more at most, one of which was done already
    assert tab.get_by_role("button", name="Stop").is_hidden()
    paint(tab)
    assert painted(tab)["image"] == before


@pytest.mark.parametrize(
    ("prompt", "said"),
    [("", "The prompt is empty: say in a few words what to paint."), ("   ", "is empty"), ("x" * 100_001, "too long")],
)
def test_prompts_that_cannot_be_painted_are_said(tab: Page, prompt: str, said: str) -> None:
    begin(tab, prompt)
    tab.get_by_role("alert").get_by_text(said).wait_for()
    paint(tab)
    assert tab.get_by_role("alert").is_hidden()


def test_a_long_prompt_is_cut_and_that_is_said(tab: Page) -> None:
    paint(tab, "a red ring and a blue star and a red ring and a star")
    assert "longer than this model reads: “" in tab.locator("#notes").inner_text()
    assert "here on one thread" in tab.locator("#facts").inner_text()


def test_it_works_without_a_network_and_with_threads(browser: Browser, site: Path) -> None:
    """The service worker's part; and an address with a prompt paints it."""
    context = browser.new_context()
    tab = context.new_page()
    with served(site) as root:
        address = f"{root}/deep/page/#prompt=a+blue+ring&seed=3&steps=10"
        tab.goto(address)
        wait(tab)
        first = painted(tab)
        assert (first["words"], first["steps"]) == (["a", "blue", "ring"], 11)
        assert tab.evaluate("crossOriginIsolated") is True
    tab.goto("about:blank")
    tab.goto(address)  # the server is gone
    wait(tab)
    assert painted(tab)["image"] == first["image"]
    context.close()


def test_another_page_that_takes_its_place_is_left_alone(browser: Browser, small_page: Path, tmp_path: Path) -> None:
    shutil.copytree(small_page, tmp_path / "site")
    (tmp_path / "site" / "painter.js").write_text("")  # nothing needs to be painted
    context = browser.new_context()
    tab = context.new_page()
    with served(tmp_path / "site") as address:
        tab.goto(f"{address}/")
        until(tab, "crossOriginIsolated")
        (tmp_path / "site" / "index.html").write_text("<title>another</title>")
        tab.goto("about:blank")
        tab.goto(f"{address}/")
        assert (tab.title(), tab.evaluate("crossOriginIsolated")) == ("another", False)
        assert tab.evaluate("navigator.serviceWorker.getRegistrations().then((all) => all.length)") == 0
    context.close()


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("unet.onnx", "gone", "This page's file unet.onnx is missing: copy the whole folder to the host again."),
        ("unet.onnx", "cut", "This page's file unet.onnx is damaged or cut short"),
        ("onnxruntime/ort-wasm-simd-threaded.wasm.gz", "cut", "wasm.gz is damaged or cut short"),
        ("onnxruntime/ort.wasm.bundle.min.js", "gone", "ort.wasm.bundle.min.js is missing"),
        ("model.json", "gone", "model.json is missing or damaged"),
        ("model.json", "cut", "model.json is missing or damaged"),
        ("noise.js", "gone", "scripts are missing or damaged"),
        ("painter.js", "delete globalThis.WebAssembly;", "no WebAssembly with vectors"),
        ("painter.js", "WebAssembly.validate = () => false;", "no WebAssembly with vectors"),
        ("painter.js", f"WebAssembly.Memory = {NO_MEMORY};", "not enough memory"),
    ],
)
def test_what_goes_wrong_is_said(
    browser: Browser, small_page: Path, tmp_path: Path, name: str, change: str, said: str
) -> None:
    """Files that are gone or cut short, and browsers, as a script makes them, that cannot paint."""
    shutil.copytree(small_page, tmp_path / "page")
    file = tmp_path / "page" / name
    content = file.read_bytes()
    if change == "gone":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if change == "cut" else content + f"\n{change}\n".encode())
    context = without_service_workers(browser)
    tab = context.new_page()
    with served(tmp_path / "page") as address:
        tab.goto(f"{address}/")
        tab.get_by_role("alert").get_by_text(said).wait_for()
    assert tab.get_by_role("button", name="Paint").is_disabled()
    context.close()


def test_it_fits_phones_and_the_dark(tab: Page) -> None:
    paint(tab, "a red ring and a very-long-word-that-does-not-end-for-a-long-time")
    for width, scheme in ((360, "light"), (360, "dark"), (1200, "dark")):
        tab.set_viewport_size({"width": width, "height": 800})
        tab.emulate_media(color_scheme=scheme)
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        ground = tab.evaluate("getComputedStyle(document.querySelector('word-map')).backgroundColor")
        light = sum(map(int, ground.removeprefix("rgb(").rstrip(")").split(",")))
        assert (light > 600) == (scheme == "light")
    tab.set_viewport_size({"width": 1000, "height": 900})


def test_every_control_has_a_name(tab: Page) -> None:
    paint(tab)
    unnamed = tab.evaluate(
        """() => [...document.querySelectorAll("input, select, button")].filter((one) => !(
            one.labels?.[0]?.textContent || one.textContent || one.ariaLabel || one.querySelector("img")?.alt
        )).map((one) => one.outerHTML)"""
    )
    assert unnamed == []
    assert tab.locator("html").get_attribute("lang") == "en"
    assert (tab.locator("h1").count(), tab.locator("main").count()) == (1, 1)
