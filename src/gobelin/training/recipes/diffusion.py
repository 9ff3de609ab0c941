"""The U-Net's stage, which training from scratch and from a model share: its data, its loss, and what it shows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from gobelin.clip import TextEncoder
from gobelin.data import CachedDataset
from gobelin.data.encoded import LatentCache, weights_hash
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
from gobelin.training.stages import UNetStage, encode_texts
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
    dataset: CachedDataset | None = None,
    stage: Callable[..., UNetStage] = UNetStage,
    seed: int | None = None,
) -> UNetStage:
    """Make the U-Net's stage over a recipe's data, or another ``dataset``, with its latents and texts cached.

    ``stage`` is the class, or what makes one; ``seed`` is another one than the recipe's.
    """
    networks.unet.gradient_checkpointing = config.gradient_checkpointing
    dataset = dataset or recipe.dataset
    vae, precision = networks.vae, config.optim.precision
    latents = recipe.latents(dataset, vae, precision)
    module = UNetLoss(
        networks.unet,
        networks.text_encoder if networks.is_text_trained else None,
        networks.schedule,
        config.min_snr_gamma,
    )
    return stage(
        module,
        dataset,
        latents.read,
        vae.config.scaling_factor,
        _make_texts(recipe, networks, dataset),
        config,
        recipe.config.seed if seed is None else seed,
        _make_monitor(recipe, networks, config, write, dataset, latents),
        recipe.config.data.flip,
    )


def _make_texts(recipe: Recipe[Any], networks: Networks, dataset: CachedDataset) -> Callable[[list[str]], Tensor]:
    """Make what turns captions into the U-Net's input: cached text embeddings, or token ids for what is trained."""
    if networks.is_text_trained:
        return networks.tokenizer
    vocabulary = repr(sorted(networks.tokenizer.vocab.items())) + repr(networks.tokenizer.max_length)

    def encode(texts: list[str]) -> Tensor:
        return encode_texts(networks.text_encoder, networks.tokenizer, texts)

    return recipe.texts(dataset, encode, weights_hash(networks.text_encoder) + vocabulary).read


def _make_monitor(
    recipe: Recipe[Any],
    networks: Networks,
    config: DiffusionConfig,
    write: Callable[[UNetLoss, int], Pipeline],
    dataset: CachedDataset,
    latents: LatentCache,
) -> "Callable[[UNetLoss, int, Run], Image.Image | None]":
    """Make what measures and draws: on pairs held out, on as many that are trained on, and on prompts."""
    scale, held_out = networks.vae.config.scaling_factor, recipe.split[1]
    splits = {"training": (dataset, latents)}
    # The loss of a U-Net that sees a mask needs one too, and is not measured by caption.
    if held_out is not None and not inpaints(networks.unet):
        others = recipe.cached(held_out, "reading held-out images")
        splits = {"held_out": (others, recipe.latents(others, networks.vae, config.optim.precision)), **splits}
    pairs = {}
    for split, (images, encoded) in splits.items() if len(splits) > 1 else ():
        try:
            pairs[split] = ValidationPairs.of(images, encoded, scale, recipe.config.data.validation)
        except DataError as error:  # captions that are all alike
            recipe.console.print(f"the loss by caption is not measured: {error}", highlight=False)
            break

    def texts(module: UNetLoss, captions: list[str]) -> Tensor:
        return encode_texts(module.text_encoder or networks.text_encoder, networks.tokenizer, captions)

    prompts, truths = _choose_prompts(recipe, dataset, with_images=inpaints(networks.unet))
    return UNetMonitor(
        write=write,
        prompts=prompts,
        truths=truths,
        pairs=pairs if len(pairs) == len(splits) else {},
        texts=texts,
        scaling_factor=scale,
        last_step=config.optim.steps,
        training=(dataset, latents),
        precision=config.optim.precision,
        settings=_with_mask(truths) if inpaints(networks.unet) else lambda part: {},
    )


def _with_mask(images: list[Image.Image | None]) -> Callable[[range], dict[str, Any]]:
    """Make the settings of inpainting the middle of each image."""

    def settings(part: range) -> dict[str, Any]:
        width, height = next(one.size for one in images if one is not None)
        mask = Image.new("L", (width, height))
        mask.paste(255, (width // 4, height // 4, 3 * width // 4, 3 * height // 4))
        return {"init_image": [images[at] for at in part], "mask": [mask] * len(part)}

    return settings


def _choose_prompts(
    recipe: Recipe[Any], dataset: CachedDataset, with_images: bool
) -> tuple[list[str], list[Image.Image | None]]:
    """Choose what is sampled: the prompts that were asked for, or captions of the data, each once, with their images.

    Captions are spread over the data, as the first of a folder are often of one kind.
    """
    count = recipe.config.samples
    if recipe.config.sample_prompts and not with_images:
        return list(recipe.config.sample_prompts), [None] * len(recipe.config.sample_prompts)
    chosen: dict[str, int] = {}
    for index in torch.linspace(0, len(dataset) - 1, min(len(dataset), 4 * count)).round().long().tolist():
        if len(chosen) < count:
            chosen.setdefault(dataset.captions(index)[0], index)
    return list(chosen), [tensor_to_images(dataset.images([index]))[0] for index in chosen.values()]
