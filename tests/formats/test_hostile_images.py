"""Images whose texts were made to harm: each is one clear error, or settings of the right types and words."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tests.formats.test_generation_info import (
    A1111,
    DRAW_THINGS,
    EASY_DIFFUSION,
    FOOOCUS,
    GRAPH,
    INVOKEAI,
    NOVELAI,
    SWARMUI,
    XMP,
    with_comment,
    with_exif,
)
from tests.trials import trials

from gobelin.errors import DataError
from gobelin.formats.generation_info.all_programs import read_generation_info
from gobelin.formats.generation_info.draft import GenerationInfo
from gobelin.samplers import SAMPLERS

TRIALS = trials(100)
TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("prompt", "negative_prompt", "weights", "sampler", "model"), str),
    **dict.fromkeys(("steps", "seed", "width", "height", "clip_skip"), int),
    **dict.fromkeys(("guidance", "guidance_rescale"), (int, float)),
}
KEYWORDS = (
    "parameters",
    "prompt",
    "Comment",
    "invokeai_metadata",
    "sd-metadata",
    "Dream",
    "XML:com.adobe.xmp",
    "Software",
)

numbers = st.sampled_from([-1, 0, 1, 10**25, 10**400, 1e308, -0.5, float("nan"), float("inf")]) | st.integers(-99, 99)
texts = st.text(max_size=6) | st.sampled_from(
    ["-1", "nan", "1e999", "9" * 50, "x\ud800y", "\x1b[0m", "<segment:", "[a:b:"]
)
links = st.tuples(st.sampled_from([*GRAPH, 3, "none"]), st.sampled_from([0, 1, 2, -1, "0", None, 2**70])).map(list)
leaves = st.none() | st.booleans() | numbers | texts | links
values = st.recursive(
    leaves, lambda one: st.lists(one, max_size=3) | st.dictionaries(texts, one, max_size=3), max_leaves=5
)
kinds = st.sampled_from(
    [
        *("KSampler", "KSamplerAdvanced", "Reroute", "CLIPTextEncode", "CLIPSetLastLayer", "ConditioningZeroOut"),
        *("PrimitiveInt", "EmptyLatentImage", "ControlNetApplyAdvanced", "ConditioningCombine", "SaveImage", "Other"),
    ]
)


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to every value in a JSON content."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [path, *(way for name, value in inner for way in places(value, (*path, name)))]


@st.composite
def tampered(draw: st.DrawFn) -> Any:
    """What a program stores, with other values in it."""
    programs = [GRAPH, FOOOCUS, SWARMUI, INVOKEAI, DRAW_THINGS, EASY_DIFFUSION, NOVELAI, {"image": {"prompt": "a [b]"}}]
    content: Any = {"content": deepcopy(draw(st.sampled_from(programs)))}
    for _ in range(draw(st.integers(1, 4))):
        *way, last = draw(st.sampled_from(places(content)[1:]))
        inner = content
        for name in way:
            inner = inner[name]
        inner[last] = draw(kinds if last == "class_type" else values)
    return content["content"]


@st.composite
def fields(draw: st.DrawFn) -> str:
    """AUTOMATIC1111's text, with parts of it changed, doubled or left out."""
    parts = A1111.replace("\n", ", ").split(", ")
    added = st.sampled_from(
        ['"', "[", "{", "]", "\n", ", ", ": ", "Steps: ", "Civitai resources: ", "Negative prompt:", "a: [1"]
    )
    drawn = draw(st.lists(st.sampled_from(parts) | added | texts, max_size=12))
    return ", ".join(draw(st.permutations([*drawn, "Steps: 20"]))) + draw(st.sampled_from(["", "\nSteps: 1, Seed: 2"]))


def assert_harmless(file: Path) -> None:
    """Refused in a short sentence that names the file, or read to settings of their types and short lines."""
    refused = ""
    try:
        found = read_generation_info(file, SAMPLERS)
    except DataError as error:
        found, refused = GenerationInfo(settings={}, source=""), str(error)
    assert not refused or (str(file) in refused and len(refused) < 500 + len(str(file)))
    for name, value in found.settings.items():
        assert isinstance(value, TYPES[name])
        assert not isinstance(value, bool)
    assert len(found.missing) < 100
    assert all(one.isprintable() and len(one) < 300 for one in found.missing)


def save(file: Path, **texts: str) -> Path:
    info = PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text.encode("utf-8", "replace").decode())
    Image.new("L", (4, 4)).save(file, pnginfo=info)
    return file


@TRIALS
@given(content=tampered(), keyword=st.sampled_from(KEYWORDS), scheme=st.sampled_from(["fooocus", "a1111", ""]))
def test_tampered_json(content: Any, keyword: str, scheme: str, tmp_path: Path) -> None:
    text = json.dumps(content)
    assert_harmless(save(tmp_path / "x.png", **{keyword: text, "fooocus_scheme": scheme}))
    if keyword == "XML:com.adobe.xmp":
        assert_harmless(save(tmp_path / "x.png", **{keyword: XMP.format(text)}))
    if isinstance(content, dict):
        assert_harmless(
            save(
                tmp_path / "x.png",
                **{name or "x": str(value) for name, value in content.items() if name.isascii() and name.isprintable()},
            )
        )


@TRIALS
@given(text=fields(), keyword=st.sampled_from(["parameters", "Dream", "Comment"]))
def test_tampered_texts(text: str, keyword: str, tmp_path: Path) -> None:
    assert_harmless(save(tmp_path / "x.png", **{keyword: text}))


@TRIALS
@given(
    suffix=st.sampled_from(["png", "jpeg", "webp"]),
    changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=8),
    comment=st.binary(max_size=24) | st.binary(max_size=16).map(lambda body: b"UNICODE\0" + body),
)
def test_tampered_files(suffix: str, changes: list[tuple[int, int]], comment: bytes, tmp_path: Path) -> None:
    """Bytes anywhere in an image with EXIF: broken EXIF, broken chunks, broken pixels."""
    file = tmp_path / f"x.{suffix}"
    with_comment(file, comment)
    assert_harmless(file)
    with_exif(file, {0x0110: f"prompt:{json.dumps(GRAPH)}"}, {0x9286: b"UNICODE\0" + A1111.encode("utf-16-be")})
    whole = bytearray(file.read_bytes())
    for place, value in changes:
        whole[place % len(whole)] = value
    file.write_bytes(whole)
    assert_harmless(file)


DEEP = 100_000
MANY = 20_000


@pytest.mark.parametrize(
    "text",
    [
        '{"a":' * DEEP + "1" + "}" * DEEP,
        "[" * DEEP,
        '{"c": ' + "[" * 900 + "]" * 900 + ', "uc": "", "model": {"a": 1}}',
        '{"3": {"class_type": "KSampler", "inputs": {"seed": ' + "9" * 5000 + "}}}",
        json.dumps({str(number): {"class_type": "KSampler"} for number in range(MANY + 1)}),
        json.dumps(
            {
                str(number): {"class_type": "KSampler", "inputs": {"latent_image": [str(number + 1), 0]}}
                for number in range(9_900)
            }
        ),
        json.dumps(
            {
                str(number): {
                    "class_type": "Reroute" if number else "KSampler",
                    "inputs": {"positive": [str((number + 1) % 9000), 0]},
                }
                for number in range(9_000)
            }
        ),
        json.dumps({"3": {"class_type": "KSampler", "inputs": {str(number): ["3", 0] for number in range(MANY)}}}),
        json.dumps({"sui_image_params": {"prompt": "<a" * MANY, "loras": "a," * MANY, "x": "y" * 10**6}}),
        json.dumps({"sui_image_params": {str(number): number for number in range(MANY)}}),
        json.dumps({"c": "[" * MANY, "uc": "{" + "|" * MANY}),
        *(
            f"a cat\nSteps: 1, {one * MANY}"
            for one in ("[", "{", 'a: "', 'a: ["', "a: [1,", ", ", " ", ":", "a: {},", "<lora:", "(")
        ),
        *(
            f"{one}\nSteps: 1"
            for one in ("[a:" + "1" * MANY, "[" + "|" * MANY, "{" + "|" * MANY, "[a:1" * 20_000, "<" + "lora" * 20_000)
        ),
        "Steps: 1\n" * MANY,
        "\n" * 10**6,
    ],
)
def test_texts_that_take_long_to_read(text: str, tmp_path: Path) -> None:
    """Each is done: what reads it takes a time that grows with the text, not with its square."""
    for keyword in ("parameters", "prompt"):
        assert_harmless(save(tmp_path / "x.png", **{keyword: text}))


@pytest.mark.parametrize(
    "command",
    [
        '"' + "\\a" * MANY,
        '"x" ' + "-a " * MANY,
        '"x" ' + "-" * MANY,
        '"' + "[" * MANY + '" -s 1',
        '"' + "a+" * MANY + '"',
    ],
)
def test_commands_that_take_long_to_read(command: str, tmp_path: Path) -> None:
    assert_harmless(save(tmp_path / "x.png", Dream=command))


def test_entities_of_xmp_are_not_expanded(tmp_path: Path) -> None:
    entities = "".join(f'<!ENTITY a{number + 1} "{f"&a{number};" * 10}">' for number in range(12))
    bomb = f'<!DOCTYPE x [<!ENTITY a0 "ha">{entities}]>' + XMP.format('{"c": "&a12;", "uc": "", "model": "m"}')
    file = save(tmp_path / "x.png", **{"XML:com.adobe.xmp": bomb})
    assert read_generation_info(file, SAMPLERS).settings["prompt"] == "&a12;"
    for many in (
        "<exif:UserComment>" * MANY,
        '<exif:UserComment x="' * MANY,
        "<exif:UserComment><" + "<" * MANY + "</exif:UserComment>",
    ):
        assert_harmless(save(tmp_path / "x.png", **{"XML:com.adobe.xmp": many}))
