"""The report of a made-up run: what it says, what it does with damaged files, and the page in a browser."""

import itertools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright
from tests.training.made_up_run import make_run, record, write_lines

from gobelin.errors import TrainingError
from gobelin.training.line_chart import ChartLine, line_chart
from gobelin.training.run_charts import running_mean
from gobelin.training.run_files import read_run
from gobelin.training.run_report import run_report, write_run_report

HOSTILE = "</p><script>alert(1)</script><img src=x onerror=alert(1)> \"'&"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FILES = ("config.json", "data.json", "metrics.jsonl", "validation.jsonl", "attention.jsonl", "nearest.json")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that stands at step 13,000 of 15,000."""
    return make_run(tmp_path_factory.mktemp("runs") / "tapestry", upto=13_000)


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """A copy of it, to be damaged."""
    return shutil.copytree(whole, tmp_path / "tapestry")


def text(page: str) -> str:
    """The words of a page, without its elements."""
    body = re.sub(r"<(script|style)>.*?</\1>|<[^>]+>", " ", page, flags=re.DOTALL)
    return " ".join(body.replace("&#x27;", "'").replace("&quot;", '"').replace("&lt;", "<").split())


def test_it_says_what_happened(whole):
    file = write_run_report(whole)
    assert file == whole / "training" / "report.html"
    words = text(file.read_text(encoding="utf-8"))
    assert words.index("the caption is heard: at high noise (timesteps 750–999)") < words.index("Trained on"), "first"
    assert "Trained on scenes of the world core, 64×64, seed 7 (64,000 captioned images)." in words
    assert "U-Net 13,000 of 15,000 64 0.003 0." in words
    assert "Text encoder 1,600 128 0.003 2." in words
    assert "What differs from the preset tiny , the nearest: setting this run preset seed 7 0 " in words
    assert "Distance 0.02; the median over training images is 0.31." in words
    assert "Left out of this page" not in words
    assert f"gobelin train --out {whole} --resume" in words
    assert "gobelin generate" not in words, "there is no model in the folder yet"
    for title in ("High noise: loss", "Low noise: gain by the caption", "VAE: loss", "U-Net: learning rate"):
        assert title in words
    for title in ("Images a second", "Waiting for data", "Memory, MB", "Entropy of the words' maps", "VAE: kl"):
        assert title in words


def test_it_needs_nothing_but_itself(whole):
    page = run_report(whole)
    assert set(re.findall(r'(?:src|href)="([a-z]+:[a-z/]+)', page)) <= {"data:image/png", "data:image/jpeg"}
    assert "//" not in re.sub(r"base64,[^\"]*|^ *//.*$", "", page, flags=re.MULTILINE)
    assert page == run_report(whole), "it can be made again"


def test_a_finished_run_has_a_model_to_generate_with(tmp_path):
    folder = make_run(tmp_path / "it's done")
    (folder / "model_index.json").write_text("{}")
    words = text(run_report(folder))
    assert 'gobelin generate "YOUR PROMPT" --model \'' in words
    assert "--resume" not in words


def test_an_adapter_is_loaded_beside_its_model(run):
    config = {"method": "adapter", "model": "base model", "unet": {"optim": {"steps": 13_000}}}
    (run / "training" / "config.json").write_text(json.dumps(config))
    write_lines(run / "training" / "metrics.jsonl", [{"stage": "unet", "step": 13_000, "loss": 1.0}])
    (run / "mine.safetensors").write_bytes(b"")
    words = text(run_report(run))
    assert (
        f"gobelin generate \"YOUR PROMPT\" --model 'base model' --lora {run}/mine.safetensors gobelin report" in words
    )
    assert "captioned images), from base model." in words


def test_what_comes_from_files_is_escaped(run):
    training = run / "training"
    (training / "data.json").write_text(json.dumps({"description": HOSTILE, "count": 5}))
    (training / "config.json").write_text(json.dumps({HOSTILE: HOSTILE, "model": HOSTILE, "method": HOSTILE}))
    lines = [{"stage": HOSTILE, "step": step, "loss": 1.0, HOSTILE: 2.0, "lr": 1.0} for step in range(9)]
    write_lines(training / "metrics.jsonl", lines)
    page = run_report(run)
    assert page.count("<script>") == 1
    assert "<img src=x" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 8


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("config.json", "The configuration cannot be shown."),
        ("data.json", "data.json is not there."),
        ("metrics.jsonl", "No step has been logged yet."),
        ("validation.jsonl", "Whether the caption is heard was not measured"),
        ("attention.jsonl", "No attention has been measured yet."),
        ("samples", "There are no sheets yet."),
    ],
)
def test_what_is_missing_is_left_out_in_a_sentence(run, name, said):
    gone = run / "training" / name
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    words = text(run_report(run))
    assert said in words
    assert name == "samples" or f"{name} is not there." in words


def test_an_empty_folder_gives_a_page_and_no_folder_an_error(tmp_path):
    (tmp_path / "training").mkdir()
    assert "No step has been logged yet." in text(run_report(tmp_path))
    with pytest.raises(TrainingError, match=r"holds no training run: give the folder that gobelin train --out wrote"):
        run_report(tmp_path / "training")


def test_a_line_that_is_being_written_is_no_damage_and_others_are_counted(run):
    metrics = run / "training" / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"stage": "unet", "st')
    assert "Left out of this page" not in run_report(run)
    metrics.write_text('nonsense\n{"stage": "unet"}\n' + whole + "[1]\n")
    assert "metrics.jsonl has 3 damaged lines, left out." in text(run_report(run))


def test_of_a_step_that_was_trained_twice_the_last_counts(run):
    with (run / "training" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"stage": "unet", "step": 13_000, "loss": 77.5}) + "\n")
    assert read_run(run).metrics["unet"][-1]["loss"] == 77.5
    assert "13,000 of 15,000 64 0.003 77.5 " in text(run_report(run))


def test_numbers_that_are_none_are_left_out(run):
    lines = [
        {"stage": "unet", "step": step, "loss": value, "lr": value, "samples_per_s": value, "memory_mb": value}
        for step, value in enumerate([float("nan"), float("inf"), None, "3", True, [1.0], 10**400])
    ]
    write_lines(run / "training" / "metrics.jsonl", lines)
    words = text(run_report(run))
    assert "U-Net 6 of 15,000 64 – – – –" in words
    assert "No loss has been logged yet." in words


def test_damaged_images_are_named(run):
    sheets = run / "training" / "samples"
    (sheets / "unet-000001.png").write_bytes(b"no image")
    (sheets / "unet-001000.png").write_bytes((sheets / "unet-001000.png").read_bytes()[:900])
    words = text(run_report(run))
    assert "unet-000001.png cannot be opened as an image." in words
    assert "unet-001000.png cannot be opened as an image." in words


def test_images_outside_of_the_run_are_not_read(run, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    inside = "samples/sample0.png"
    for outside in ("../../secret.png", str(tmp_path / "secret.png"), "a\0b", 5, None):
        pairs = [{"sample": inside, "nearest": outside, "distance": 0.1}]
        (run / "training" / "nearest.json").write_text(json.dumps(pairs))
        words = text(run_report(run))
        assert "A pair of nearest.json is damaged" in words
        assert "Nearest training images" not in words


def test_a_long_film_is_cut_but_keeps_its_ends_and_large_sheets_are_reduced(run):
    sheets = run / "training" / "samples"
    for step in range(20, 60):
        Image.new("RGB", (16, 8)).save(sheets / f"words-{step:06d}.png")
    noise = np.random.default_rng(0).integers(0, 255, (2000, 2600, 3), dtype=np.uint8)
    Image.fromarray(noise).save(sheets / "other-000001.png")
    page = run_report(run)
    assert "12 of 47 sheets are shown." in page
    for step in ("20", "13,000"):
        assert f'alt="Word maps at step {step}"' in page
    assert 'width="1280" height="985" alt="other at step 1"' in page


junk = st.one_of(
    st.binary(max_size=60),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["stage", "step", "split", "loss", "lr", "bins", "right", "count", "optim", "unet", "x"]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=8,
    ).map(lambda value: json.dumps(value).encode()),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=st.lists(junk, min_size=len(FILES), max_size=len(FILES)))
def test_whatever_is_in_the_files_there_is_a_page(tmp_path, contents):
    (tmp_path / "training").mkdir(exist_ok=True)
    for name, content in zip(FILES, contents, strict=True):
        (tmp_path / "training" / name).write_bytes(content)
    assert run_report(tmp_path).endswith("</html>\n")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    place=st.integers(0, 4),
    value=st.sampled_from([None, float("inf"), -1.0, 0.0, 1e300, 1e-320]),
    step=st.integers(0, 9),
)
def test_whatever_numbers_were_measured_there_is_a_page(tmp_path, place, value, step):
    (tmp_path / "training").mkdir(exist_ok=True)
    lines = [
        {"stage": "unet", "step": number, "split": split, **record(1000 * number, split, np.random.default_rng(number))}
        for number in range(3)
        for split in ("held_out", "training")
    ]
    names = ("right", "wrong", "empty", "empty_gain_error", "wrong_gain_error")
    lines[-2][names[place]][-1] = value
    write_lines(tmp_path / "training" / "validation.jsonl", lines)
    metrics = [{"stage": "unet", "step": number, "loss": value, "lr": value} for number in (0, step)]
    write_lines(tmp_path / "training" / "metrics.jsonl", metrics)
    assert run_report(tmp_path).endswith("</html>\n")


def drawn(*lines: ChartLine, **options) -> ElementTree.Element:
    return ElementTree.fromstring(line_chart(lines, "a chart", **options))


def labels(svg: ElementTree.Element, kind: str) -> list[str]:
    return [one.text or "" for one in svg.iter("text") if one.get("class", "").startswith(kind)]


def points(svg: ElementTree.Element) -> list[tuple[float, float]]:
    (path,) = (one.get("d", "") for one in svg.iter("path") if one.get("class", "").startswith("line"))
    return [(float(x), float(y)) for x, y in (place.split() for place in path[1:].split("L"))]


def test_points_lie_on_the_axes():
    svg = drawn(ChartLine(name="loss", x=[0, 50, 100], y=[0.0, 1.0, 2.0]), with_zero=True)
    (x0, y0), (x1, y1), (x2, y2) = points(svg)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.15)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.15)
    assert labels(svg, "tick y") == ["0.0", "0.5", "1.0", "1.5", "2.0"]
    assert labels(svg, "tick x")[:-1] == ["0", "50", "100"]
    zero = next(one for one in svg.iter("path") if one.get("class") == "zero")
    assert f" {y0:.1f}H" in zero.get("d", "")


def test_a_logarithmic_axis_has_equal_steps_for_equal_ratios():
    svg = drawn(ChartLine(name="", x=[0, 1, 2, 3], y=[100.0, 10.0, -1.0, 1.0]), scale="log")
    (_, y0), (_, y1), (_, y2) = points(svg)
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.15)
    assert labels(svg, "tick y") == ["1", "10", "100"] or labels(svg, "tick y") == [
        "1",
        "2",
        "5",
        "10",
        "20",
        "50",
        "100",
    ]


def test_names_stand_at_the_ends_of_lines_and_apart():
    lines = [
        ChartLine(name=f"line {number} <", x=[0, 1], y=[0.0, 1 + number / 99], style=number) for number in range(4)
    ]
    svg = drawn(*lines)
    names = [one for one in svg.iter("text") if one.get("class", "").startswith("name")]
    heights = [float(one.get("y", "nan")) for one in names]
    assert {one.text for one in names} == {line.name for line in lines}
    assert min(after - before for before, after in itertools.pairwise(heights)) >= 14
    assert max(heights) < 250
    assert len({one.get("class") for one in names}) == 4
    (long,) = labels(drawn(ChartLine(name=99 * "long", x=[0], y=[1.0])), "name")
    assert long == "longlonglonglonglon…"


def test_bands_go_around_their_line_and_gaps_are_left_out():
    line = ChartLine(name="", x=[0, 1, 2], y=[1.0, float("nan"), 3.0], low=[0.5, 0, 2], high=[1.5, 9, float("inf")])
    svg = drawn(line, unit="%")
    assert len(points(svg)) == 2
    band = next(one for one in svg.iter("path") if one.get("class", "").startswith("band"))
    assert band.get("d", "").count("L") == 2
    assert all(label.endswith(" %") for label in labels(svg, "tick y"))


@pytest.mark.parametrize("values", [[], [float("nan")], [float("inf"), float("-inf")]])
def test_nothing_to_draw_is_no_chart(values):
    assert line_chart([ChartLine(name="a", x=range(len(values)), y=values)], "a chart") == ""
    assert line_chart([ChartLine(name="a", x=[1], y=[-1.0])], "a chart", scale="log") == ""


@given(
    y=st.lists(st.floats(1e-12, 1e12) | st.floats(-5, 5) | st.floats(), min_size=1, max_size=20),
    scale=st.sampled_from(["linear", "log"]),
    unit=st.sampled_from(["", "%"]),
    with_zero=st.booleans(),
)
def test_any_numbers_are_drawn_inside_of_the_picture_with_a_few_distinct_ticks(y, scale, unit, with_zero):
    chart = line_chart(
        [ChartLine(name="a", x=range(len(y)), y=y)], "a chart", scale=scale, unit=unit, with_zero=with_zero
    )
    if not chart:
        assert not any(1e-9 < value < 1e9 for value in y)
        return
    svg = ElementTree.fromstring(chart)
    assert all(0 <= x <= 480 and 0 <= place <= 250 for x, place in points(svg))
    ticks = labels(svg, "tick y")
    assert len(ticks) == len(set(ticks)) <= 8


def test_a_running_mean_keeps_a_constant_and_a_slope():
    assert running_mean([3.0] * 7) == [3.0] * 7
    slope = [float(number) for number in range(200)]
    assert running_mean(slope)[5:-5] == slope[5:-5]
    assert running_mean([]) == []


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(params=[(1280, "light"), (390, "dark")], ids=["desk", "phone"])
def tab(request, browser, whole) -> Iterator[Page]:
    """The page of the run without a network, in which no error may come up."""
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    tab = context.new_page()
    errors: list[str] = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    tab.goto(write_run_report(whole).as_uri())
    yield tab
    context.close()
    assert not errors


def test_the_page_fits_its_window_and_its_words_do_not_overlap(tab):
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert tab.locator("svg").count() > 15
    assert tab.evaluate(
        """() => [...document.querySelectorAll("svg")].every((svg) => {
            const words = [...svg.querySelectorAll("text")];
            const boxes = words.map((one) => one.getBoundingClientRect());
            return boxes.every((a, i) => boxes.slice(i + 1).every((b) => a.right <= b.left + 1 || b.right <= a.left + 1
                || a.bottom <= b.top + 4 || b.bottom <= a.top + 4));
        })"""
    )
    assert tab.evaluate(
        """() => [...document.querySelectorAll("svg")].filter((svg) => svg.getBoundingClientRect().width)
            .every((svg) => [...svg.querySelectorAll("text")].every((one) =>
                one.getBoundingClientRect().right <= innerWidth))"""
    )


def test_a_slider_goes_through_the_sheets(tab):
    film = tab.locator(".film").first
    assert film.locator("img:visible").get_attribute("alt") == "Painted from prompts at step 13,000"
    slider = film.get_by_role("slider")
    slider.press("Home")
    assert film.locator("img:visible").get_attribute("alt") == "Painted from prompts at step 1,000"
    assert film.locator("label").inner_text().startswith("Step 1,000")
    slider.press("ArrowRight")
    assert film.locator("img:visible").get_attribute("alt") == "Painted from prompts at step 3,000"


def test_printed_it_is_black_on_white_and_shows_the_first_and_the_last_sheet(tab):
    tab.emulate_media(media="print")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    film = tab.locator(".film").first
    steps = [image.get_attribute("alt") for image in film.locator("img:visible").all()]
    assert steps == ["Painted from prompts at step 1,000", "Painted from prompts at step 13,000"]
