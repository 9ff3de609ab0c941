"""What is asked of a pipeline, checked before anything is painted."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from gobelin.attention import Change, Edit, Trace, choose_sites
from gobelin.checkpoint import Model
from gobelin.control.attention_control import Blend, FlowEdit, Push
from gobelin.control.attention_guidance import Wish
from gobelin.control.flow_edit import flow_edit_levels
from gobelin.errors import UsageError
from gobelin.inpainting import Canvas, Pictures, canvas
from gobelin.look.heatmaps import sharp_trace
from gobelin.prompt_weighting import Style, chunked
from gobelin.samplers import NoiseLevels, find_noise_levels, img2img_levels
from gobelin.unet import UNet

Asked = Edit | Wish | Blend | Push | FlowEdit
AnyEdit = Change | Asked

_TEXTS = ("prompt", "negative_prompt", "sampler", "weights")
_WHOLE = ("seed", "steps", "height", "width", "count", "clip_skip", "tile")
_NUMBERS = ("guidance", "guidance_rescale", "strength")

MIN_TILE = 16
MAX_SEED = 2**63 - 1
MOST_PIXELS = 2**26
LORAS, LEARNED_WORDS = "loras", "learned_words"
EDITED = "edited"
"""In a picture's settings where it was painted with edits or latents that they do not hold: they do not repeat it."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """The settings of every picture, the shape of its latents [C, h, w], what to look at and to change.

    ``length`` is that of the text embeddings; ``over`` says that the picture of the canvas is begun with, and not noise
    alone; ``sharpen`` that heat maps are to be the sharp ones.
    """

    settings: list[dict[str, Any]]
    shape: tuple[int, int, int]
    latents: Tensor | None
    tile: int | None
    length: int
    canvas: Canvas | None
    over: bool
    grid: NoiseLevels
    trace: Trace | None
    sharpen: bool
    edits: tuple[Asked, ...]


def request(
    model: Model,
    prompt: str | Sequence[str],
    *,
    negative_prompt: str = "",
    seed: int | Sequence[int] | None = 0,
    steps: int | None = None,
    guidance: float | None = None,
    guidance_rescale: float | None = None,
    sampler: str | None = None,
    height: int | None = None,
    width: int | None = None,
    count: int = 1,
    latents: Float[Tensor, "batch channels h w"] | None = None,
    init_image: Pictures | None = None,
    strength: float = 0.8,
    mask: Pictures | None = None,
    clip_skip: int = 0,
    weights: Style = "a1111",
    tile: int | None = None,
    trace: bool | str | Trace = False,
    edit: AnyEdit | Sequence[AnyEdit] = (),
    loras: Mapping[str, float] | None = None,
    learned_words: Sequence[str] = (),
) -> Request:
    """What :meth:`gobelin.pipeline.Pipeline.stream` is asked, with what the model recommends where nothing is said.

    Raises :class:`UsageError` for what cannot be painted; warns of a prompt that is cut.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    refuse_odd({"guidance": guidance, "guidance_rescale": guidance_rescale, "strength": strength})
    if not prompts or not all(text.strip() for text in prompts):
        raise UsageError("the prompt is empty: say in a few words what to paint")
    if count < 1:
        raise UsageError(f"count is {count}: give 1 or more")
    if guidance_rescale is not None and not 0 <= guidance_rescale <= 1:
        raise UsageError(f"guidance_rescale is {guidance_rescale}: give a number from 0 to 1")
    if tile is not None and tile < MIN_TILE:
        raise UsageError(f"the tile is {tile}: give {MIN_TILE} latents or more")
    layers = model.text_encoder.config.num_hidden_layers
    if not 0 <= clip_skip < layers:
        raise UsageError(f"clip_skip is {clip_skip}: give a number from 0 to {layers - 1}")
    total = len(prompts) * count
    h, w = latent_size(model, height, width, init_image)
    shape = (model.vae.config.latent_channels, h, w)
    height, width = h * model.vae.config.factor, w * model.vae.config.factor
    if latents is not None and tuple(latents.shape) != (total, *shape):
        raise UsageError(f"the start latents are {list(latents.shape)}: expected {[total, *shape]}")
    if mask is not None and init_image is None:
        raise UsageError("a mask is given without a picture that it is of: give init_image too")
    if inpaints(model.unet) and mask is None:
        raise UsageError("this is an inpainting model: give init_image and a mask of what to paint in it")
    begun = None if init_image is None else canvas(init_image, mask, strength, total, (height, width))
    asked = {
        "steps": steps,
        "guidance": guidance,
        "guidance_rescale": guidance_rescale,
        "sampler": sampler,
    }
    chosen = {name: getattr(model.recommended, name) if given is None else given for name, given in asked.items()}
    grid = find_noise_levels(chosen["sampler"], model.schedule, chosen["steps"])
    # A hole at full strength is painted from noise alone.
    over = begun is not None and (mask is None or strength < 1)
    if over:
        grid = img2img_levels(grid, chosen["steps"], strength)
    edits = [one if isinstance(one, Asked) else Edit(change=one) for one in listed(edit)]
    for one in edits:
        if isinstance(one, FlowEdit):
            if latents is not None:
                raise UsageError("finished pictures are edited, and not noise: leave out the start latents")
            if tuple(one.latents.shape) != (total / 2, *shape):
                raise UsageError(
                    f"{list(one.latents.shape)} are edited in a batch of {total}: expected half as many pictures, each "
                    f"{list(shape)}"
                )
            grid = img2img_levels(flow_edit_levels(model.schedule, chosen["steps"]), chosen["steps"], one.strength)
    traced = _traced(model, trace, shape, grid)
    _refuse_misfits(model, (traced, *edits), total)
    common = {
        "negative_prompt": negative_prompt,
        **chosen,
        "height": height,
        "width": width,
        "clip_skip": clip_skip,
        "weights": weights,
        "model": model.name,
        **({LORAS: dict(loras)} if loras else {}),
        **({LEARNED_WORDS: list(learned_words)} if learned_words else {}),
        **({EDITED: True} if edits or latents is not None else {}),
    }
    repeated = [text for text in prompts for _ in range(count)]
    pairs = zip(repeated, _seeds(seed, total), strict=True)
    settings = [{"prompt": text, "seed": number, **common} for text, number in pairs]
    if begun is not None:
        digests = zip(settings, begun.digests, strict=True)
        settings = [{**one, "strength": strength, **digest} for one, digest in digests]
    return Request(
        settings=settings,
        shape=shape,
        latents=latents,
        tile=tile,
        length=_length(model, (*prompts, negative_prompt), weights),
        canvas=begun,
        over=over,
        grid=grid,
        trace=traced,
        sharpen=trace == "sharp",
        edits=tuple(edits),
    )


def latent_size(
    model: Model, height: int | None, width: int | None, init_image: Pictures | None = None
) -> tuple[int, int]:
    """Height and width of the latents of a picture that is ``height`` × ``width`` pixels.

    Where both are None they are those of the picture to begin from, rounded down, or the model's own; where one is, it
    is the model's own. Raises :class:`UsageError` for a size that cannot be painted.
    """
    factor = model.vae.config.factor
    if init_image is not None and height is None and width is None:
        picture = init_image if isinstance(init_image, Image.Image) else next(iter(init_image), None)
        if picture is None:
            raise UsageError("init_image holds no picture: give one, or one for each that is painted")
        height, width = picture.height - picture.height % factor, picture.width - picture.width % factor
    height, width = (_side(model) if given is None else given for given in (height, width))
    if height < factor or width < factor or height % factor or width % factor:
        raise UsageError(f"{width}×{height} pixels asked for: this model paints sizes that are multiples of {factor}")
    if height * width > MOST_PIXELS:
        raise UsageError(f"{width}×{height} pixels asked for: give {MOST_PIXELS:,} at most in all")
    return height // factor, width // factor


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def refuse_odd(settings: Mapping[str, Any]) -> None:
    """Raise :class:`UsageError` for the first setting that is not of its kind; None is of any."""
    for name, value in settings.items():
        if name in _TEXTS and not isinstance(value, str | None):
            raise UsageError(f"{name} is {value!r}: give text")
        if name in _WHOLE and value is not None and type(value) is not int:
            raise UsageError(f"{name} is {value!r}: give a whole number")
        if name in _NUMBERS and not (value is None or _is_finite(value)):
            raise UsageError(f"{name} is {value!r}: give a number")


def inpaints(unet: UNet) -> bool:
    """Whether the U-Net is one that sees a mask, and what is outside of it, beside the latents."""
    return unet.config.in_channels == 2 * unet.config.out_channels + 1


def listed(edit: AnyEdit | Sequence[AnyEdit]) -> list[AnyEdit]:
    """One edit or several, as a list."""
    return list(edit) if isinstance(edit, Sequence) else [edit]


def _side(model: Model) -> int:
    """The model's own height and width in pixels."""
    return model.unet.config.sample_size * model.vae.config.factor


def _seeds(seed: int | Sequence[int] | None, total: int) -> Sequence[int]:
    if seed is None:
        seed = int(torch.randint(2**31, ()).item())
    seeds = range(seed, seed + total) if isinstance(seed, int) else list(seed)
    if len(seeds) != total:
        raise UsageError(f"{len(seeds)} seeds given for {total} pictures: give one for each, or the first one's")
    if wrong := [seed for seed in seeds if not 0 <= seed <= MAX_SEED]:
        raise UsageError(f"the seed is {wrong[0]}: give a number from 0 to {MAX_SEED - total + 1}")
    return seeds


def _length(model: Model, texts: Iterable[str], weights: Style) -> int:
    """Tokens of the longest text."""
    if weights not in get_args(Style):
        raise UsageError(f"weights is {weights!r}: the choices are {', '.join(get_args(Style))}")
    found = [chunked(model.tokenizer, text, weights) for text in dict.fromkeys(texts)]
    for chunks in found:
        if cut := chunks.cut:
            warnings.warn(
                f"the prompt is longer than this model's {model.tokenizer.max_length} tokens, so its end is "
                f"left out: {cut!r}",
                stacklevel=5,
            )
    return max(chunks.token_ids.numel() for chunks in found)


def _traced(model: Model, trace: bool | str | Trace, shape: tuple[int, int, int], grid: NoiseLevels) -> Trace | None:
    """The trace that is asked for; the last step is always in it."""
    if isinstance(trace, str) and trace != "sharp":
        raise UsageError(f'trace is {trace!r}: give True, False, "sharp" or a gobelin.attention.Trace')
    if not trace:
        return None
    if isinstance(trace, str):
        asked = sharp_trace(model.unet.attention_sites, (shape[1], shape[2]))
    else:
        asked = trace if isinstance(trace, Trace) else Trace()
    if not 0 <= asked.start <= 1:
        raise UsageError(f"a trace starts at {asked.start:g} of the way: give a share from 0 to 1")
    return replace(asked, start=min(asked.start, model.schedule.progress(grid.timesteps[-1])))


def _refuse_misfits(model: Model, asked: Iterable[Trace | Asked | None], total: int) -> None:
    """Raise :class:`UsageError` for sites that the model does not have, and for pictures that the batch does not."""
    for one in asked:
        if isinstance(one, Trace | Edit | Wish):
            choose_sites(model.unet.attention_sites, one.sites)
        if isinstance(one, Wish | Blend | Push) and one.rows is not None and max(one.rows, default=0) >= total:
            raise UsageError(f"an edit is about picture {max(one.rows)} of a batch of {total}: the first is 0")
