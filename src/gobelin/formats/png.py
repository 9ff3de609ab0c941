"""PNG metadata: the settings of an image in text chunks, Gobelin's own, AUTOMATIC1111's and ComfyUI's."""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from gobelin.errors import DataError, ModelError
from gobelin.formats.files import parse_json, replacing
from gobelin.prompt_weighting import schedules

# The keywords of the text chunks.
_GOBELIN_KEY = "gobelin"
_A1111_KEY = "parameters"
_COMFYUI_KEY = "prompt"

# AUTOMATIC1111's names for our samplers; "Karras" follows, there or as a field of its own.
_A1111_SAMPLERS = {
    "Euler": "euler",
    "Euler a": "euler_ancestral",
    "LMS": "lms",
    "Heun": "heun",
    "DPM2": "dpm_2",
    "DPM2 a": "dpm_2_ancestral",
    "DPM++ 2M": "dpmpp_2m",
    "DPM++ 2M SDE": "dpmpp_2m_sde",
    "DDIM": "ddim",
    "PLMS": "pndm",
    "UniPC": "uni_pc",
    "LCM": "lcm",
    "DEIS": "deis",
    "DDPM": "ddpm",
}
# Fields that change no image.
_A1111_IGNORED = ("Model hash", "Version", "Hashes", "Size")
_EXTRA_NETWORKS = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>")
_DEFAULT_SCHEDULES = ("", "Automatic", "Uniform", "normal")  # each sampler's own noise levels
_COMFYUI_SAMPLERS = ("KSampler", "KSamplerAdvanced")


@dataclass(frozen=True, kw_only=True)
class GenerationInfo:
    """The settings that an image was made with, as a pipeline takes them.

    ``source`` is "gobelin", "a1111" or "comfyui"; ``missing`` lists in words what Gobelin cannot repeat.
    """

    settings: dict[str, Any]
    source: str
    missing: list[str] = field(default_factory=list)


def write_png(file: Path, image: Image.Image, settings: dict[str, Any] | None = None) -> None:
    """Write a PNG atomically, with its settings (if any) twice: as our JSON, and in AUTOMATIC1111's form."""
    info = PngInfo()
    if settings is not None:
        info.add_text(_A1111_KEY, format_a1111_parameters(settings))
        info.add_text(_GOBELIN_KEY, json.dumps(settings, ensure_ascii=False))
    with replacing(file) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def read_png_settings(file: Path) -> dict[str, Any]:
    """Read the settings that :func:`write_png` stored in an image; raises :class:`DataError` where there are none."""
    text = _text_chunks(file).get(_GOBELIN_KEY)
    if text is None:
        raise DataError(f"{file} carries no settings of Gobelin: give a PNG that Gobelin saved")
    return _parse_settings(text, file)


def read_generation_info(file: Path, samplers: Collection[str]) -> GenerationInfo:
    """Read the settings that Gobelin, AUTOMATIC1111's web UI or ComfyUI stored in a PNG.

    ``samplers`` are the names that Gobelin has. Raises :class:`DataError` for an image without such settings.
    """
    texts = _text_chunks(file)
    if _GOBELIN_KEY in texts:
        return GenerationInfo(settings=_parse_settings(texts[_GOBELIN_KEY], file), source="gobelin")
    if _A1111_KEY in texts:
        return parse_a1111_parameters(texts[_A1111_KEY], samplers)
    if _COMFYUI_KEY in texts:
        return parse_comfyui_graph(_parse_settings(texts[_COMFYUI_KEY], file), file, samplers)
    raise DataError(
        f"{file} does not say how it was made: give a PNG that Gobelin, AUTOMATIC1111 or ComfyUI saved, unedited"
    )


def format_a1111_parameters(settings: dict[str, Any]) -> str:
    """Format settings as AUTOMATIC1111's web UI writes them under ``parameters``."""
    lines = [settings["prompt"]]
    if settings["negative_prompt"]:
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    plain = settings["sampler"].removesuffix("_karras")
    sampler = next((name for name, ours in _A1111_SAMPLERS.items() if ours == plain), plain)
    fields = {
        "Steps": settings["steps"],
        "Sampler": sampler,
        **({"Schedule type": "Karras"} if plain != settings["sampler"] else {}),
        "CFG scale": settings["guidance"],
        "Seed": settings["seed"],
        "Size": f"{settings['width']}x{settings['height']}",
        **({"Clip skip": settings["clip_skip"] + 1} if settings.get("clip_skip") else {}),
        "Model": settings["model"],
    }
    lines.append(", ".join(f"{name}: {_quote(str(value))}" for name, value in fields.items()))
    return "\n".join(lines)


def _quote(value: str) -> str:
    """Quote a value that holds a mark of the list's own syntax."""
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ',:"\n') else value


def _parse_a1111_fields(line: str) -> dict[str, str]:
    """Parse ``Name: value, …``, where values may be quoted as JSON strings."""
    fields, start, quoted = {}, 0, False
    for place, character in enumerate(line + ","):
        if character == '"' and line[place - 1 : place] != "\\":
            quoted = not quoted
        elif character == "," and (not quoted or place == len(line)):
            name, colon, value = (part.strip() for part in line[start:place].partition(":"))
            try:
                said = json.loads(value) if value.startswith('"') else value
            except ValueError:
                said = value
            if colon:
                fields[name] = str(said)
            start = place + 1
    return fields


def parse_a1111_parameters(text: str, samplers: Collection[str]) -> GenerationInfo:
    """Parse AUTOMATIC1111's text: prompt, "Negative prompt:", and a last line of fields."""
    *lines, last = text.strip().split("\n")
    fields = _parse_a1111_fields(last)
    if "Steps" not in fields:
        lines, fields = [*lines, last], {}
    prompt, _, negative = "\n".join(lines).partition("Negative prompt:")
    missing = ["AUTOMATIC1111 draws other noise for a seed: the layout will differ"]
    missing += [f"the added network {found}" for found in _EXTRA_NETWORKS.findall(prompt)]
    settings: dict[str, Any] = {
        "prompt": _EXTRA_NETWORKS.sub("", prompt).strip(),
        "negative_prompt": negative.strip(),
        "weights": "a1111",
    }
    for name, ours, kind in (("Steps", "steps", int), ("CFG scale", "guidance", float), ("Seed", "seed", int)):
        try:
            settings[ours] = kind(fields.pop(name))
        except (KeyError, ValueError):
            missing.append(f"no {name}")
    if found := re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", fields.get("Size", "")):
        settings["width"], settings["height"] = int(found[1]), int(found[2])
    if re.fullmatch("[0-9]{1,2}", skip := fields.pop("Clip skip", "1")):
        settings["clip_skip"] = max(0, int(skip) - 1)
    if "Model" in fields:
        settings["model"] = fields.pop("Model")
    named = fields.pop("Sampler", "")
    schedule = "Karras" if named.endswith(" Karras") else fields.pop("Schedule type", "")
    name = named.removesuffix(" Karras")
    missing += _take_sampler(settings, _A1111_SAMPLERS.get(name, name), schedule, samplers)
    missing += [f"{name}: {value}" for name, value in fields.items() if name not in _A1111_IGNORED]
    missing += _schedules(settings)
    return GenerationInfo(settings=settings, source="a1111", missing=missing)


def _schedules(settings: dict[str, Any]) -> list[str]:
    """List what the prompts schedule over time, which Gobelin cannot repeat."""
    prompts = [settings.get("prompt", ""), settings.get("negative_prompt", "")]
    return [f"{what}: {text}" for prompt in prompts for text, what in schedules(prompt, settings["weights"])]


def _take_sampler(settings: dict[str, Any], named: str, schedule: str, samplers: Collection[str]) -> list[str]:
    """Put a sampler with its schedule into the settings; returns in words what Gobelin does not have."""
    if not named:
        return []
    if named not in samplers:
        return [f"the sampler {named}"]
    with_karras = f"{named}_karras"
    karras = schedule.lower() == "karras" and with_karras in samplers
    settings["sampler"] = with_karras if karras else named
    return [] if karras or schedule in _DEFAULT_SCHEDULES else [f"the schedule {schedule} of {named}"]


def parse_comfyui_graph(graph: dict[str, Any], file: Path, samplers: Collection[str]) -> GenerationInfo:
    """Parse ComfyUI's graph: the settings of its first KSampler and of the nodes that lead to it.

    Raises :class:`DataError` for a graph without one.
    """
    nodes = {name: node for name, node in graph.items() if isinstance(node, dict)}
    found = [node for node in nodes.values() if node.get("class_type") in _COMFYUI_SAMPLERS]
    if not found:
        raise DataError(f"{file}: its ComfyUI graph has no KSampler to take the settings from")
    inputs = _inputs(found[0])
    settings: dict[str, Any] = {"weights": "comfyui"}
    missing = ["ComfyUI draws other noise for a seed: the layout may differ"]
    missing += [f"a {node['class_type']} after the first" for node in found[1:]]
    usual = {"denoise": 1, "start_at_step": 0, "add_noise": "enable", "return_with_leftover_noise": "disable"}
    missing += [f"{name} {inputs[name]}" for name, value in usual.items() if inputs.get(name, value) != value]
    for name, ours in (("steps", "steps"), ("cfg", "guidance"), ("seed", "seed"), ("noise_seed", "seed")):
        if isinstance(inputs.get(name), int | float):
            settings[ours] = inputs[name]
    for name, ours in (("positive", "prompt"), ("negative", "negative_prompt")):
        text = _inputs(_find_upstream(nodes, inputs.get(name), "CLIPTextEncode")).get("text")
        if isinstance(text, str):
            settings[ours] = text
        else:
            missing.append(f"the {name} prompt, which is not plain text")
    size = _inputs(_find_upstream(nodes, inputs.get("latent_image"), "EmptyLatentImage"))
    for name in ("width", "height"):
        if isinstance(size.get(name), int):
            settings[name] = size[name]
    if not size:
        missing.append("the init image")
    model = _inputs(_find_upstream(nodes, inputs.get("model"), "CheckpointLoaderSimple")).get("ckpt_name")
    if isinstance(model, str):
        settings["model"] = Path(model).stem
    missing += [f"a {node['class_type']}" for node in nodes.values() if "Lora" in str(node.get("class_type"))]
    named, schedule = (str(inputs.get(name, "")) for name in ("sampler_name", "scheduler"))
    missing += _take_sampler(settings, named, schedule, samplers)
    missing += _schedules(settings)
    return GenerationInfo(settings=settings, source="comfyui", missing=missing)


def _text_chunks(file: Path) -> dict[str, str]:
    """Read the text chunks of a PNG, by their keywords."""
    if not file.is_file():
        raise DataError(f"there is no image at {file}: give the path of one")
    try:
        with Image.open(file) as image:
            return {str(name): text for name, text in image.info.items() if isinstance(text, str)}
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{file} cannot be read as an image: {error}") from error


def _parse_settings(text: str, file: Path) -> dict[str, Any]:
    """Parse the object in a text chunk; raises :class:`DataError` where there is none."""
    try:
        return parse_json(text, f"{file}: its stored settings")
    except ModelError as error:
        raise DataError(str(error)) from error


def _inputs(node: dict[str, Any] | None) -> dict[str, Any]:
    """Return a node's inputs; empty for no node, or none that are an object."""
    inputs = (node or {}).get("inputs")
    return inputs if isinstance(inputs, dict) else {}


def _find_upstream(nodes: dict[str, dict[str, Any]], link: Any, kind: str) -> dict[str, Any] | None:
    """Find the first node of a kind upstream of a link, along the first input of each node between."""
    for _ in nodes:
        node = nodes.get(str(link[0])) if isinstance(link, list) and link else None
        if node is None or node.get("class_type") == kind:
            return node
        links = [value for value in _inputs(node).values() if isinstance(value, list)]
        link = links[0] if links else None
    return None
