"""The page in a real browser: it paints Python's pictures, words light up their pixels, and what goes wrong is said."""

import base64
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page
from tests.static_page.conftest import HAS_RUNTIME, served

from gobelin.attention import Trace
from gobelin.checkpoint import Model
from gobelin.formats.png import read_png_settings
from gobelin.look.heatmaps import sharp_trace
from gobelin.look.page import word_map_data
from gobelin.pipeline import Pipeline

pytestmark = pytest.mark.skipif(not HAS_RUNTIME, reason="no onnxruntime-web in the cache folder: gobelin page gets it")

MOST = 2  # levels of 255 that a pixel may differ
PROMPT = "a red ring and a blue star"


@pytest.fixture(scope="module")
def folder(small_page: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site whose page lies in a folder below its root."""
    root = tmp_path_factory.mktemp("site")
    shutil.copytree(small_page, root / "deep" / "page")
    return root


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with served(folder) as root:
        yield f"{root}/deep/page/"


def opened(tab: Page, address: str, prompt: str = PROMPT, seed: int = 0) -> Page:
    """Open the page, which paints the prompt in its address, and wait until that is done."""
    tab.goto(f"{address}#{'&'.join([f'prompt={prompt}', f'seed={seed}'])}")
    wait(tab)
    return tab


def wait(tab: Page, timeout: float = 120_000) -> None:
    tab.wait_for_function("document.querySelector('#status').textContent.startsWith('Painted in')", timeout=timeout)


def painted(tab: Page) -> dict[str, Any]:
    return tab.locator("word-map").evaluate("(element) => element.data")


def pixels(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB"), dtype=int)


def shares(data: dict[str, Any]) -> np.ndarray:
    """The shares that packed data stands for: [steps, words, rows, columns]."""
    levels = np.frombuffer(base64.b64decode(data["shares"]), dtype=np.uint8)
    levels = levels.reshape(data["steps"], len(data["words"]), data["rows"], data["columns"])
    return levels / 255 * np.array(data["tops"])[:, None, None]


def compare(tab: Page, model: Model, prompt: str, seed: int) -> int:
    """Compare picture, previews and maps with Python's; returns the greatest difference of the picture in levels."""
    data = painted(tab)
    pipe = Pipeline(model)
    side = model.unet.config.sample_size
    trace = sharp_trace(model.unet.attention_sites, (side, side))
    settings: dict[str, Any] = {"seed": seed, "weights": "none"}
    previews = [step.preview() for step in pipe.start(prompt, **settings)]
    result = pipe(prompt, **settings, trace="sharp")
    each = pipe(prompt, **settings, trace=Trace(sites=trace.sites, per_step=True)).heatmaps[0].sharpened()
    whole, apart = word_map_data(result.heatmaps[0]), word_map_data(each)
    assert data["text"] == [list(piece) for piece in whole["text"]]
    assert (data["words"], data["steps"]) == (whole["words"], 1 + each.steps)
    assert np.abs(shares(data)[0] - shares(whole)[0]).max() < 0.01
    assert np.abs(shares(data)[1:] - shares(apart)[1:]).max() < 0.01
    for ours, theirs in zip(data["images"], [result.images[0], *previews], strict=True):
        assert np.abs(pixels(ours) - np.asarray(theirs, dtype=int)).max() <= MOST
    return int(np.abs(pixels(data["image"]) - np.asarray(result.images[0], dtype=int)).max())


@pytest.mark.parametrize(("prompt", "seed"), [(PROMPT, 0), ("a 🟥 ring, (blue:1.3) café " * 3, 2**32 + 7)])
def test_it_paints_what_python_paints(tab: Page, address: str, small_model: Model, prompt: str, seed: int) -> None:
    opened(tab, address, prompt.replace("&", "%26"), seed)
    assert compare(tab, small_model, prompt, seed) <= MOST


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompt", "seed"), [("a red circle to the left of a blue star", 0), ("three green rings", 7), ("a white cross", 3)]
)
def test_the_shipped_model_paints_what_python_paints(
    tab: Page, shipped_page: Path, shipped: Model, prompt: str, seed: int
) -> None:
    assert sum(file.stat().st_size for file in shipped_page.rglob("*") if file.is_file()) < 30e6
    with served(shipped_page) as address:
        opened(tab, f"{address}/", prompt, seed)
        assert compare(tab, shipped, prompt, seed) <= MOST


def test_words_light_up_pixels_and_pixels_rank_words(tab: Page, address: str) -> None:
    opened(tab, address)
    element = tab.locator("word-map")
    element.get_by_role("button", name="ring").hover()
    assert "“ring”: up to" in element.locator("figcaption").inner_text()
    element.locator("canvas").hover()
    assert element.locator("h3").inner_text() == "Words behind this patch"
    assert sorted(element.locator("li span:first-child").all_inner_texts()) == sorted(PROMPT.split())


def test_the_slider_goes_through_previews_and_maps(tab: Page, address: str) -> None:
    opened(tab, address)
    element = tab.locator("word-map")
    before = element.locator("canvas").evaluate("(canvas) => canvas.toDataURL()")
    element.locator("input[type=range]").fill("1")
    assert element.locator("label span").inner_text() == "1 of 4"
    tab.wait_for_function(
        "(before) => document.querySelector('word-map').shadowRoot.querySelector('canvas').toDataURL() !== before",
        arg=before,
    )


def test_own_prompts_another_seed_and_pictures_from_before(tab: Page, address: str) -> None:
    opened(tab, address)
    first = painted(tab)
    tab.get_by_label("Prompt").fill("a blue ring")
    tab.get_by_label("Prompt").press("Enter")
    wait(tab)
    tab.get_by_role("button", name="Another").click()
    tab.wait_for_function("document.querySelectorAll('#past li').length === 3")
    assert painted(tab)["words"] == ["a", "blue", "ring"]
    assert int(tab.get_by_label("Seed").input_value()) > 0
    assert tab.evaluate("decodeURIComponent(location.hash)").startswith("#prompt=a+blue+ring&seed=")
    tab.locator("#past button").last.click()
    assert painted(tab) == first
    assert tab.get_by_label("Prompt").input_value() == PROMPT
    assert tab.locator("#command").inner_text() == f"gobelin generate '{PROMPT}' --seed 0 --weights none"


def test_the_saved_picture_carries_its_settings(tab: Page, address: str, small_model: Model, tmp_path: Path) -> None:
    opened(tab, address, "it's a ring 🟥", 5)
    with tab.expect_download() as saved:
        tab.get_by_role("button", name="Save the picture").click()
    assert saved.value.suggested_filename == "it-s-a-ring-5.png"
    file = tmp_path / "saved.png"
    saved.value.save_as(file)
    recorded = read_png_settings(file)
    expected = Pipeline(small_model).start("it's a ring 🟥", seed=5, weights="none").settings[0]
    assert recorded == expected
    assert np.array_equal(np.asarray(Image.open(file).convert("RGB"), dtype=int), pixels(painted(tab)["image"]))


def test_it_stops_within_a_step(tab: Page, address: str) -> None:
    opened(tab, address)
    before = painted(tab)
    tab.locator("summary").click()
    tab.get_by_label("Steps").select_option("50")
    tab.get_by_role("button", name="Paint").click()
    tab.wait_for_function("document.querySelector('#status').textContent.startsWith('Step 2')")
    tab.get_by_role("button", name="Stop").click()
    tab.wait_for_function("document.querySelector('#status').textContent === 'Stopped.'")
    assert painted(tab)["image"] != before["image"]  # the last preview stays
    tab.get_by_label("Steps").select_option("4")
    tab.get_by_role("button", name="Paint").click()
    wait(tab)
    assert painted(tab)["image"] == before["image"]


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("", "The prompt is empty: say in a few words what to paint."),
        ("   ", "The prompt is empty"),
        ("x" * 100_001, "too long"),
    ],
)
def test_prompts_that_cannot_be_painted_are_said(tab: Page, address: str, prompt: str, said: str) -> None:
    opened(tab, address)
    tab.get_by_label("Prompt").fill(prompt)
    tab.get_by_role("button", name="Paint").click()
    tab.get_by_role("alert").get_by_text(said).wait_for()


def test_a_long_prompt_is_cut_and_that_is_said(tab: Page, address: str) -> None:
    opened(tab, address, "a red ring and a blue star and a red ring and a star")
    assert "longer than this model reads: “" in tab.locator("#notes").inner_text()


def test_nothing_comes_from_elsewhere_and_it_works_without_a_network(browser: Browser, folder: Path) -> None:
    context = browser.new_context()
    tab = context.new_page()
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    with served(folder) as root:
        opened(tab, f"{root}/deep/page/")
        first = painted(tab)["image"]
        assert tab.evaluate("crossOriginIsolated") is True
        assert {url.split("#")[0].startswith((root, "data:", "blob:")) for url in asked} == {True}
    tab.goto("about:blank")
    opened(tab, f"{root}/deep/page/")  # the server is gone
    assert painted(tab)["image"] == first
    context.close()


def test_another_page_that_takes_its_place_is_left_alone(browser: Browser, small_page: Path, tmp_path: Path) -> None:
    shutil.copytree(small_page, tmp_path / "site")
    context = browser.new_context()
    tab = context.new_page()
    with served(tmp_path / "site") as address:
        opened(tab, f"{address}/")
        (tmp_path / "site" / "index.html").write_text("<title>another</title>")
        tab.goto("about:blank")
        tab.goto(f"{address}/")
        assert (tab.title(), tab.evaluate("crossOriginIsolated")) == ("another", False)
        assert tab.evaluate("navigator.serviceWorker.getRegistrations().then((all) => all.length)") == 0
    context.close()


def test_without_a_service_worker_it_paints_on_one_thread(browser: Browser, address: str) -> None:
    context = browser.new_context(service_workers="block")
    tab = opened(context.new_page(), address)
    assert "here on one thread" in tab.locator("#facts").inner_text()
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
    ],
)
def test_files_that_are_missing_or_damaged_are_named(
    browser: Browser, small_page: Path, tmp_path: Path, name: str, change: str, said: str
) -> None:
    shutil.copytree(small_page, tmp_path / "page")
    file = tmp_path / "page" / name
    content = file.read_bytes()
    file.unlink()
    if change == "cut":
        file.write_bytes(content[: len(content) // 2])
    context = browser.new_context(service_workers="block")
    tab = context.new_page()
    with served(tmp_path / "page") as address:
        tab.goto(f"{address}/")
        tab.get_by_role("alert").get_by_text(said).wait_for()
    context.close()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("delete globalThis.WebAssembly", "no WebAssembly with vectors"),
        ("WebAssembly.validate = () => false", "no WebAssembly with vectors"),
        ("WebAssembly.Memory = function () { throw new RangeError('could not allocate memory') }", "not enough memory"),
    ],
)
def test_browsers_that_cannot_paint_are_told(
    browser: Browser, small_page: Path, tmp_path: Path, script: str, said: str
) -> None:
    shutil.copytree(small_page, tmp_path / "page")
    painter = tmp_path / "page" / "painter.js"
    painter.write_text(f"{painter.read_text()}\n{script};\n")
    context = browser.new_context(service_workers="block")
    tab = context.new_page()
    with served(tmp_path / "page") as address:
        tab.goto(f"{address}/")
        tab.get_by_role("alert").get_by_text(said).wait_for()
    assert tab.get_by_role("button", name="Paint").is_disabled()
    context.close()


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (360, "dark"), (1200, "dark")])
def test_it_fits_phones_and_the_dark(browser: Browser, address: str, width: int, scheme: Any) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    tab = opened(context.new_page(), address, "a red ring and a very-long-word-that-does-not-end-for-a-long-time")
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    ground = tab.evaluate("getComputedStyle(document.querySelector('word-map')).backgroundColor")
    light = sum(map(int, ground.removeprefix("rgb(").rstrip(")").split(",")))
    assert (light > 600) == (scheme == "light")
    context.close()


def test_every_control_has_a_name(tab: Page, address: str) -> None:
    opened(tab, address)
    tab.locator("summary").click()
    unnamed = tab.evaluate(
        """() => [...document.querySelectorAll("input, select, button")].filter((one) => !(
            one.labels?.[0]?.textContent || one.textContent || one.ariaLabel || one.querySelector("img")?.alt
        )).map((one) => one.outerHTML)"""
    )
    assert unnamed == []
    assert (tab.locator("html").get_attribute("lang"), tab.locator("h1").count(), tab.locator("main").count()) == (
        *("en", 1, 1),
    )
