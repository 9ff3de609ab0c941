"""AUTOMATIC1111's text, and its forms in Forge, SD.Next, Fooocus, stable-diffusion.cpp and on Civitai.

Layouts: AUTOMATIC1111's ``modules/processing.py`` (``create_infotext``) and ``modules/infotext_utils.py``
(``parse_generation_parameters``); SD.Next's ``modules/processing_info.py``; Fooocus' ``modules/meta_parser.py``
(``A1111MetadataParser``); Civitai's ``src/utils/metadata/automatic.metadata.ts``.
"""

import json
import re
from collections.abc import Collection
from typing import Any

from gobelin.formats.generation_info.draft import EXTRA_NETWORKS, Draft, GenerationInfo, as_number, in_words
from gobelin.prompt_weighting import PromptSyntax, in_a1111_syntax

A1111_SAMPLERS = {
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
"""AUTOMATIC1111's names for our samplers; "Karras" follows, there or as a field of its own."""

_FIRST = "Steps"  # field
_NUMBERS = {_FIRST: "steps", "CFG scale": "guidance", "Seed": "seed"}
_CIVITAI = "Civitai resources"
# Fields that change no image, or that the prompt holds already.
_HARMLESS = {
    *("VAE hash", "Hashes", "Version", "App", "Backend", "User", "Created Date", _CIVITAI),
    *("Batch", "Batch size", "Batch pos", "Index", "Template", "Negative Template", "Civitai metadata"),
    *("Raw prompt", "Raw negative prompt", "Refiner hash"),
}
# What a field says where it changes no image.
_USUAL = {
    "Parser": ("a1111", "A1111 parser"),
    "Operations": ("none", "txt2img"),
    "Pipeline": ("StableDiffusionPipeline",),
    "Emphasis": ("Original",),
    "Performance": ("Speed", "Quality"),
    "VAE": ("None", "Automatic", "Default (model)"),
    "Refiner": ("None",),
}
# Programs that write this text: by the start of a field. Fooocus and ComfyUI read prompts in ComfyUI's meaning.
_PROGRAMS: tuple[tuple[str, str, str, PromptSyntax], ...] = (
    ("App", "SD.Next", "SD.Next", "a1111"),
    ("Version", "Fooocus", "Fooocus", "comfyui"),
    ("Version", "ComfyUI", "ComfyUI", "comfyui"),
    ("Version", "stable-diffusion.cpp", "stable-diffusion.cpp", "a1111"),
    ("Version", "f", "Forge", "a1111"),
    (_CIVITAI, "", "Civitai", "a1111"),
)
_NEGATIVE = re.compile(r"^[ \t]*Negative prompt:", re.M)


def format_a1111_parameters(settings: dict[str, Any]) -> str:
    """Format settings as AUTOMATIC1111's web UI writes them under ``parameters``."""
    syntax = settings.get("weights", "a1111")
    lines = [in_a1111_syntax(settings["prompt"], syntax)]
    if settings["negative_prompt"]:
        lines.append(f"Negative prompt: {in_a1111_syntax(settings['negative_prompt'], syntax)}")
    plain = settings["sampler"].removesuffix("_karras")
    sampler = next((name for name, ours in A1111_SAMPLERS.items() if ours == plain), plain)
    fields = {
        "Steps": settings["steps"],
        "Sampler": sampler,
        # of some samplers the web UI's own is Karras'
        "Schedule type": "Karras" if plain != settings["sampler"] else "Uniform",
        "CFG scale": settings["guidance"],
        "Seed": settings["seed"],
        "Size": f"{settings['width']}x{settings['height']}",
        **({"Clip skip": settings["clip_skip"] + 1} if settings.get("clip_skip") else {}),
        "Model": settings["model"],
        **(
            {"Denoising strength": settings["strength"]}
            if "strength" in settings and settings.get("init_image")
            else {}
        ),
    }
    lines.append(", ".join(f"{name}: {_quote(str(value))}" for name, value in fields.items()))
    return "\n".join(lines)


def is_a1111_text(text: str) -> bool:
    """Say whether a text has AUTOMATIC1111's line of fields: without it, it may be anything."""
    return _FIRST in _split_lines(text)[1]


def parse_a1111_parameters(
    text: str, samplers: Collection[str], by: tuple[str, PromptSyntax] | None = None
) -> GenerationInfo:
    """Parse AUTOMATIC1111's text: prompt, "Negative prompt:", and a last line of fields.

    ``by`` are the program that wrote it and the meaning of its prompts, where they are known from elsewhere.
    """
    said, fields, after = _split_lines(text)
    source, syntax = by or _program_of(fields)
    draft = Draft(source=source, syntax=syntax, samplers=samplers, diffusers=source == "SD.Next")
    draft.say(f"{source} draws other noise for a seed: the layout will differ")
    if source == "Fooocus":
        draft.say("Fooocus paints with SDXL, which Gobelin does not have")
    prompt, *negative = _NEGATIVE.split(said, maxsplit=1)
    for found in EXTRA_NETWORKS.findall(prompt):
        draft.say_network(found)
    draft.settings["prompt"] = EXTRA_NETWORKS.sub("", prompt).strip()
    draft.settings["negative_prompt"] = negative[0].strip() if negative else ""
    for name, ours in _NUMBERS.items():
        draft.take_number(ours, fields.pop(name, None), name)
    size = in_words(fields.pop("Size", ""))
    if found := re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", size):
        draft.settings["width"], draft.settings["height"] = int(found[1]), int(found[2])
    else:
        draft.say("Size" if size else "no Size", size or None)
    skipped = fields.pop("Clip skip", fields.pop("CLIP skip", "1"))
    if (skip := as_number(skipped, int)) is not None:
        draft.settings["clip_skip"] = max(0, int(skip) - 1)
    else:
        draft.say("Clip skip", skipped)
    _take_civitai(draft, fields)
    model_hash = fields.pop("Model hash", None)
    if "Model" in fields:
        draft.take_model(fields.pop("Model"))
    else:
        draft.say("no Model" if model_hash is None else f"no Model but for its hash {in_words(model_hash)}")
    named = in_words(fields.pop("Sampler", ""))
    schedules = [in_words(fields.pop(one)) for one in ("Schedule type", "Scheduler") if one in fields]
    name = named.removesuffix(" Karras")
    if name != named:
        schedules.append("Karras")  # unless a field says another, which counts
    if not name:
        draft.say("no Sampler")
    else:
        schedule = next((one for one in schedules if one.lower() != "automatic"), "")
        draft.take_sampler(A1111_SAMPLERS.get(name, name), schedule)
    for name, value in fields.items():
        if name not in _HARMLESS and value not in _USUAL.get(name, ()):
            draft.say(name, None if name == value else value)
    if after:
        draft.say("what follows the settings", after)
    return draft.finished()


def _split_lines(text: str) -> tuple[str, dict[str, Any], str]:
    """Split a text into its prompts, the fields, and what follows; the fields' line has Steps, and is usually last."""
    lines = text.replace("\r\n", "\n").strip().split("\n")
    fields = _parse_fields(lines[-1])
    if _FIRST in fields:
        return "\n".join(lines[:-1]), fields, ""
    for place in range(len(lines) - 1, -1, -1):
        if lines[place].startswith(f"{_FIRST}:"):
            after = "\n".join(lines[place + 1 :])
            template = after.lstrip().startswith(("Template:", "Negative Template:"))  # of an extension: no words more
            return "\n".join(lines[:place]), _parse_fields(lines[place]), "" if template else after
    return "\n".join(lines), {}, ""


def _parse_fields(line: str) -> dict[str, Any]:
    """Parse ``Name: value, …``, where a value may be quoted as a JSON string, or be JSON as it is.

    What has no colon is a name that is its own value, as in ``infotext_utils.py``; of two values the last counts.
    """
    fields: dict[str, Any] = {}
    decoder, place, colon, broken = json.JSONDecoder(strict=False), 0, -1, False
    while place < len(line):
        colon = line.find(":", place) if 0 <= colon < place or not place else colon
        comma = line.find(",", place, colon if colon >= 0 else len(line))
        if comma >= 0 or colon < 0:
            bare = line[place : comma if comma >= 0 else len(line)].strip()
            if bare and bare != _FIRST:
                fields[bare] = bare
            place = comma + 1 if comma >= 0 else len(line)
            continue
        name, start = line[place:colon].strip(), colon + 1
        while start < len(line) and line[start] in " \t":
            start += 1
        value, end = None, -1
        if line[start : start + 1] in ('"', "{", "[") and not broken:
            try:
                value, end = decoder.raw_decode(line, start)
            except (ValueError, RecursionError):
                broken = line[start] != '"'  # once: a second try of as much would take its time again
        rest = line.find(",", max(start, end))
        rest = len(line) if rest < 0 else rest
        if end < 0 or line[end:rest].strip():
            rest = line.find(",", start)
            rest = len(line) if rest < 0 else rest
            value = line[start:rest].strip()
        fields[name] = value
        place = rest + 1
    return fields


def _quote(value: str) -> str:
    """Quote a value that holds a mark of the list's own syntax."""
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ',:"\n') else value


def _program_of(fields: dict[str, Any]) -> tuple[str, PromptSyntax]:
    """Find the program whose text it is, and the meaning of its prompts."""
    for name, start, program, syntax in _PROGRAMS:
        if name in fields and (not start or in_words(fields[name]).startswith(start)):
            return program, syntax
    return "AUTOMATIC1111", "a1111"


def _take_civitai(draft: Draft, fields: dict[str, Any]) -> None:
    """Take the checkpoint of Civitai's list of resources, and list the others with their weights."""
    resources = fields.get(_CIVITAI)
    if resources is None:
        return
    if not isinstance(resources, list):
        draft.say(_CIVITAI, resources)
        return
    for resource in resources:
        if not isinstance(resource, dict):
            draft.say(_CIVITAI, resource)
            continue
        kind, weight = in_words(resource.get("type", "resource")), resource.get("weight")
        name = resource.get("modelName") or f"version {in_words(resource.get('modelVersionId'))} on Civitai"
        if kind == "checkpoint":
            fields.setdefault("Model", in_words(name))
        else:
            draft.say(
                f"the {kind} {in_words(name)}" + (f" with weight {in_words(weight)}" if weight is not None else "")
            )
