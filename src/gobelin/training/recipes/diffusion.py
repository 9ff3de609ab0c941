"""The U-Net's stage, which training from scratch and from a model share: its data, its loss, and what it shows."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from gobelin.clip import TextEncoder
from gobelin.data import CachedDataset
from gobelin.data.encoded import LatentCache, TextCache, weights_hash
from gobelin.errors import DataError
from gobelin.images import tensor_to_images
from gobelin.pipeline import Pipeline
from gobelin.plan import inpaints
from gobelin.schedule import NoiseSchedule
from gobelin.tokenizer import Tokenizer
from gobelin.training.config import DiffusionConfig
from gobelin.training.losses import UNetLoss
from gobelin.training.recipes.recipe import Recipe
from gobelin.training.run_folder import Run
from gobelin.training.stages import HalfSize, UNetStage, encode_texts
from gobelin.training.unet_monitor import UNetMonitor, ValidationPairs
from gobelin.unet import UNet
from gobelin.vae import VAE


@dataclass(frozen=True, kw_only=True)
class Networks:
    """The networks that a U-Net is trained between. ``is_text_trained`` says that the text encoder learns too."""

    unet: UNet
    vae: VAE
    text_encoder: TextEncoder
    tokenizer: Tokenizer
    schedule: NoiseSchedule
    is_text_trained: bool = False


def make_unet_stage(
    recipe: Recipe[Any],
    networks: Networks,
    config: DiffusionConfig,
    write: Callable[[UNetLoss, int], Pipeline],
    stage: Callable[..., UNetStage] = UNetStage,
    half_size_steps: int = 0,
) -> UNetStage:
    """Make the U-Net's stage over a recipe's data, with its latents and texts cached.

    ``stage`` is the class, or what makes one; ``write`` writes the model as it stands and returns its pipeline. The
    first ``half_size_steps`` are on images of half the size.
    """
    networks.unet.gradient_checkpointing = config.gradient_checkpointing
    latents = recipe.latents(recipe.dataset, networks.vae, config.optim.precision)
    monitor = _make_monitor(recipe, networks, config, write, latents)
    if half_size_steps:
        halves = recipe.latents(recipe.dataset, networks.vae, config.optim.precision, is_half_size=True)
        stage = partial(stage, half_size=HalfSize(latents=halves.read, steps=half_size_steps))
    return _make_stage(recipe, networks, config, recipe.dataset, latents, recipe.config.seed, monitor, stage)


def make_prior_stage(
    recipe: Recipe[Any], networks: Networks, config: DiffusionConfig, dataset: CachedDataset
) -> UNetStage:
    """Make the stage of a prior's images: a seed of its own, and nothing to measure or to draw."""
    latents = recipe.latents(dataset, networks.vae, config.optim.precision)
    return _make_stage(
        recipe, networks, config, dataset, latents, recipe.config.seed + 1, lambda module, step, run: None, UNetStage
    )


def _make_stage(
    recipe: Recipe[Any],
    networks: Networks,
    config: DiffusionConfig,
    dataset: CachedDataset,
    latents: LatentCache,
    seed: int,
    show: Callable[[UNetLoss, int, Run], Image.Image | None],
    stage: Callable[..., UNetStage],
) -> UNetStage:
    module = UNetLoss(
        networks.unet,
        networks.text_encoder if networks.is_text_trained else None,
        networks.schedule,
        config.min_snr_gamma,
        config.grounding,
    )
    tokenizer = networks.tokenizer
    texts = (
        tokenizer if networks.is_text_trained else cache_texts(recipe, networks.text_encoder, tokenizer, dataset).read
    )
    scale = networks.vae.config.scaling_factor
    side = recipe.image_size // networks.vae.config.factor
    grounding = recipe.grounding(dataset, tokenizer, side) if config.grounding else None
    return stage(module, dataset, latents.read, scale, texts, config, seed, show, recipe.config.data.flip, grounding)


def cache_texts(
    recipe: Recipe[Any], text_encoder: TextEncoder, tokenizer: Tokenizer, dataset: CachedDataset
) -> TextCache:
    """Encode a dataset's captions by a frozen text encoder, those that are not cached."""
    vocabulary = repr(sorted(tokenizer.vocab.items())) + repr(tokenizer.max_length)

    def encode(texts: list[str]) -> Tensor:
        return encode_texts(text_encoder, tokenizer, texts)

    return recipe.texts(dataset, encode, weights_hash(text_encoder) + vocabulary)


def _make_monitor(
    recipe: Recipe[Any],
    networks: Networks,
    config: DiffusionConfig,
    write: Callable[[UNetLoss, int], Pipeline],
    latents: LatentCache,
) -> UNetMonitor:
    """Make what measures and draws: on pairs held out, on as many that are trained on, and on prompts."""

    def texts(module: UNetLoss, captions: list[str]) -> Tensor:
        return encode_texts(module.text_encoder or networks.text_encoder, networks.tokenizer, captions)

    prompts, truths = _choose_prompts(recipe, with_images=inpaints(networks.unet))
    return UNetMonitor(
        write=write,
        prompts=prompts,
        truths=truths,
        pairs=_validation_pairs(recipe, networks, config, latents),
        texts=texts,
        scaling_factor=networks.vae.config.scaling_factor,
        last_step=config.optim.steps,
        training=(recipe.dataset, latents),
        precision=config.optim.precision,
        settings=_sample_settings(recipe, truths if inpaints(networks.unet) else None),
    )


def _validation_pairs(
    recipe: Recipe[Any], networks: Networks, config: DiffusionConfig, latents: LatentCache
) -> dict[str, ValidationPairs]:
    """Choose the pairs that the loss is measured on; none, with a sentence, where captions are all alike."""
    held_out, data = recipe.split[1], recipe.config.data
    if held_out is None:
        if data.validation and not inpaints(networks.unet):
            say = f"the loss by caption is not measured: {len(recipe.dataset):,} images are too few to hold any out"
            recipe.console.print(say, highlight=False)
        return {}
    others = recipe.cached(held_out, "reading held-out images")
    splits = {
        "held_out": (others, recipe.latents(others, networks.vae, config.optim.precision)),
        "training": (recipe.dataset, latents),
    }
    scale = networks.vae.config.scaling_factor
    try:
        return {split: ValidationPairs.of(*both, scale, data.validation) for split, both in splits.items()}
    except DataError as error:
        recipe.console.print(f"the loss by caption is not measured: {error}", highlight=False)
        return {}


def _sample_settings(
    recipe: Recipe[Any], inpainted: list[Image.Image | None] | None
) -> Callable[[range], dict[str, Any]]:
    """Make the settings of samples: as large as most images that are trained on, or those inpainted in the middle.

    Captions of the data are drawn as the text that they are: brackets in them mean nothing.
    """
    height, width = recipe.dataset.sizes[_commonest_bucket(recipe.dataset)]
    shared = {} if recipe.config.sample_prompts else {"weights": "none"}
    mask = Image.new("L", (width, height))
    mask.paste(255, (width // 4, height // 4, 3 * width // 4, 3 * height // 4))

    def settings(part: range) -> dict[str, Any]:
        if inpainted is None:
            return {**shared, "height": height, "width": width}
        return {**shared, "init_image": [inpainted[at] for at in part], "mask": [mask] * len(part)}

    return settings


def _choose_prompts(recipe: Recipe[Any], with_images: bool) -> tuple[list[str], list[Image.Image | None]]:
    """Choose what is sampled: the prompts that were asked for, or captions of the data, each once, with their images.

    Captions are of images of one size, and spread over the data, as the first of a folder are often of one kind.
    ``with_images`` takes images for prompts that were asked for too.
    """
    dataset, prompts = recipe.dataset, list(recipe.config.sample_prompts)
    if prompts and not with_images:
        return prompts, [None] * len(prompts)
    count = len(prompts) or recipe.config.samples
    rows = np.flatnonzero(dataset.bucket_index == _commonest_bucket(dataset))
    if prompts:
        chosen = rows[np.linspace(0, len(rows) - 1, count).round().astype(int)].tolist()
    else:
        spread = rows[np.linspace(0, len(rows) - 1, min(len(rows), 4 * count)).round().astype(int)].tolist()
        by_caption: dict[str, int] = {}
        for row in chain(*(spread[first::4] for first in range(4))):  # every fourth first, to reach the end of the data
            by_caption.setdefault(dataset.captions(row)[0], row)
        prompts, chosen = list(by_caption)[:count], list(by_caption.values())[:count]
    return prompts, [tensor_to_images(dataset.images([row]))[0] for row in chosen]


def _commonest_bucket(dataset: CachedDataset) -> int:
    return int(np.bincount(dataset.bucket_index).argmax())
