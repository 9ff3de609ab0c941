import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from gobelin.errors import DataError
from gobelin.formats.generation_info.a1111 import format_a1111_parameters, parse_a1111_parameters
from gobelin.formats.generation_info.all_programs import read_generation_info
from gobelin.formats.png import (
    read_png_settings,
    write_png,
)
from gobelin.samplers import SAMPLERS

SETTINGS = {
    "prompt": "a red circle above a blue square",
    "negative_prompt": "",
    "steps": 20,
    "sampler": "dpmpp_2m",
    "guidance": 7.5,
    "seed": 42,
    "width": 64,
    "height": 48,
    "model": "runs/nano",
}


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "prompt",
    [
        "a red circle",
        "",
        "ein grüner Kreis",
        "赤い丸 🔴 “quoted”",
        'two\nlines\tand "quotes" \\',
        "nul \x00 in it",
        "x" * 5000,
    ],
    ids=["plain", "empty", "latin", "unicode", "escapes", "nul", "long"],
)
def test_a_picture_remembers_its_settings_and_its_pixels(prompt: str, picture: Image.Image, tmp_path: Path) -> None:
    settings = {**SETTINGS, "prompt": prompt, "negative_prompt": prompt, "extra": [1, None, {"a": 0.5}]}
    file = tmp_path / "out" / "picture.png"
    write_png(file, picture, settings)
    assert read_png_settings(file) == settings
    with Image.open(file) as read:
        assert read.format == "PNG"
        assert np.array_equal(np.asarray(read), np.asarray(picture))
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("prompt", ["a red circle", "赤い丸 🔴"])
def test_the_web_ui_finds_its_own_text(prompt: str, picture: Image.Image, tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", picture, {**SETTINGS, "prompt": prompt})
    with Image.open(tmp_path / "a.png") as read:
        assert read.info["parameters"].splitlines()[0] == prompt


def test_the_web_ui_text_is_prompt_negative_prompt_and_fields() -> None:
    fields = "Steps: 20, Sampler: DPM++ 2M, Schedule type: Uniform, CFG scale: 7.5, Seed: 42, Size: 64x48"
    fields += ", Model: runs/nano"
    assert format_a1111_parameters(SETTINGS) == f"a red circle above a blue square\n{fields}"
    assert format_a1111_parameters({**SETTINGS, "negative_prompt": "blur"}) == (
        f"a red circle above a blue square\nNegative prompt: blur\n{fields}"
    )


def test_a_picture_without_settings_is_named(picture: Image.Image, tmp_path: Path) -> None:
    picture.save(tmp_path / "plain.png")
    with pytest.raises(DataError, match=r"plain\.png carries no settings"):
        read_png_settings(tmp_path / "plain.png")


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    file = tmp_path / "broken.png"
    with pytest.raises(DataError, match=r"there is no image at .*broken\.png"):
        read_png_settings(file)
    file.write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"broken\.png cannot be read as an image"):
        read_png_settings(file)


A1111_TEXT = (
    "a castle, (sunset:1.2)\nwith two lines\nNegative prompt: blurry, [dull]\n"
    "Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7.5, Seed: 965400086, Size: 512x768, Model hash: 6ce0161689, "
    'Model: v1-5, Clip skip: 2, Lora hashes: "a: 1, b: 2", ENSD: 31337, Version: v1.6.0'
)
COMFYUI_GRAPH = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 8566257,
            "steps": 20,
            "cfg": 8,
            "sampler_name": "euler_ancestral",
            "scheduler": "normal",
            "denoise": 1,
            "model": ["9", 0],
            "positive": ["6", 0],
            "negative": ["7", 0],
            "latent_image": ["5", 0],
        },
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "v1-5-pruned-emaonly.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"batch_size": 1, "height": 512, "width": 640}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["4", 1], "text": "a (glass:1.2) bottle"}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["4", 1], "text": "text, watermark"}},
    "9": {"class_type": "LoraLoader", "inputs": {"model": ["4", 0], "lora_name": "style.safetensors"}},
}


def with_text(picture: Image.Image, file: Path, **texts: str) -> Path:
    info = PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    picture.save(file, pnginfo=info)
    return file


def test_ours_are_remembered_first(picture: Image.Image, tmp_path: Path) -> None:
    write_png(tmp_path / "x.png", picture, SETTINGS)
    found = read_generation_info(tmp_path / "x.png", SAMPLERS)
    assert (found.settings, found.source, found.missing) == (SETTINGS, "Gobelin", [])


def test_automatic1111s_text_is_read(picture: Image.Image, tmp_path: Path) -> None:
    found = read_generation_info(with_text(picture, tmp_path / "x.png", parameters=A1111_TEXT), SAMPLERS)
    assert found.settings == {
        "prompt": "a castle, (sunset:1.2)\nwith two lines",
        "negative_prompt": "blurry, [dull]",
        "weights": "a1111",
        "steps": 20,
        "sampler": "dpmpp_2m_karras",
        "guidance": 7.5,
        "seed": 965400086,
        "width": 512,
        "height": 768,
        "clip_skip": 1,
        "model": "v1-5",
    }
    size = "the image is 64 x 48, and its settings say 512 x 768: it was changed afterwards"
    assert found.missing[1:] == ["Lora hashes: a: 1, b: 2", "ENSD: 31337", size]


@pytest.mark.parametrize(
    ("fields", "sampler", "missing"),
    [
        ("Steps: 5, Sampler: Euler a, Schedule type: Automatic, CFG scale: 7, Seed: 1", "euler_ancestral", []),
        ("Steps: 5, Sampler: LMS, Schedule type: Karras, CFG scale: 7, Seed: 1", "lms_karras", []),
        ("Steps: 5, Sampler: DPM fast, CFG scale: 7, Seed: 1", None, ["the sampler DPM fast"]),
        ("Steps: 5, Sampler: Euler a Karras", "euler_ancestral", ["the schedule Karras of euler_ancestral"]),
        ("Steps: 5, Sampler: PLMS, CFG scale: 7", "pndm", ["no Seed"]),
    ],
)
def test_samplers_of_automatic1111_have_our_names(fields: str, sampler: str | None, missing: list[str]) -> None:
    found = parse_a1111_parameters(f"a ring\n{fields}", SAMPLERS)
    assert found.settings.get("sampler") == sampler
    assert set(missing) <= set(found.missing)


def test_our_own_text_for_automatic1111_is_read_back() -> None:
    odd = {"negative_prompt": "blue", "sampler": "dpm_2_ancestral_karras", "clip_skip": 1, "model": 'my, "own": model'}
    found = parse_a1111_parameters(format_a1111_parameters(SETTINGS | odd), SAMPLERS).settings
    expected = SETTINGS | odd | {"weights": "a1111"}
    assert found == {name: value for name, value in expected.items() if name in found}
    assert {*odd, "prompt", "steps", "guidance", "seed", "width", "height"} < found.keys()


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_has_a_name_in_automatic1111(name: str) -> None:
    assert (
        parse_a1111_parameters(format_a1111_parameters(SETTINGS | {"sampler": name}), SAMPLERS).settings["sampler"]
        == name
    )


def test_added_networks_and_a_vae_are_missed() -> None:
    fields = "Steps: 5, Sampler: Euler, Schedule type: Exponential, CFG scale: 7, Seed: 1, Size: 8x8, Model: y, VAE: x"
    text = f"a <lora:style:0.7> ring\n{fields}"
    found = parse_a1111_parameters(text, SAMPLERS)
    assert found.settings["prompt"] == "a  ring"
    assert found.missing[1:] == ["the added network <lora:style:0.7>", "the schedule Exponential of euler", "VAE: x"]


def test_lines_of_any_length_are_read() -> None:
    for line in (";" + " " * 50_000, "a" * 50_000, '"' * 50_000, "a: " * 20_000, "Steps: 5, " + ", " * 20_000):
        parse_a1111_parameters(f"a ring\n{line}", SAMPLERS)


def test_comfyuis_graph_is_read(picture: Image.Image, tmp_path: Path) -> None:
    found = read_generation_info(with_text(picture, tmp_path / "x.png", prompt=json.dumps(COMFYUI_GRAPH)), SAMPLERS)
    assert found.settings == {
        "prompt": "a (glass:1.2) bottle",
        "negative_prompt": "text, watermark",
        "weights": "comfyui",
        "steps": 20,
        "sampler": "euler_ancestral",
        "guidance": 8,
        "seed": 8566257,
        "width": 640,
        "height": 512,
        "model": "v1-5-pruned-emaonly",
    }
    size = "the image is 64 x 48, and its settings say 640 x 512: it was changed afterwards"
    assert found.missing[1:] == ["a LoraLoader (lora_name: style.safetensors)", size]


@given(st.text(max_size=80))
def test_any_text_is_read_or_refused(text: str) -> None:
    parse_a1111_parameters(text, SAMPLERS)


@pytest.mark.parametrize("graph", ["{}", "[]", "{", '{"3": 1}'])
def test_graphs_without_a_sampler_are_refused(graph: str, picture: Image.Image, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x\.png"):
        read_generation_info(with_text(picture, tmp_path / "x.png", prompt=graph), SAMPLERS)


@pytest.mark.parametrize("inputs", ["[]", "{}", '{"positive": ["9", 0]}', '{"positive": "a ring"}'])
def test_graphs_whose_prompt_is_not_there_say_so(inputs: str, picture: Image.Image, tmp_path: Path) -> None:
    graph = f'{{"3": {{"class_type": "KSampler", "inputs": {inputs}}}}}'
    found = read_generation_info(with_text(picture, tmp_path / "x.png", prompt=graph), SAMPLERS)
    assert "the positive prompt, which is not plain text" in found.missing


def test_a_picture_that_says_nothing_is_named(picture: Image.Image, tmp_path: Path) -> None:
    picture.save(tmp_path / "x.png")
    with pytest.raises(DataError, match=r"x\.png does not say how it was made"):
        read_generation_info(tmp_path / "x.png", SAMPLERS)
