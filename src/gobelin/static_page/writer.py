"""The writer of the page's folder: graphs, runtime, the page's own files, and ``model.json`` about the model."""

import base64
import gzip
import hashlib
import shlex
import shutil
import tempfile
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

import gobelin
from gobelin.checkpoint import Model
from gobelin.checkpoint.shipped import SHIPPED
from gobelin.errors import UsageError
from gobelin.formats.files import write_json
from gobelin.look.colour_map import colour_map
from gobelin.plan import inpaints
from gobelin.samplers import find_noise_levels
from gobelin.scenes import WORLDS
from gobelin.scenes.vocabulary import caption_words, vocabulary
from gobelin.static_page.browser_graphs import (
    DECODER,
    TEXT_ENCODER,
    UNET,
    WORD_MAPS,
    page_size,
    page_trace,
    write_graphs,
)
from gobelin.static_page.runtime_files import PACKAGE, PROGRAM, SCRIPT, RuntimeFiles
from gobelin.text_conditioning import CHUNKED_LENGTH

SAMPLERS_THERE = ("ddpm", "ddim", "euler", "euler_karras", "dpmpp_2m", "dpmpp_2m_karras")
"""The samplers that ``samplers.js`` has."""
_STEPS = (10, 25, 50)  # to choose from, beside what the model recommends
_COPIED = (
    *("index.html", "page.css", "page.js", "painter.js", "networks.js", "samplers.js", "noise.js", "tokenizer.js"),
    *("prompt_words.js", "maps.js", "png.js", "sentences.js", "service_worker.js", "logo.svg", "licences.txt"),
)
_OF_LOOK = ("word_map.js", "trust.js")
_EXAMPLES = (  # of which a model is given those whose words it was taught
    *("a red circle to the left of a blue star", "three green rings", "a yellow star above a purple ring"),
    *("a white cross", "a pink diamond and a brown box", "a red ring and a blue square", "a yellow triangle"),
)
_MOST_EXAMPLES = 5


def write_page(model: Model, folder: Path, runtime: RuntimeFiles) -> int:
    """Write the page into a folder that is not there yet, or empty; returns its size in bytes.

    The model's weights must be in float32, on the CPU. Raises :class:`UsageError` for a model that the page cannot
    paint with and where ONNX is not installed, and :class:`ModelError` for what cannot be exported; nothing is written
    then.
    """
    _refuse_unsupported(model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        made = Path(temporary) / folder.name
        (made / "onnxruntime").mkdir(parents=True)
        heavy = [*write_graphs(model, made), *_write_runtime(runtime, made / "onnxruntime")]
        for name in _COPIED:
            (made / name).write_bytes(files("gobelin.static_page").joinpath(name).read_bytes())
        for name in _OF_LOOK:
            (made / name).write_bytes(files("gobelin.look").joinpath(name).read_bytes())
        write_json(made / "model.json", _describe(model, made, heavy))
        if folder.is_dir():  # an empty one
            folder.rmdir()
        shutil.move(made, folder)
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _write_runtime(runtime: RuntimeFiles, folder: Path) -> Iterable[Path]:
    """Write the runtime; its program is compressed, as many hosts do not compress what they send."""
    script = folder / SCRIPT.replace(".mjs", ".js")  # as some hosts do not know the type of .mjs
    program = folder / f"{PROGRAM}.gz"
    script.write_bytes(runtime.script)
    program.write_bytes(gzip.compress(runtime.program, mtime=0))
    return script, program


def _refuse_unsupported(model: Model) -> None:
    """Raise :class:`UsageError` for a model that the page's scripts do not know how to paint with."""
    sampler = model.recommended.sampler
    words = model.tokenizer.own_words()
    for is_refused, problem in (
        (
            model.tokenizer.max_length == CHUNKED_LENGTH,
            f"this model reads prompts in chunks of {CHUNKED_LENGTH} tokens, as Stable Diffusion does, and is too "
            "large for a page: give one that Gobelin trained from scratch",
        ),
        (
            inpaints(model.unet),
            "this is an inpainting model, which needs an image: give one that paints from words alone",
        ),
        (bool(words), f"the tokenizer has added words ({', '.join(words[:3])}), which the page does not know"),
        (
            sampler not in SAMPLERS_THERE,
            f"the model recommends the sampler {sampler}, and the page has {', '.join(SAMPLERS_THERE)}: name one of "
            "them in its gobelin.json",
        ),
    ):
        if is_refused:
            raise UsageError(problem)


def _describe(model: Model, folder: Path, heavy: Iterable[Path]) -> dict[str, Any]:
    """Describe the model as the page's scripts need it; ``heavy`` are its large files."""
    asked, factor = model.recommended, model.vae.config.factor
    assert asked.sampler is not None
    assert asked.steps is not None
    h, w = page_size(model)
    numbers = sum(
        weight.numel() for network in (model.unet, model.vae, model.text_encoder) for weight in network.parameters()
    )
    return {
        "generator": f"gobelin {gobelin.__version__}",
        "runtime": PACKAGE,
        "name": model.name,
        "command": "gobelin generate" + ("" if model.name == SHIPPED else f" --model {shlex.quote(model.name)}"),
        "numbers": numbers,
        "files": [_describe_file(path, folder) for path in heavy],
        "graphs": {"text": TEXT_ENCODER, "unet": UNET, "decoder": DECODER, "maps": WORD_MAPS},
        "latents": [model.vae.config.latent_channels, h, w],
        "image": [h * factor, w * factor],
        "tokenizer": {
            "vocab": model.tokenizer.vocab,
            "merges": [" ".join(pair) for pair in model.tokenizer.merges],
            "maxLength": model.tokenizer.max_length,
        },
        "predictionType": model.schedule.prediction_type,
        "sampler": asked.sampler,
        "steps": asked.steps,
        "guidance": asked.guidance,
        "guidanceRescale": asked.guidance_rescale or 0.0,
        "negativePrompt": asked.negative_prompt or "",
        "clipSkip": asked.clip_skip or 0,
        "isWeighted": page_trace(model).head_weights is not None,
        "pointing": model.pointing,
        "levels": {str(steps): _describe_levels(model, steps) for steps in _step_counts(model)},
        "colours": base64.b64encode(colour_map().tobytes()).decode("ascii"),
        **_describe_world(model),
    }


def _describe_world(model: Model) -> dict[str, Any]:
    """Describe what captions taught the model: what they say by kind, all their words, and prompts made of these."""
    world = WORLDS.get(model.world or "")
    if world is None:
        return {"examples": list(model.examples[:_MOST_EXAMPLES]), "vocabulary": {}, "words": None}
    words = caption_words(world)
    examples = [text for text in _EXAMPLES if words.issuperset(text.split())]
    return {"examples": examples[:_MOST_EXAMPLES], "vocabulary": vocabulary(world), "words": sorted(words)}


def _describe_file(path: Path, folder: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {
        "name": path.relative_to(folder).as_posix(),
        "bytes": len(content),
        "version": hashlib.sha256(content).hexdigest()[:12],
    }


def _step_counts(model: Model) -> list[int]:
    """List the numbers of steps that the page offers."""
    most = model.schedule.config.num_train_timesteps
    return sorted({model.recommended.steps or most, *(steps for steps in _STEPS if steps <= most)})


def _describe_levels(model: Model, steps: int) -> dict[str, Any]:
    """Describe the noise levels of so many steps, and the step (from 0) from which their maps count."""
    assert model.recommended.sampler is not None
    levels = find_noise_levels(model.recommended.sampler, model.schedule, steps)
    start = page_trace(model).start
    late = [index for index, t in enumerate(levels.timesteps) if model.schedule.progress(t) >= start]
    return {
        "mapsFrom": min([*late, len(levels.timesteps) - 1]),
        "timesteps": levels.timesteps,
        "alphas": levels.alphas_cumprod,
        "nextAlphas": levels.next_alphas_cumprod,
        "startScale": levels.start_scale,
    }
