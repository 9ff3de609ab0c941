"""Read the settings that any of the programs stored in an image."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from gobelin.errors import DataError, ModelError
from gobelin.formats.files import parse_json
from gobelin.formats.generation_info.a1111 import is_a1111_text, parse_a1111_parameters
from gobelin.formats.generation_info.comfyui import (
    is_comfyui_graph,
    list_comfyui_nodes,
    parse_comfyui_graph,
)
from gobelin.formats.generation_info.draft import GOBELIN, GenerationInfo, in_words
from gobelin.formats.generation_info.image_texts import GOBELIN_KEY, MAX_TEXT, PARAMETERS, XMP_COMMENT, read_image_texts
from gobelin.formats.generation_info.other_programs import (
    parse_draw_things,
    parse_dream,
    parse_easy_diffusion,
    parse_fooocus,
    parse_invokeai,
    parse_sd_metadata,
    parse_swarmui,
)
from gobelin.images import readable_size

_NOVELAI = (
    "its text says that NovelAI made it, whose prompts and models Gobelin does not have: give a prompt of your own"
)
_UNKNOWN = "its text is of a program that Gobelin does not know, {!r}: give a prompt and settings of your own"
_AFTERWARDS = ("postprocessing", "extras")  # chunks of AUTOMATIC1111's second tab, which changes a finished image
# Programs by names that their JSON has: the first whose every name is there.
_BY_NAMES: tuple[tuple[tuple[str, ...], Callable[[dict[str, Any], Collection[str]], GenerationInfo]], ...] = (
    (("sui_image_params",), parse_swarmui),
    (("metadata_scheme",), parse_fooocus),
    (("base_model", "prompt"), parse_fooocus),
    (("performance", "prompt"), parse_fooocus),
    (("num_inference_steps", "prompt"), parse_easy_diffusion),
    (("Stable Diffusion model", "Prompt"), parse_easy_diffusion),
    (("positive_prompt", "app_version"), parse_invokeai),
    (("c", "uc"), parse_draw_things),
)


def read_generation_info(file: Path, samplers: Collection[str]) -> GenerationInfo:
    """Read the settings that a program stored in an image: a PNG, JPEG, WebP, or another that Pillow opens.

    The programs are Gobelin, AUTOMATIC1111 with Forge and SD.Next, ComfyUI, Fooocus, SwarmUI, InvokeAI, Draw Things,
    Easy Diffusion, and Civitai's generator. ``samplers`` are the names that Gobelin has. Raises :class:`DataError` for
    an image without such settings, with those of another program, or with broken ones.
    """
    texts = read_image_texts(file)
    try:
        found = _read(texts, samplers)
    except (DataError, ModelError) as error:
        raise DataError(f"{file}: {error}") from error
    if found is None:
        raise DataError(
            f"{file} does not say how it was made: give an image that Gobelin, AUTOMATIC1111, ComfyUI or another "
            "program saved, unedited"
        )
    found.missing.extend(f"{name}: {in_words(texts[name])}" for name in _AFTERWARDS if name in texts)
    size, said = readable_size(file), tuple(found.settings.get(side) for side in ("width", "height"))
    if found.source != GOBELIN and None not in said and size != said:
        found.missing.append(
            f"the image is {size[0]} x {size[1]}, and its settings say {said[0]} x {said[1]}: it was changed afterwards"
        )
    return found


def _read(texts: dict[str, str], samplers: Collection[str]) -> GenerationInfo | None:
    """Read the texts of an image; None where none of them is of a program that paints."""
    for where, text in texts.items():
        if len(text) > MAX_TEXT:
            raise DataError(f"its {where} has {len(text):,} characters: Gobelin reads {MAX_TEXT:,} at most")
    if GOBELIN_KEY in texts:
        return GenerationInfo(settings=parse_json(texts[GOBELIN_KEY], "its stored settings"), source=GOBELIN)
    if any(texts.get(name, "").lower().startswith("novelai") for name in ("Software", "Source", "Title")):
        raise DataError(_NOVELAI)
    for key in ("invokeai_metadata", "sd-metadata"):
        if key in texts:
            parse = parse_invokeai if key == "invokeai_metadata" else parse_sd_metadata
            return parse(parse_json(texts[key], f"its {key}"), samplers)
    if "Dream" in texts:
        return parse_dream(texts["Dream"], samplers)
    if texts.get("prompt", "").lstrip().startswith(("{", "[")):
        return _read_graph(texts, samplers)
    if {"negative_prompt", "use_stable_diffusion_model", "Negative Prompt"} & texts.keys():
        return parse_easy_diffusion(dict(texts), samplers)
    if "prompt" in texts and not is_a1111_text(texts.get(PARAMETERS, "")):
        raise DataError(_UNKNOWN.format(in_words(texts["prompt"])[:60]))
    stored = [(where, texts[where].strip()) for where in (PARAMETERS, XMP_COMMENT, "Comment") if where in texts]
    for _, text in stored:
        if (found := _read_text(text, texts, samplers)) is not None:
            return found
    for where, text in stored:
        if text and where != "Comment":  # which is a camera's, or an editor's
            raise DataError(_UNKNOWN.format(in_words(text)[:60]))
    return None


def _read_graph(texts: dict[str, str], samplers: Collection[str]) -> GenerationInfo:
    """Read ComfyUI's graph, or, where that cannot be read, the text that a node of it wrote in AUTOMATIC1111's form."""
    text = texts.get(PARAMETERS, "")
    try:
        graph = parse_json(texts["prompt"], "its prompt")
    except ModelError:
        if is_a1111_text(text):
            return parse_a1111_parameters(text, samplers)  # a prompt that begins with a bracket
        raise
    try:
        return parse_comfyui_graph(graph, samplers)
    except DataError as error:
        if not is_a1111_text(text):
            raise
        found = parse_a1111_parameters(text, samplers, by=("ComfyUI", "comfyui"))
        found.missing.append(f"{error}: the settings are those of the text beside it")
        found.missing.extend(list_comfyui_nodes(graph, samplers))
        return found


def _read_text(text: str, texts: dict[str, str], samplers: Collection[str]) -> GenerationInfo | None:
    """Read a text whose program only its content tells; None for one of no program that is known."""
    try:
        content = parse_json(text, "its text") if text.startswith("{") else {}
    except ModelError:
        content = {}  # AUTOMATIC1111's prompts may begin so
    if not content:
        return parse_a1111_parameters(text, samplers) if is_a1111_text(text) else None
    if "novelai" in in_words(content.get("Software", "")).lower() or "v4_prompt" in content:
        raise DataError(_NOVELAI)
    if texts.get("fooocus_scheme") == "fooocus":
        return parse_fooocus(content, samplers)
    if is_comfyui_graph(content):
        return parse_comfyui_graph(content, samplers)
    for names, parse in _BY_NAMES:
        if all(name in content for name in names):
            return parse(content, samplers)
    return None
