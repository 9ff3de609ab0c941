"""Train a model from scratch: tokenizer, text encoder, VAE, U-Net, one after the other, into one model folder.

The result is a diffusers folder; its ``training`` subfolder keeps the configuration, the metrics, the sample sheets, a
report and, until a stage is done, its checkpoints.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import torch

from gobelin.checkpoint import Model
from gobelin.clip import IMAGE_ENCODER, ImageEncoder, ImageEncoderConfig, TextEncoder, TextEncoderConfig
from gobelin.data.batches import derive_seed
from gobelin.errors import TrainingError
from gobelin.formats.files import write_text
from gobelin.pipeline import Pipeline
from gobelin.schedule import NoiseSchedule, ScheduleConfig
from gobelin.tokenizer import Tokenizer
from gobelin.training import distributed
from gobelin.training.config import TrainConfig
from gobelin.training.losses import UNetLoss
from gobelin.training.model_card import model_card
from gobelin.training.recipes.diffusion import Networks, make_unet_stage
from gobelin.training.recipes.recipe import Recipe
from gobelin.training.stages import TextStage, VAEStage
from gobelin.training.trainer import fit
from gobelin.unet import UNet
from gobelin.unet_config import UNetConfig
from gobelin.vae import VAE, VAEConfig

STAGES = ("tokenizer", "text_encoder", "vae", "unet")
_INITIAL_TEXT_ENCODER = "training/text_encoder"  # from its own stage: the U-Net's stage starts here, resumed or not
_GRID_COLUMNS = 8  # images in the VAE's sample sheet
_LATENT_STATISTICS = 8192  # images for the latents' mean and variance: 2 million values a channel at 64×64
_EXAMPLES = 6  # prompts that a model says to begin with
_SIZE = 64  # pixels, where the configuration names none


class FromScratch(Recipe[TrainConfig]):
    """The recipe of a new model: each stage reads what the stages before it wrote."""

    sections: ClassVar[dict[str, str]] = {"text_encoder": "text", "vae": "vae", "unet": "unet"}

    def stages(self) -> dict[str, Callable[[], None]]:
        """Name the stages in order."""
        return dict(zip(STAGES, (self.tokenizer, self.text_encoder, self.vae, self.unet), strict=True))

    @property
    def image_size(self) -> int:
        """Height and width of a square image, in pixels."""
        return self.config.data.size or _SIZE

    def tokenizer(self) -> None:
        """Learn a byte-pair vocabulary from the captions."""
        config = self.config.tokenizer
        tokenizer = Tokenizer.train(self._captions(), config.vocab_size, config.max_length)
        self._save(tokenizer, "tokenizer")
        self.console.print(f"tokenizer: {len(tokenizer.vocab)} tokens")

    def text_encoder(self) -> None:
        """Train the text encoder, and the image encoder beside it."""
        config = self.config.text
        tokenizer = self._load("tokenizer", Tokenizer)
        text_encoder = TextEncoder(
            TextEncoderConfig.of(
                config.width,
                layers=config.layers,
                heads=config.heads,
                vocab_size=len(tokenizer.vocab),
                max_position_embeddings=tokenizer.max_length,
            )
        ).init_()
        image_encoder = ImageEncoder(
            ImageEncoderConfig(image_size=self.image_size, text_width=config.width, projection_dim=config.projection)
        )
        run = self.config
        stage = TextStage(self.dataset, tokenizer, text_encoder, image_encoder, config, run.seed, run.data.flip)
        trained = fit(stage, self.context)
        self._save(trained.text, "text_encoder")
        self._save(trained.text, _INITIAL_TEXT_ENCODER)
        self._save(trained.image, IMAGE_ENCODER)

    def vae(self) -> None:
        """Train the VAE, then normalise its latents channel by channel, folded into its weights."""
        config = _network_config(VAEConfig, self.config.vae.preset)
        vae = VAE(dataclasses.replace(config, sample_size=self.image_size, scaling_factor=1.0))
        stage = VAEStage(
            self.dataset, vae, self.config.vae, self.config.seed, _GRID_COLUMNS, flip=self.config.data.flip
        )
        trained = fit(stage, self.context).vae
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, "latents", 0))
        measured = torch.randperm(len(self.dataset), generator=generator)[:_LATENT_STATISTICS]
        trained.normalise_latents_(*self._latent_statistics(trained, measured))
        self._save(trained, "vae")

    def unet(self) -> None:
        """Train the U-Net on cached latents; the model folder is written at every sample sheet and at the end."""
        config = self.config.unet
        tokenizer = self._load("tokenizer", Tokenizer)
        text_encoder = self._load("text_encoder", TextEncoder, _INITIAL_TEXT_ENCODER).to(self.device)
        vae = self._load("vae", VAE).to(self.device)
        schedule = NoiseSchedule(
            ScheduleConfig.zero_terminal_snr()
            if config.zero_terminal_snr
            else ScheduleConfig(prediction_type=config.prediction, timestep_spacing="leading")
        )
        unet = UNet(
            dataclasses.replace(
                _network_config(UNetConfig, config.preset),
                sample_size=self.image_size // vae.config.factor,
                in_channels=vae.config.latent_channels,
                out_channels=vae.config.latent_channels,
                cross_attention_dim=text_encoder.config.hidden_size,
            )
        ).zero_init_()
        networks = Networks(
            unet=unet,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            schedule=schedule,
            is_text_trained=config.train_text_encoder,
        )

        def write(module: UNetLoss, step: int) -> Pipeline:
            """Write the model folder as it stands, so that it can be used while it trains."""
            pipeline = Pipeline(
                Model(
                    unet=module.unet,
                    vae=vae,
                    text_encoder=module.text_encoder or text_encoder,
                    tokenizer=tokenizer,
                    schedule=schedule,
                    recommended=self.config.recommended.settings(),
                    world=self.config.data.world if self.config.data.path is None else None,
                    examples=self._examples(),
                )
            )
            card = model_card(
                self.config, self.source.description, pipeline.unet, pipeline.vae, pipeline.text_encoder, step
            )
            write_text(self.out / "README.md", card)
            pipeline.save_pretrained(self.out)
            return pipeline

        stage = make_unet_stage(self, networks, config, write, half_size_steps=config.half_size_steps)
        trained = fit(stage, self.context)
        if distributed.is_main_process():
            write(trained, config.optim.steps)

    @torch.no_grad()
    def _latent_statistics(self, vae: VAE, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Measure the mean and standard deviation of each latent channel over these images."""
        largest = self.dataset.bucket_index[indices.numpy()]
        groups = [indices[torch.from_numpy(largest == bucket)] for bucket in sorted(set(largest.tolist()))]
        batches = [batch for group in groups for batch in group.split(64)]
        means = [vae.encode(self.dataset.images(batch.tolist()).to(vae.device)).mean for batch in batches]
        channels = torch.cat([mean.transpose(0, 1).flatten(1) for mean in means], dim=1).float()
        return channels.mean(dim=1), channels.std(dim=1)

    def _examples(self) -> tuple[str, ...]:
        """Choose prompts for others to begin with: those that were sampled, or captions from all over the data."""
        if self.config.data.path is None:
            return ()
        spread = np.linspace(0, len(self.dataset) - 1, _EXAMPLES).round().astype(int).tolist()
        captions = dict.fromkeys(self.dataset.captions(index)[0] for index in spread)
        return tuple(self.config.sample_prompts[:_EXAMPLES] or captions)

    def _captions(self) -> Iterator[str]:
        for index in range(len(self.dataset)):
            yield from self.dataset.captions(index)

    def _load(self, name: str, component: Any, folder: str | None = None) -> Any:
        """Read a component that an earlier stage wrote."""
        if name not in self.done:
            raise TrainingError(f"{self.out} has no {name} yet: train that stage first, or all of them")
        return component.from_pretrained(self.out / (folder or name))

    def _save(self, component: Any, name: str) -> None:
        """Write a component into the model folder, in the main process."""
        if distributed.is_main_process():
            component.save_pretrained(self.out / name)


def _network_config(config_class: Any, preset: str) -> Any:
    """Call a network configuration's preset: ``UNetConfig.nano()`` and its like."""
    return getattr(config_class, preset)()
