"""``gobelin mcp``, by MCP's own client: in this process with a small model, and once as a program does it."""

import asyncio
import base64
import io
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gobelin.cli import mcp as command
from gobelin.pipeline import Pipeline

pytest.importorskip("mcp")
from mcp import Client, StdioServerParameters

from gobelin.cli.mcp_tools import make_tools


@pytest.fixture(scope="module")
def pipe(clip_model: Callable[..., Any]) -> Pipeline:
    return Pipeline(clip_model())


def called(server: Any, name: str, **arguments: Any) -> Any:
    """Call a tool, and return its result."""

    async def call() -> Any:
        async with Client(server) as client:
            return await client.call_tool(name, arguments)

    return asyncio.run(call())


def pixels(content: Any) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content.data))).convert("RGB"))


def test_paint_gives_the_pipelines_images_and_settings(pipe: Pipeline) -> None:
    result = called(make_tools(pipe), "paint", prompt="a red circle", seed=3, steps=2, count=2)
    expected = pipe("a red circle", seed=3, steps=2, count=2)
    settings, *images = result.content
    assert json.loads(settings.text) == expected.settings
    for ours, theirs in zip(images, expected.images, strict=True):
        assert np.array_equal(pixels(ours), np.asarray(theirs))


def test_look_says_where_each_word_is(pipe: Pipeline) -> None:
    summary, image, sheet = called(make_tools(pipe), "look", prompt="a red circle", seed=3, steps=2).content
    assert [one["word"] for one in json.loads(summary.text)["words"]] == ["a", "red", "circle"]
    assert pixels(image).shape == (64, 64, 3)
    assert pixels(sheet).shape[1] > 64


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("paint", {"prompt": " "}),
        ("paint", {"prompt": "a ring", "height": 63}),
        ("paint", {"prompt": "a ring", "count": 99}),
        ("paint", {}),
        ("look", {"prompt": "a ring", "steps": 0}),
        ("evaluate", {}),
    ],
)
def test_mistakes_are_told_to_the_model(pipe: Pipeline, name: str, arguments: dict[str, Any]) -> None:
    result = called(make_tools(pipe), name, **arguments)
    assert result.is_error
    assert "Traceback" not in result.content[0].text


@pytest.mark.slow
def test_a_program_starts_it_and_evaluates_the_shipped_model() -> None:
    parameters = StdioServerParameters(command=sys.executable, args=["-m", "gobelin", "mcp"], env=dict(os.environ))
    result = called(parameters, "evaluate", prompts_a_task=1)
    assert "Faithfulness to the prompt" in result.content[0].text


def test_what_is_not_installed(refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert refused("mcp") == (2, "mcp is not installed: pip install 'gobelin[mcp]'")
