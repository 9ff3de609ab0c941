"""Fooocus, SwarmUI, InvokeAI, Draw Things and Easy Diffusion: settings by names of their own, in JSON or text chunks.

Layouts: Fooocus' ``modules/meta_parser.py`` (``FooocusMetadataParser``); SwarmUI's ``docs/Image Metadata Format.md``
and ``T2IParamTypes.cs``; InvokeAI's ``invokeai/app/invocations/metadata.py``, and of its second version
``ldm/invoke/conditioning.py``; Easy Diffusion's ``ui/easydiffusion/utils/save_utils.py`` and sdkit's
``diffusers_samplers.py``; Draw Things and InvokeAI's older forms as stable-diffusion-prompt-reader reads them
(``sd_prompt_reader/format/drawthings.py``, ``invokeai.py``).
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from gobelin.formats.generation_info.a1111 import A1111_SAMPLERS
from gobelin.formats.generation_info.draft import Draft, GenerationInfo, as_number, in_words, is_empty
from gobelin.prompt_weighting import PromptSyntax

Values = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Program:
    """A program: its names for our settings, its samplers by our names and schedules, and what changes no image."""

    name: str
    syntax: PromptSyntax
    names: Mapping[str, str]  # ours: the program's
    samplers: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # the program's: ours, schedule
    harmless: Collection[str] = ()
    usual: Mapping[str, Collection[Any]] = field(default_factory=dict)  # values that change no image
    diffusers: bool = False  # its samplers are diffusers'


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_FOOOCUS = _Program(
    name="Fooocus",
    syntax="comfyui",
    names={
        **_same("prompt", "negative_prompt", "steps", "seed", "width", "height", "sampler", "clip_skip"),
        "guidance": "guidance_scale",
        "schedule": "scheduler",
        "model": "base_model",
    },
    harmless=(
        *("full_prompt", "full_negative_prompt", "base_model_hash", "refiner_model_hash", "metadata_scheme", "version"),
        *("created_by", "resolution"),
    ),
    usual={
        "performance": ("Speed", "Quality"),
        "vae": ("Default (model)",),
        "refiner_model": ("None",),
        "overwrite_switch": (-1, "-1"),
    },
)
_SWARMUI = _Program(
    name="SwarmUI",
    syntax="comfyui",
    names={
        **_same("prompt", "steps", "seed", "width", "height", "model", "sampler"),
        "negative_prompt": "negativeprompt",
        "guidance": "cfgscale",
        "schedule": "scheduler",
        "clip_skip": "clipstopatlayer",
    },
    harmless=(
        *("aspectratio", "automaticvae", "swarm_version", "images", "batchsize", "donotsave", "donotsaveintermediates"),
        *("nopreviews", "personalnote", "sidelength", "imageformat", "colordepth", "wildcardseed", "loraweights"),
        *("wildcardseedbehavior", "noseedincrement", "modelspecificenhancements", "overrideoutpathformat"),
        *("exactbackendid", "internalbackendtype", "webhooks", "continueaftererrors", "date", "generation_time"),
        *("prep_time", "used_wildcards", "original_prompt", "original_negativeprompt"),
    ),
)
_INVOKEAI_NAMES = {
    "ddim": "ddim",
    "ddpm": "ddpm",
    "deis": "deis",
    "euler": "euler",
    "euler_a": "euler_ancestral",
    "heun": "heun",
    "kdpm_2": "dpm_2",
    "kdpm_2_a": "dpm_2_ancestral",
    "lcm": "lcm",
    "lms": "lms",
    "pndm": "pndm",
    "dpmpp_2m": "dpmpp_2m",
    "dpmpp_2m_sde": "dpmpp_2m_sde",
    "unipc": "uni_pc",
    "plms": "pndm",
    "k_dpm_2": "dpm_2",
    "k_dpm_2_a": "dpm_2_ancestral",
    "k_euler": "euler",
    "k_euler_a": "euler_ancestral",
    "k_heun": "heun",
    "k_lms": "lms",
    "k_dpmpp_2": "dpmpp_2m",
}
_INVOKEAI = _Program(
    name="InvokeAI",
    syntax="none",
    names={
        **_same("steps", "seed", "width", "height", "model", "clip_skip"),
        "prompt": "positive_prompt",
        "negative_prompt": "negative_prompt",
        "guidance": "cfg_scale",
        "guidance_rescale": "cfg_rescale_multiplier",
        "sampler": "scheduler",
    },
    samplers={
        **{name: (ours, "") for name, ours in _INVOKEAI_NAMES.items()},
        **{f"{name}_k": (ours, "karras") for name, ours in _INVOKEAI_NAMES.items()},
    },
    harmless=("app_version", "canvas_v2_metadata"),
    diffusers=True,
    usual={"generation_mode": ("txt2img",), "rand_device": ("cpu",), "type": ("txt2img",), "seamless": (0,)},
)
_DRAW_THINGS = _Program(
    name="Draw Things",
    syntax="a1111",
    names={
        **_same("steps", "seed", "width", "height", "model", "sampler"),
        "prompt": "c",
        "negative_prompt": "uc",
        "guidance": "scale",
    },
    samplers={
        **{name: (ours, "") for name, ours in A1111_SAMPLERS.items()},
        **{f"{name} Karras": (ours, "karras") for name, ours in A1111_SAMPLERS.items()},
        "Euler A": ("euler_ancestral", ""),
        "Euler Ancestral": ("euler_ancestral", ""),
    },
    harmless=("size", "seed_mode", "v2"),
    usual={"strength": (1,), "mask_blur": (0,), "shift": (1,)},
)
# Of Draw Things' second form: entries that the first has too, or that only other models, videos or memory know.
_DRAW_THINGS_V2 = {
    *("width", "height", "steps", "guidanceScale", "seed", "seedMode", "sampler", "model", "clipSkip", "name", "id"),
    *("batchCount", "batchSize", "originalImageWidth", "originalImageHeight", "targetImageWidth", "targetImageHeight"),
    *("negativeOriginalImageWidth", "negativeOriginalImageHeight", "cropTop", "cropLeft", "aestheticScore"),
    *("negativeAestheticScore", "negativePromptForImagePrior", "imagePriorSteps", "numFrames", "fps", "motionScale"),
    *(
        "fpsId",
        "motionBucketId",
        "condAug",
        "startFrameCfg",
        "startFrameGuidance",
        "guidingFrameNoise",
        "guidanceEmbed",
    ),
    *("speedUpWithGuidanceEmbed", "resolutionDependentShift", "stage2Guidance", "stage2Shift", "t5TextEncoder"),
    *("separateClipL", "clipLText", "separateOpenClipG", "openClipGText", "separateT5", "t5Text", "hiresFixWidth"),
    *("hiresFixHeight", "hiresFixStartWidth", "hiresFixStartHeight", "hiresFixStrength", "tiledDecoding"),
    *("decodingTileWidth", "decodingTileHeight", "decodingTileOverlap", "diffusionTileWidth", "diffusionTileHeight"),
    *("diffusionTileOverlap", "preserveOriginalAfterInpaint", "refinerStart", "upscalerScaleFactor", "maskBlurOutset"),
}
_DRAW_THINGS_V2_USUAL = {"strength": 1, "clipWeight": 1, "imageGuidanceScale": 1.5, "maskBlur": 1.5, "shift": 1}
_EASY_DIFFUSION_TEXT = {
    "Prompt": "prompt",
    "Negative Prompt": "negative_prompt",
    "Seed": "seed",
    "Stable Diffusion model": "use_stable_diffusion_model",
    "Clip Skip": "clip_skip",
    "VAE model": "use_vae_model",
    "Sampler": "sampler_name",
    "Width": "width",
    "Height": "height",
    "Steps": "num_inference_steps",
    "Guidance Scale": "guidance_scale",
}
_EASY_DIFFUSION = _Program(
    name="Easy Diffusion",
    syntax="none",
    names={
        **_same("prompt", "negative_prompt", "seed", "width", "height", "clip_skip"),
        "model": "use_stable_diffusion_model",
        "sampler": "sampler_name",
        "steps": "num_inference_steps",
        "guidance": "guidance_scale",
    },
    samplers={
        "plms": ("pndm", ""),
        "pndm": ("pndm", ""),
        "ddim": ("ddim", ""),
        "ddpm": ("ddpm", ""),
        "deis": ("deis", ""),
        "euler": ("euler", ""),
        "euler_a": ("euler_ancestral", ""),
        "heun": ("heun", ""),
        "lms": ("lms", ""),
        "dpm2": ("dpm_2", ""),
        "dpm2_a": ("dpm_2_ancestral", ""),
        "dpmpp_2m": ("dpmpp_2m", "karras"),
        "dpmpp_2m_sde": ("dpmpp_2m_sde", "karras"),
        "unipc_tu": ("uni_pc", ""),
    },
    harmless=("Software", "XML:com.adobe.xmp", "exif:UserComment", "Comment"),
    diffusers=True,
)
_OWN_WEIGHTS = re.compile(r"[()\[\]]|\+\+|--|[\w\"'”][+-](?![\w+-])")  # compel's
_INVOKEAI_EMBEDDING = re.compile(r"<([^<>:]{1,200})>")
_TAG = re.compile(r"<(\w++)[^<>]*+>")
_PARTS = ("segment", "object", "region", "refiner", "base", "extend", "video", "clear")  # what follows is theirs


def parse_fooocus(content: Values, samplers: Collection[str]) -> GenerationInfo:
    """Parse Fooocus' JSON: the prompts with its styles in them, and its settings."""
    values = dict(content)
    for ours, full in (("prompt", "full_prompt"), ("negative_prompt", "full_negative_prompt")):
        texts = values.get(full)
        if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
            values[ours] = ", ".join(texts)  # as Fooocus itself writes them in AUTOMATIC1111's form
    if found := re.fullmatch(r"\((\d{1,5}), (\d{1,5})\)", in_words(values.get("resolution", ""))):
        values["width"], values["height"] = found[1], found[2]
    loras = [name for name in values if name.startswith("lora_combined_")]
    if values.get("loras"):
        for name in loras:  # the same once more
            del values[name]
    skip = as_number(values.get("clip_skip"), int)
    values["clip_skip"] = max(0, skip - 1) if skip is not None else values.get("clip_skip")
    draft = _draft(_FOOOCUS, values, samplers)
    draft.say("Fooocus paints with SDXL, which Gobelin does not have")
    return draft.finished()


def parse_swarmui(content: Values, samplers: Collection[str]) -> GenerationInfo:
    """Parse SwarmUI's JSON; what its prompt holds in tags (``<segment:face> …``) is listed and left out."""
    params = content.get("sui_image_params")
    values: Values = dict(params) if isinstance(params, dict) else {}
    for ours, older in (("sampler", "comfyuisampler"), ("scheduler", "comfyuischeduler")):
        if older in values:
            values.setdefault(ours, values.pop(older))
    asked: list[str] = []
    for name in ("prompt", "negativeprompt"):
        if isinstance(text := values.get(name), str):
            values[name] = _without_tags(text, asked)
    loras, weights = _listed(values.pop("loras", None)), _listed(values.get("loraweights"))
    asked += [
        f"the LoRA {name}" + (f" with weight {weights[index]}" if index < len(weights) else "")
        for index, name in enumerate(loras)
    ]
    stop = as_number(values.get("clipstopatlayer"), int)
    values["clipstopatlayer"] = max(0, -stop - 1) if stop is not None else values.get("clipstopatlayer")
    draft = _draft(_SWARMUI, values, samplers)
    for text in asked:
        draft.say(text)
    return draft.finished()


def parse_invokeai(content: Values, samplers: Collection[str]) -> GenerationInfo:
    """Parse InvokeAI's metadata of version 3 and later (``invokeai_metadata``)."""
    values = dict(content)
    model = values.get("model")
    values["model"] = model.get("name", model.get("model_name")) if isinstance(model, dict) else model
    embeddings = []
    for name in ("positive_prompt", "negative_prompt"):
        if isinstance(text := values.get(name), str):
            embeddings += _INVOKEAI_EMBEDDING.findall(text)
            values[name] = _INVOKEAI_EMBEDDING.sub(r"\1", text)  # which is what the word is called here
    draft = _draft(_INVOKEAI, values, samplers)
    for name in embeddings:
        draft.say(f"the embedding {name}")
    canvas = values.get("canvas_v2_metadata")
    for name, layers in canvas.items() if isinstance(canvas, dict) else ():
        if not is_empty(layers):
            draft.say(f"{name} of the canvas", layers)
    base = model.get("base", model.get("base_model")) if isinstance(model, dict) else None
    if base not in (None, "sd-1"):
        draft.say("a model that is no Stable Diffusion 1", base)
    return draft.finished()


def parse_sd_metadata(content: Values, samplers: Collection[str]) -> GenerationInfo:
    """Parse InvokeAI's metadata of version 2 (``sd-metadata``)."""
    image = content.get("image")
    values: Values = dict(image) if isinstance(image, dict) else {}
    prompts = values.pop("prompt", None)
    if isinstance(prompts, list) and prompts and isinstance(prompts[0], dict):
        if len(prompts) > 1:
            values["other prompts"] = prompts[1:]
        prompts = prompts[0].get("prompt")
    values |= _split_invokeai_prompt(prompts)
    values["scheduler"] = values.pop("sampler", None)
    values["model"] = content.get("model_weights")
    for name in ("threshold", "perlin"):
        if as_number(values.get(name), float) == 0:
            del values[name]
    return _draft(_INVOKEAI, values, samplers).finished()


def parse_dream(text: str, samplers: Collection[str]) -> GenerationInfo:
    """Parse InvokeAI's command of version 1 (``Dream``): a quoted prompt, and options of one letter."""
    switch = re.search(r"(?:^|\s)--?[A-Za-z](?=[\s\d=]|$)", text)  # quotes within the quotes stand as they are
    prompt, options = (text[: switch.start()], text[switch.start() :]) if switch else (text, "")
    if (found := re.fullmatch(r'\s*"(.*)"\s*', prompt, re.S)) is not None:
        prompt = found[1].replace(r"\"", '"')
    letters = dict(re.findall(r"(?:^|\s)-+(\w+)(?:[ =]([^\s-][^\s]*))?", options))
    names = {"s": "steps", "S": "seed", "W": "width", "H": "height", "C": "cfg_scale", "A": "scheduler"}
    values = _split_invokeai_prompt(prompt)
    values |= {names.get(letter, f"-{letter}"): value or "on" for letter, value in letters.items()}
    return _draft(_INVOKEAI, values, samplers).finished()


def parse_draw_things(content: Values, samplers: Collection[str]) -> GenerationInfo:
    """Parse Draw Things' JSON of an XMP's UserComment."""
    values = dict(content)
    if found := re.fullmatch(r"(\d{1,5})x(\d{1,5})", in_words(values.get("size", ""))):
        values["width"], values["height"] = found[1], found[2]
    draft = _draft(_DRAW_THINGS, values, samplers)
    second = values.get("v2")
    if isinstance(second, dict):
        usual = {name for name, value in second.items() if value in (0, _DRAW_THINGS_V2_USUAL.get(name, 0))}
        draft.say_others(second, _DRAW_THINGS_V2 | usual)
        skip = as_number(second.get("clipSkip"), int)
        if skip is not None:
            draft.settings["clip_skip"] = max(0, skip - 1)
    return draft.finished()


def parse_easy_diffusion(content: Values, samplers: Collection[str]) -> GenerationInfo:
    """Parse Easy Diffusion's settings, of text chunks or JSON, by either of its two sets of names."""
    values = {_EASY_DIFFUSION_TEXT.get(name, name): value for name, value in content.items()}
    skip = values.pop("clip_skip", False)
    values["clip_skip"] = {"true": 1, "false": 0, "none": 0}.get(in_words(skip).lower(), skip)
    return _draft(_EASY_DIFFUSION, values, samplers).finished()


def _draft(program: _Program, values: Values, samplers: Collection[str]) -> Draft:
    """Take what a program's names say, and list every value besides that changes an image."""
    draft = Draft(source=program.name, syntax=program.syntax, samplers=samplers, diffusers=program.diffusers)
    draft.say(f"{program.name} draws other noise for a seed: the layout may differ")
    names = program.names
    for ours in ("prompt", "negative_prompt"):
        text = values.get(names[ours])
        if isinstance(text, str):
            draft.settings[ours] = text.strip()
            if program.syntax == "none" and _OWN_WEIGHTS.search(text):
                draft.say(f"weights in the {ours}, which {program.name} reads in a way of its own", text)
        elif ours == "prompt" or not is_empty(text):
            draft.say(f"the {ours}, which is not plain text")
    for ours in ("steps", "guidance", "seed", "width", "height"):
        draft.take_number(ours, values.get(names[ours]), names[ours])
    for ours in ("clip_skip", "guidance_rescale"):
        if ours in names and not is_empty(value := values.get(names[ours])):
            draft.take_number(ours, value, names[ours])
    named = in_words(values.get(names["sampler"]) or "")
    schedule = in_words(values.get(names["schedule"]) or "") if "schedule" in names else ""
    draft.take_sampler(*program.samplers.get(named, (named, schedule)))
    draft.take_model(values.get(names["model"]))
    known = {*names.values(), *program.harmless}
    usual = {name for name, ones in program.usual.items() if values.get(name) in ones}
    draft.say_others(values, known | usual)
    return draft


def _split_invokeai_prompt(text: Any) -> Values:
    """Split a prompt of InvokeAI's first versions: what stands in square brackets is negative."""
    if not isinstance(text, str):
        return {"positive_prompt": text, "negative_prompt": None}
    negative = " ".join(re.findall(r"\[([^\[\]]*)\]", text))
    positive = re.sub(" +", " ", re.sub(r"\[[^\[\]]*\]", " ", text)) if negative else text
    return {"positive_prompt": positive, "negative_prompt": negative}


def _without_tags(prompt: str, asked: list[str]) -> str:
    """Take SwarmUI's tags out of a prompt, with the words that belong to a part of the image; they join ``asked``."""
    for found in _TAG.finditer(prompt):
        if found[1].lower() in _PARTS:
            asked.append(prompt[found.start() :])
            prompt = prompt[: found.start()]
            break
    asked += [found.group() for found in _TAG.finditer(prompt)]
    return _TAG.sub("", prompt).strip()


def _listed(value: Any) -> list[str]:
    """Return a list that is one, or a text with commas."""
    parts = value if isinstance(value, list) else value.split(",") if isinstance(value, str) else []
    return [in_words(part).strip() for part in parts]
