"""A painting's plan: prompts and settings checked against a model, before anything is painted."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import torch
from PIL import Image

from gobelin.attention import AttentionSite, Trace, choose_sites
from gobelin.checkpoint import Model
from gobelin.control.batch import AnyControl, Attached, Batch, attach_controls
from gobelin.errors import UsageError
from gobelin.guidance import Guidance, classifier_free_guidance
from gobelin.head_weights import HeadWeights
from gobelin.images import open_image, open_mask
from gobelin.inpainting import InitImage
from gobelin.look.sharp_maps import sharp_trace
from gobelin.prompt_weighting import PromptSyntax
from gobelin.samplers import NoiseLevels, find_noise_levels, img2img_levels
from gobelin.settings import DEFAULT_STRENGTH, MAX_SEED, NOT_REPEATABLE, Prompts, Settings
from gobelin.text_conditioning import Chunks, chunk_prompt
from gobelin.types import Latents
from gobelin.unet import UNet
from gobelin.validation import Fraction, shown, validated

MAX_PIXELS = 2**26  # of an image: 8192 × 8192, whose latents' attention takes minutes a step
MAX_ENLARGED = 16  # times the model's own pixels; a photograph taken at its own size by mistake has more
_NOT_RECORDED = ("count", "latents", "trace", "control")
"""Settings that an image does not record: they are of the call, or change nothing, or cannot be written down."""
_OF_EACH_IMAGE = ("seed", "init_image", "mask", "strength")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of a painting: every image's settings, and what prompts, images and controls came to.

    ``shape`` is that of an image's latents [C, h, w]; ``from_image`` says that sampling begins from the init image's
    latents, and not from noise alone. ``also`` are the words that the trace looks for beside the prompts.
    """

    settings: list[dict[str, Any]]
    shape: tuple[int, int, int]
    texts: list[Chunks]
    negative: Chunks
    syntax: PromptSyntax
    clip_skip: int
    latents: Latents | None
    tile: int | None
    cache_interval: int
    merge_tokens: float
    init_image: InitImage | None
    from_image: bool
    sampler: str
    levels: NoiseLevels
    guidance: Guidance
    trace: Trace | None
    also: list[Chunks]
    attached: Attached

    def __len__(self) -> int:
        return len(self.settings)

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents."""
        return self.shape[1], self.shape[2]

    @property
    def length(self) -> int:
        """The batch's number of tokens: the longest prompt's."""
        return max(chunks.token_ids.numel() for chunks in (*self.texts, self.negative))


def make_plan(model: Model, prompt: Prompts, settings: Settings, added: dict[str, Any] | None = None) -> Plan:
    """Check prompts and settings against a model, and fill in what it recommends.

    ``added`` are LoRAs and learned words, for the images' own settings. Raises :class:`UsageError` for what cannot be
    painted; warns of a prompt that is cut.
    """
    prompts = _prompts(prompt)
    asked = settings.filled(model.recommended)
    assert asked.sampler is not None
    assert asked.steps is not None
    assert asked.guidance is not None
    total = len(prompts) * asked.count
    syntax = asked.weights or "a1111"
    clip_skip = check_clip_skip(model, asked.clip_skip or 0)
    init_images, masks = _images(asked, total)
    h, w = latent_size(model, asked.height, asked.width, init_images[0].size if init_images else None)
    factor = model.vae.config.factor
    shape = (model.vae.config.latent_channels, h, w)
    if masks is None and inpaints(model.unet):
        raise UsageError("this is an inpainting model: give init_image and a mask of what to paint in it")
    init_image = None if init_images is None else InitImage.of(init_images, masks, (h * factor, w * factor))
    if init_image is not None and init_image.mask is not None and not init_image.mask.any():
        warnings.warn("nothing in the mask is white, so nothing is painted: white is inpainted", stacklevel=5)
    latents = _latents(asked, (total, *shape))

    distinct = chunk_prompts(model, (*prompts, asked.negative_prompt or ""), syntax, stacklevel=6)
    texts = [distinct[text] for text in prompts for _ in range(asked.count)]
    length = max(chunks.token_ids.numel() for chunks in distinct.values())
    batch = Batch(
        words=tuple(chunks.words.at_length(length) for chunks in texts),
        latent_size=(h, w),
        channels=shape[0],
        sites=model.unet.attention_sites,
    )
    controls = control_list(asked.control)
    attached = attach_controls(controls, batch)

    strength = DEFAULT_STRENGTH if asked.strength is None else asked.strength
    # Inpainting at full strength begins from noise alone, as in diffusers.
    from_image = init_image is not None and (init_image.mask is None or strength < 1) and attached.sampling is None
    if attached.sampling is None:
        levels = find_noise_levels(asked.sampler, model.schedule, asked.steps)
        levels = img2img_levels(levels, asked.steps, strength) if from_image else levels
    elif latents is not None:
        raise UsageError("finished images are edited, and not noise: leave out the start latents")
    else:
        find_noise_levels(asked.sampler, model.schedule, asked.steps)  # as many steps as there can be
        levels = attached.sampling.levels(model.schedule, asked.steps)
    scale = asked.guidance
    guidance = scale if callable(scale) else classifier_free_guidance(scale, asked.guidance_rescale or 0.0)
    left_out = (*_NOT_RECORDED, *_OF_EACH_IMAGE)
    recorded = {name: value for name, value in dict(asked).items() if name not in left_out and value is not None}
    common = {
        **recorded,
        "negative_prompt": asked.negative_prompt or "",
        "guidance": _name_guidance(scale) if callable(scale) else scale,
        "guidance_rescale": asked.guidance_rescale or 0.0,
        "height": h * factor,
        "width": w * factor,
        "clip_skip": clip_skip,
        "weights": syntax,
        "model": model.name,
        **(added or {}),
        **({NOT_REPEATABLE: True} if controls or latents is not None or callable(scale) else {}),
    }
    begun = {} if attached.sampling is not None else {"strength": strength}
    per_image = [{**begun, **known} for known in init_image.digests] if init_image else [{}] * total
    repeated = [text for text in prompts for _ in range(asked.count)]
    trace = _trace(model, asked, (h, w), levels)
    return Plan(
        settings=[
            {"prompt": text, "seed": seed, **common, **own}
            for text, seed, own in zip(repeated, _seeds(asked.seed, total), per_image, strict=True)
        ],
        shape=shape,
        texts=texts,
        negative=distinct[asked.negative_prompt or ""],
        syntax=syntax,
        clip_skip=clip_skip,
        latents=latents,
        tile=asked.tile,
        cache_interval=asked.cache_interval,
        merge_tokens=asked.merge_tokens,
        init_image=init_image,
        from_image=from_image,
        sampler=asked.sampler,
        levels=levels,
        guidance=attached.guide(guidance),
        trace=trace,
        also=chunk_words(model, trace.also, syntax, stacklevel=6) if trace else [],
        attached=attached,
    )


def chunk_prompts(model: Model, prompts: Iterable[str], syntax: PromptSyntax, stacklevel: int) -> dict[str, Chunks]:
    """Split each distinct prompt into chunks; warns of one that is cut, at the line ``stacklevel`` calls above."""
    distinct = {text: chunk_prompt(model.tokenizer, text, syntax) for text in prompts}
    for chunks in distinct.values():
        if chunks.cut:
            warnings.warn(
                f"the prompt is longer than this model's {model.tokenizer.max_length} tokens, so its end is left out: "
                f"{chunks.cut!r}",
                stacklevel=stacklevel,
            )
    return distinct


def chunk_words(model: Model, words: Iterable[str], syntax: PromptSyntax, stacklevel: int) -> list[Chunks]:
    """Split each of some words or phrases into chunks; raises :class:`UsageError` for one that has no token."""
    found = chunk_prompts(model, words, syntax, stacklevel + 1)
    for word, chunks in found.items():
        if not chunks.words.part("text"):
            raise UsageError(f"also has {word!r}, which is no word: leave it out")
    return list(found.values())


def _name_guidance(guidance: Guidance) -> str:
    """Name a guidance by the function that it is, or that made it."""
    return getattr(guidance, "__qualname__", type(guidance).__name__).split(".<locals>")[0]


def latent_size(
    model: Model, height: int | None = None, width: int | None = None, image_size: tuple[int, int] | None = None
) -> tuple[int, int]:
    """Compute height and width of the latents of an image that is ``height`` × ``width`` pixels.

    A side that is None is that of the init image, (width, height), rounded down to what the model can paint, or the
    model's own. Raises :class:`UsageError` for a size that cannot be painted,
    and for an init image that is far larger than the model's own size.
    """
    factor = model.vae.config.factor
    own = model.unet.config.sample_size * factor
    if image_size is not None:
        wide, high = image_size
        if height is None and width is None and wide * high > MAX_ENLARGED * own * own:
            scale = own / min(wide, high)
            fitting = [max(factor, round(side * scale / factor) * factor) for side in (wide, high)]
            raise UsageError(
                f"the init image has {wide}×{high} pixels, and this model paints about {own}×{own}: give the size to "
                f"paint, such as width {fitting[0]} and height {fitting[1]}"
            )
        height = high - high % factor if height is None else height
        width = wide - wide % factor if width is None else width
    height, width = (own if given is None else given for given in (height, width))
    if height < factor or width < factor or height % factor or width % factor:
        raise UsageError(f"{width}×{height} pixels asked for: this model paints sizes that are multiples of {factor}")
    if height * width > MAX_PIXELS:
        raise UsageError(f"{width}×{height} pixels asked for: give {MAX_PIXELS:,} at most in all")
    return height // factor, width // factor


def inpaints(unet: UNet) -> bool:
    """Tell whether a U-Net sees a mask, and the masked image's latents, beside the noisy latents."""
    return unet.config.in_channels == 2 * unet.config.out_channels + 1


def control_list(control: AnyControl | Sequence[AnyControl] | None) -> list[AnyControl]:
    """Return one control or several as a list."""
    if control is None:
        return []
    return list(control) if isinstance(control, Sequence) else [control]


def _prompts(prompt: Prompts) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, Sequence) or not all(isinstance(text, str) for text in prompts):
        raise UsageError(f"the prompt is {shown(prompt)}: give text, or a list of texts")
    if not prompts or not all(text.strip() for text in prompts):
        raise UsageError("the prompt is empty: say in a few words what to paint")
    return list(prompts)


def check_clip_skip(model: Model, clip_skip: int) -> int:
    """Return ``clip_skip``, or raise :class:`UsageError` where the text encoder has not so many layers to leave out."""
    layers = model.text_encoder.config.num_hidden_layers
    if clip_skip >= layers:
        raise UsageError(f"clip_skip is {clip_skip}: give a number from 0 to {layers - 1}")
    return clip_skip


def _images(asked: Settings, total: int) -> tuple[list[Image.Image] | None, list[Image.Image] | None]:
    """Open the init images and masks, one for each image that is painted."""
    if asked.init_image is None:
        for name in ("mask", "strength"):
            if asked[name] is not None:
                raise UsageError(f"{name} is given without an image that it is for: give init_image too")
        return None, None
    images = [open_image(one, "init_image") for one in _one_each(asked.init_image, total, "init_image")]
    sizes = list(dict.fromkeys(f"{image.width}×{image.height}" for image in images))
    if len(sizes) > 1 and (asked.height is None or asked.width is None):
        raise UsageError(f"the init images are of {' and '.join(sizes[:3])} pixels: give the height and width to paint")
    masks = None
    if asked.mask is not None:
        masks = [open_mask(one, "mask") for one in _one_each(asked.mask, total, "mask")]
    return images, masks


def _one_each(given: Any, total: int, name: str) -> list[Any]:
    several = isinstance(given, Sequence) and not isinstance(given, str | PathLike)
    images = list(given) if several else [given] * total
    if len(images) != total:
        raise UsageError(f"{len(images)} images given as {name} for {total} to paint: give one for all, or one each")
    return images


def _latents(asked: Settings, shape: tuple[int, ...]) -> Latents | None:
    latents = asked.latents
    if latents is None:
        return None
    if not isinstance(latents, torch.Tensor) or tuple(latents.shape) != shape:
        what = list(latents.shape) if isinstance(latents, torch.Tensor) else type(latents).__name__
        raise UsageError(f"the start latents are {what}: expected {list(shape)}")
    if not latents.is_floating_point() or not latents.isfinite().all():
        raise UsageError(f"the start latents are {latents.dtype}, or not finite: give noise, as torch.randn draws it")
    return latents


def _seeds(seed: int | Sequence[int] | None, total: int) -> Iterable[int]:
    if seed is None:
        seed = int(torch.randint(2**31, ()).item())
    seeds = range(seed, seed + total) if isinstance(seed, int) else list(seed)
    if len(seeds) != total:
        raise UsageError(f"{len(seeds)} seeds given for {total} images: give one for each, or the first one's")
    if seeds[-1] > MAX_SEED:
        raise UsageError(f"the seed is {seeds[0]}: give a number from 0 to {MAX_SEED - total + 1}")
    return seeds


def find_trace(
    sites: Sequence[AttentionSite], trace: object, size: tuple[int, int], head_weights: HeadWeights | None = None
) -> Trace | None:
    """Find the trace that True, "sharp" or a :class:`Trace` stand for in latents of a size; None for False.

    ``sites`` are the U-Net's, and ``head_weights`` those of the model, if it has any. Raises :class:`UsageError` for
    anything else, and for sites that it does not have.
    """
    if not isinstance(trace, bool | Trace) and not (isinstance(trace, str) and trace == "sharp"):
        raise UsageError(f'trace is {shown(trace)}: give True, False, "sharp" or a gobelin.attention.Trace')
    if not trace:
        return None
    asked = trace if isinstance(trace, Trace) else Trace(sharp=trace == "sharp")
    if asked.sharp:
        if asked.sites is not None or asked.start:
            raise UsageError("sharp maps choose sites and start themselves: leave out these, or sharp")
        best = sharp_trace(sites, size, asked.head_weights or head_weights)
        per_head = asked.per_head or best.per_head
        asked = replace(asked, sites=best.sites, start=best.start, per_head=per_head, head_weights=best.head_weights)
    validated("the start of a trace", asked.start, Fraction)
    choose_sites(sites, asked.sites)
    return asked


def _trace(model: Model, settings: Settings, size: tuple[int, int], levels: NoiseLevels) -> Trace | None:
    """Choose the maps to keep; the last step's are always among them."""
    asked = find_trace(model.unet.attention_sites, settings.trace, size, model.head_weights)
    if asked is None:
        return None
    if asked.per_step and settings.cache_interval > 1:
        raise UsageError(
            f"cache_interval is {settings.cache_interval}, and the maps of every step are asked for, which not every "
            "step has then: give a cache_interval of 1, or a trace without per_step"
        )
    return replace(asked, start=min(asked.start, model.schedule.progress(levels.timesteps[-1])))
