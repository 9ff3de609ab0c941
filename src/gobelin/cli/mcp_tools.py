"""The tools of ``gobelin mcp``: what a language model may ask of a pipeline."""

import functools
import json
from collections.abc import Callable
from typing import Annotated, Any

import anyio.to_thread
from annotated_types import Interval, Len
from mcp.server import MCPServer
from mcp.server.mcpserver import Image
from mcp.server.mcpserver.exceptions import ToolError

from gobelin.errors import GobelinError, UsageError
from gobelin.evaluate.benchmark import benchmark_report, measure_scenes
from gobelin.evaluate.image_list import ALL_TASKS, requested_images
from gobelin.evaluate.scored_images import GenerationSettings
from gobelin.images import png_bytes
from gobelin.look.word_sheets import word_sheet
from gobelin.pipeline import Pipeline
from gobelin.scenes import WORLDS
from gobelin.settings import MAX_SEED

_INSTRUCTIONS = """\
Gobelin paints images from prompts with the model {name!r}, of about {side}×{side} pixels. Ask `look` which word painted
which pixel. The same seed and settings give the same image.
"""
_Prompt = Annotated[str, Len(1, 4000)]
_Seed = Annotated[int, Interval(ge=0, le=MAX_SEED)] | None
_Steps = Annotated[int, Interval(ge=1, le=150)] | None
_Count = Annotated[int, Interval(ge=1, le=4)]
_Limit = Annotated[int, Interval(ge=1, le=25)]
_Side = Annotated[int, Interval(ge=8, le=2048)] | None


def make_tools(pipeline: Pipeline) -> MCPServer[Any]:
    """Make an MCP server with the tools ``paint``, ``look`` and ``evaluate``; the model runs one at a time."""
    side = pipeline.unet.config.sample_size * pipeline.vae.config.factor
    server = MCPServer[Any]("gobelin", instructions=_INSTRUCTIONS.format(name=pipeline.name, side=side))
    model = anyio.Lock()

    async def with_model(call: Callable[[], list[Any]]) -> list[Any]:
        """Call in a thread, while nobody else uses the model; an error of ours becomes the tool's sentence."""
        async with model:
            try:
                return await anyio.to_thread.run_sync(call)
            except GobelinError as error:
                raise ToolError(str(error)) from error

    @server.tool(structured_output=False)
    async def paint(
        prompt: _Prompt,
        negative_prompt: str = "",
        seed: _Seed = None,
        steps: _Steps = None,
        height: _Side = None,
        width: _Side = None,
        count: _Count = 1,
    ) -> list[Any]:
        """Paint a prompt; returns the settings of each image, with its seed, and the images."""
        settings = {"seed": seed, "steps": steps, "height": height, "width": width}
        made = functools.partial(_paint, pipeline, prompt, {**settings, "negative_prompt": negative_prompt}, count)
        return await with_model(made)

    @server.tool(structured_output=False)
    async def look(prompt: _Prompt, seed: _Seed = None, steps: _Steps = None) -> list[Any]:
        """Paint a prompt and see which word painted which pixel; returns each word's place and share, and a sheet."""
        return await with_model(functools.partial(_look, pipeline, prompt, {"seed": seed, "steps": steps}))

    @server.tool(structured_output=False)
    async def evaluate(prompts_a_task: _Limit = 2) -> list[Any]:
        """Score how faithfully a model of scenes paints its prompts, on few prompts: minutes, and wide intervals."""
        return await with_model(functools.partial(_evaluate, pipeline, prompts_a_task))

    return server


def _image(image: Any) -> Image:
    return Image(data=png_bytes(image), format="png")


def _paint(pipeline: Pipeline, prompt: str, settings: dict[str, Any], count: int) -> list[Any]:
    result = pipeline(prompt, count=count, **settings)
    return [json.dumps(result.settings, ensure_ascii=False), *map(_image, result.images)]


def _look(pipeline: Pipeline, prompt: str, settings: dict[str, Any]) -> list[Any]:
    result = pipeline(prompt, trace="sharp", **settings)
    heatmaps = result.heatmaps[0]
    words = []
    for number, span in enumerate(heatmaps.words.spans):
        raw = heatmaps[number].raw
        row, column = divmod(int(raw.argmax()), raw.shape[1])
        words.append({"word": span.word, "most_at": [column, row], "most": round(raw.max().item(), 4)})
    summary = {"settings": result.settings[0], "words": words}
    sheet = word_sheet(heatmaps, range(len(heatmaps.words)))
    return [json.dumps(summary, ensure_ascii=False), _image(result.images[0]), _image(sheet)]


def _evaluate(pipeline: Pipeline, prompts_a_task: int) -> list[Any]:
    world = pipeline.model.world
    if world not in WORLDS:
        raise UsageError("this model was not trained on a world of scenes, whose truth is known: it cannot be scored")
    requests = requested_images(WORLDS[world], ("test",), ALL_TASKS, prompts_a_task, 1)
    benchmark = measure_scenes(pipeline, WORLDS[world], requests, GenerationSettings(seed=0), None, lambda done: None)
    return [benchmark_report(benchmark.to_json()).markdown(level=2)]
