"""Train from a model: its U-Net, an adapter beside it, a new word, channels for a mask, or its VAE alone.

What is written is what was trained: a diffusers folder, or the file of an adapter or a word. The ``training`` subfolder
is as in training from scratch.
"""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import nn

from gobelin.adapters.adapter_file import write_adapter
from gobelin.adapters.trainable import add_adapters_
from gobelin.adapters.trained_words import (
    add_trained_word_,
    check_new_word,
    count_captioned,
    trained_vectors,
    write_word,
)
from gobelin.checkpoint import Model, open_model
from gobelin.checkpoint.shipped import shipped_model
from gobelin.data import CachedDataset, Dataset
from gobelin.data.captioned_files import METADATA
from gobelin.data.encoded import LatentCache, TextCache
from gobelin.data.image_folder import ImageFolderDataset
from gobelin.errors import DataError, TrainingError
from gobelin.formats.files import write_text
from gobelin.formats.png import write_png
from gobelin.pipeline import Pipeline
from gobelin.plan import inpaints
from gobelin.training import distributed
from gobelin.training.fine_tune_config import FineTuneConfig, PriorConfig
from gobelin.training.fine_tune_stages import InpaintingStage, WithPrior, widen_for_mask_
from gobelin.training.losses import UNetLoss
from gobelin.training.model_card import adapter_card, fine_tune_card
from gobelin.training.recipes.diffusion import Networks, cache_texts, make_prior_stage, make_unet_stage
from gobelin.training.recipes.recipe import Recipe
from gobelin.training.stages import UNetStage, VAEStage, images_of_one_size
from gobelin.training.trainer import Stage, fit

ADAPTER_FILE, ADAPTER_FOLDER = "adapter.safetensors", "adapter"
_TRIED = 8  # images that the VAE is tried on
# dB of reproduced images: the shipped model's are below on paper that it never saw, and above 30 on its own.
_LEAST_PSNR = 18
_PRIOR_TOGETHER = 4  # images of the prior that are painted at once


class FineTune(Recipe[FineTuneConfig]):
    """The recipe of training from a model: one stage."""

    _prior_source: Dataset | None = None
    """The images of the prior, where they are not painted."""

    @property
    def sections(self) -> dict[str, str]:  # type: ignore[override]
        """The section of the configuration of the only stage."""
        return {"vae": "vae"} if self.config.method == "vae" else {"unet": "unet"}

    def stages(self) -> dict[str, Callable[[], None]]:
        """Name the only stage."""
        return {"vae": self.vae} if self.config.method == "vae" else {"unet": self.unet}

    @cached_property
    def model(self) -> Model:
        """The model to start from, in float32."""
        return open_model(self._path, self.device, torch.float32)

    @property
    def _path(self) -> str | Path:
        return shipped_model() if self.config.model is None else self.config.model

    @property
    def image_size(self) -> int:
        """Height and width of a square image: those asked for, or the model's own."""
        vae, unet = self.model.vae.config, self.model.unet.config
        size = self.config.data.size or unet.sample_size * vae.factor
        multiple = vae.factor * 2 ** (len(unet.block_out_channels) - 1)
        if size % multiple:
            raise TrainingError(f"data.size is {size}: this model needs a multiple of {multiple}")
        return size

    @cached_property
    def split(self) -> tuple[Dataset, Dataset | None]:
        """The images to train on, and those held out, where the loss is measured on them."""
        reason = "the method vae has no captions" if self.config.method == "vae" else "this U-Net sees a mask"
        if self.config.method != "vae" and not self._is_masked:
            return super().split
        if self.config.data.validation:
            self.console.print(f"no images are held out to measure the loss by caption: {reason}", highlight=False)
        return self.source, None

    @property
    def _is_masked(self) -> bool:
        return self.config.method == "inpainting" or inpaints(self.model.unet)

    @cached_property
    def source(self) -> Dataset:
        """Open the data, and check that this model can be trained with it, before anything is written."""
        source, config = super().source, self.config
        if config.prior.is_given and self._is_masked:
            raise TrainingError("a prior is given: a U-Net that sees a mask has none, leave it out")
        if config.method == "textual_inversion":
            new = config.new_word
            check_new_word(self.model.tokenizer, new.word, new.begin, new.vectors)
            self._require_word(new.word, source)
        if config.prior.path is not None:  # here, where every process comes by
            named = {"path": config.prior.path, "caption_column": config.prior.caption_column}
            prior = replace(config, data=replace(config.data, **named), prior=PriorConfig())
            self._prior_source = self._open(prior, "opening images of the prior")
            self.console.print(f"prior: {self._prior_source.description}", highlight=False)
        return source

    def _identify(self, source: Dataset) -> dict[str, Any]:
        own, prior = super()._identify(source), self._prior_source
        if prior is None:
            return own
        return {
            "description": f"{own['description']}, and as a prior {prior.description}",
            "count": own["count"] + len(prior),
            "fingerprint": f"{own['fingerprint']} {prior.fingerprint}",
        }

    def fill_cache(self) -> tuple[CachedDataset, LatentCache, TextCache]:
        """Compute pixels, latents and text embeddings of all the data into the cache, and train nothing."""
        model, dataset = self.model, self.dataset
        latents = self.latents(dataset, model.vae, self.config.unet.optim.precision)
        return dataset, latents, cache_texts(self, model.text_encoder, model.tokenizer, dataset)

    def vae(self) -> None:
        """Train the VAE's decoder; the folder holds the whole model with it.

        The encoder stays, as the U-Net knows its latents: so were Stable Diffusion's VAEs trained on (StabilityAI's
        model card of sd-vae-ft-mse).
        """
        vae = self.model.vae.requires_grad_(False)
        vae.decoder.requires_grad_(True)
        vae.post_quant_conv.requires_grad_(True)
        data, steps = self.config.data, self.config.vae.optim.steps
        shown = self.config.samples
        stage = VAEStage(self.dataset, vae, self.config.vae, self.config.seed, shown, fresh=False, flip=data.flip)
        fit(stage, self.context)
        self._write_model(Pipeline(self.model), steps, steps)

    def unet(self) -> None:
        """Train the U-Net, or what is put beside it."""
        config, model = self.config.unet, self.model
        self._say_if_unpaintable()
        self._prepare()
        networks = Networks(
            unet=model.unet,
            vae=model.vae.requires_grad_(False),
            text_encoder=model.text_encoder,
            tokenizer=model.tokenizer,
            schedule=model.schedule,
            is_text_trained=config.train_text_encoder or self.config.method == "textual_inversion",
        )

        def write(module: UNetLoss, step: int) -> Pipeline:
            """Write what is trained as it stands, and return the model that paints with it."""
            text_encoder = module.text_encoder or model.text_encoder
            pipeline = Pipeline(replace(model, unet=module.unet, text_encoder=text_encoder))
            if distributed.is_main_process():
                self._write(pipeline, step)
            return pipeline

        kind: Any = partial(InpaintingStage, model.vae) if self._is_masked else UNetStage
        stage: Stage[UNetLoss] = make_unet_stage(self, networks, config, write, kind)
        if self.config.prior.is_given:
            prior = make_prior_stage(self, networks, config, self._prior())
            stage = WithPrior(stage, prior, self.config.prior.weight)  # type: ignore[assignment,arg-type]
        trained = fit(stage, self.context)
        write(trained, config.optim.steps)

    @torch.no_grad()
    def _say_if_unpaintable(self) -> None:
        """Say where the VAE does not reproduce one's images: a U-Net learns what the VAE makes of them."""
        vae, images = self.model.vae, self.dataset.images(images_of_one_size(self.dataset, _TRIED))
        reproduced = vae.decode(vae.encode(images.to(vae.device)).mode()).clamp(-1, 1)
        psnr = 10 * math.log10(4 / max((reproduced.float().cpu() - images).square().mean().item(), 1e-10))
        if psnr < _LEAST_PSNR:
            self.console.print(
                f"this model's VAE reproduces these images at {psnr:.0f} dB, and below {_LEAST_PSNR} they look like "
                "others: train it on them first (--preset vae)",
                highlight=False,
            )

    def _prepare(self) -> None:
        """Freeze the model but for what the method trains, and put that into it."""
        config, model = self.config, self.model
        model.unet.requires_grad_(config.method in ("full", "inpainting"))
        model.text_encoder.requires_grad_(config.unet.train_text_encoder and config.method == "full")
        if config.method == "adapter":
            generator = torch.Generator().manual_seed(config.seed)
            add_adapters_(model.unet, config.adapter, generator)
            if config.unet.train_text_encoder:
                add_adapters_(model.text_encoder, config.adapter, generator)
        if config.method == "inpainting":
            widen_for_mask_(model.unet, model.vae.config.latent_channels)
        if config.method in ("full", "inpainting"):
            # A model's own size is the one that it was trained at last: it paints at it where none is asked for.
            size = self.image_size // model.vae.config.factor
            model.unet.config = replace(model.unet.config, sample_size=size)
        if config.method == "textual_inversion":
            new = config.new_word
            add_trained_word_(model.text_encoder, model.tokenizer, new.word, new.begin, new.vectors)

    def _require_word(self, word: str, source: Dataset) -> None:
        """Raise :class:`DataError` where no caption has the new word, and say how many have not."""
        having = count_captioned(self.model.tokenizer, word, map(source.captions, range(len(source))))
        if not having:
            raise DataError(
                f"the new word {word!r} is in none of the {len(source):,} captions: write it into them, as in "
                f"'a photo of {word}', or give yours with --new-word.word"
            )
        if having < len(source):
            missing = f"{len(source) - having:,} of {len(source):,} captions are without {word!r}"
            self.console.print(missing, highlight=False)

    def _write(self, pipeline: Pipeline, step: int) -> None:
        """Write the adapter, the word, or the whole model, and its card."""
        config = self.config
        if config.method == "textual_inversion":
            path = write_word(self.out, config.new_word.word, trained_vectors(pipeline.text_encoder))
        elif config.method == "adapter":
            networks: dict[str, nn.Module] = {"unet": pipeline.unet}
            if config.unet.train_text_encoder:
                networks["text_encoder"] = pipeline.text_encoder
            path = self.out / (ADAPTER_FILE if config.layout != "peft" else ADAPTER_FOLDER)
            metadata = {"ss_steps": str(step), "ss_learning_rate": str(config.unet.optim.learning_rate)}
            write_adapter(path, networks, config.layout, metadata)
        else:
            self._write_model(pipeline, step, config.unet.optim.steps)
            return
        card = adapter_card(config, path.name, self.source.description, step)
        write_text(self.out / "README.md", card)

    def _write_model(self, pipeline: Pipeline, step: int, steps: int) -> None:
        if distributed.is_main_process():
            card = fine_tune_card(self.config, self.source.description, step, steps, self._is_masked)
            write_text(self.out / "README.md", card)
            pipeline.save_pretrained(self.out)

    def _prior(self) -> CachedDataset:
        """Open the images of the prior; those to be painted are, by the model as it was, if they are not there yet."""
        if self._prior_source is not None:
            return self.cached(self._prior_source, "reading images of the prior")
        config = self.config.prior
        folder = self.folder / "prior"
        prompts = [config.prompts[number % len(config.prompts)] for number in range(config.count)]
        if distributed.is_main_process():
            folder.mkdir(parents=True, exist_ok=True)
            missing = [seed for seed in range(config.count) if not (folder / f"{seed:05d}.png").exists()]
            with Progress(console=self.console, disable=not self.console.is_terminal) as progress:
                task = progress.add_task("painting the prior", total=len(missing))
                # Opened again: the one in this run has adapters, or weights that a resumed run has trained.
                pipeline = Pipeline(open_model(self._path, self.device, torch.float32)) if missing else None
                for start in range(0, len(missing), _PRIOR_TOGETHER):
                    assert pipeline is not None
                    seeds = missing[start : start + _PRIOR_TOGETHER]
                    result = pipeline([prompts[seed] for seed in seeds], seed=seeds)
                    for seed, image, settings in zip(seeds, result.images, result.settings, strict=True):
                        write_png(folder / f"{seed:05d}.png", image, settings)
                    progress.advance(task, len(seeds))
            lines = [
                json.dumps({"file_name": f"{seed:05d}.png", "text": prompts[seed]}) for seed in range(config.count)
            ]
            write_text(folder / METADATA, "\n".join(lines) + "\n")
        distributed.wait_for_main()
        data = self.config.data
        source = ImageFolderDataset(folder, self.image_size, fit=data.fit, background=data.background)
        return self.cached(source, "reading images of the prior")
