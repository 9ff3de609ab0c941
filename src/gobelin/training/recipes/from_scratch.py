"""A whole training run: tokenizer, text encoder, VAE, U-Net, one after the other, into one model folder.

The folder is a diffusers folder when the run ends; its ``training`` subfolder keeps the configuration, the
metrics, the sample grids and, until the end, the checkpoints.
"""

import dataclasses
import json
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import Progress

from gobelin.clip import ImageEncoder, ImageEncoderConfig, TextEncoder, TextEncoderConfig
from gobelin.data import Corpus, FolderPairs, Pairs, ScenePairs, find_world
from gobelin.errors import TrainingError
from gobelin.formats.files import read_json, write_json, write_text
from gobelin.pipeline import Pipeline, find_device
from gobelin.schedule import NoiseSchedule, ScheduleConfig
from gobelin.tokenizer import Tokenizer
from gobelin.training import distributed
from gobelin.training.config import TrainConfig
from gobelin.training.model_card import model_card
from gobelin.training.stages import Painter, TextStage, UNetStage, VAEStage, encode_images, encode_texts, grid
from gobelin.training.trainer import Run, fit, mix
from gobelin.unet import UNet, UNetConfig
from gobelin.vae import VAE, VAEConfig

StageName = Literal["tokenizer", "text_encoder", "vae", "unet"]
STAGES: tuple[StageName, ...] = ("tokenizer", "text_encoder", "vae", "unet")
IMAGE_ENCODER = "image_encoder"
TEXT_ENCODER_BEFORE = "training/text_encoder"  # as its own stage left it, where the U-Net's begins
SHOWN = 8  # pictures in a sample grid's row
MEASURED = 8192  # images from which the latents' mean and variance are taken


def train(
    config: TrainConfig,
    out: str | Path,
    *,
    resume: bool = False,
    stage: StageName | None = None,
    console: Console | None = None,
) -> Path:
    """Train all stages, or one, into the folder ``out``; returns it.

    Stages whose result is in the folder already are kept. Raises :class:`TrainingError` where the folder holds a
    run and ``resume`` is off, or holds one with another configuration, or lacks what ``stage`` builds on.

    Under ``torchrun`` the processes share the U-Net's batches; what the other stages do, each does alike.
    """
    with distributed.joined(find_device(config.device)):
        console = (console or Console(stderr=True)) if distributed.is_first() else Console(quiet=True)
        return _Training(config, Path(out), resume, console).run(stage)


class _Training:
    def __init__(self, config: TrainConfig, out: Path, resume: bool, console: Console):
        self.config = config
        self.out = out
        self.console = console
        self.folder = out / "training"
        self.pairs = open_pairs(config)
        console.print(f"data: {self.pairs.description}", highlight=False)
        if config.unet.optim.batch_size % distributed.count():
            raise TrainingError(
                f"a batch of {config.unet.optim.batch_size} cannot be shared evenly among {distributed.count()} "
                "processes: change unet.optim.batch_size, or their number"
            )
        self.done = distributed.told(self._claim(resume) if distributed.is_first() else [])
        self.context = Run(
            folder=self.folder,
            seed=config.seed,
            device=find_device(config.device),
            save_every=config.save_every,
            picture_every=config.picture_every,
            console=console,
        )

    def run(self, only: StageName | None) -> Path:
        actions = {
            "tokenizer": self.tokenizer,
            "text_encoder": self.text_encoder,
            "vae": self.vae,
            "unet": self.unet,
        }
        for name in (only,) if only else STAGES:
            if name in self.done:
                self.console.print(f"{name}: done before, kept")
                continue
            torch.manual_seed(mix(self.config.seed, name, 0))
            actions[name]()
            self.done.append(name)
            if distributed.is_first():
                write_json(self.folder / "done.json", {"stages": self.done})
                shutil.rmtree(self.folder / "checkpoints" / name, ignore_errors=True)
            distributed.told(name)
        return self.out

    def tokenizer(self) -> None:
        config = self.config.tokenizer
        tokenizer = Tokenizer.train(self.corpus.captions, config.vocab_size, config.max_length)
        self._save(tokenizer, "tokenizer")
        self.console.print(f"tokenizer: {len(tokenizer.vocab)} tokens")

    def text_encoder(self) -> None:
        config = self.config.text
        tokenizer = self._built("tokenizer", Tokenizer)
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
            ImageEncoderConfig(image_size=self.pairs.size, text_width=config.width, projection_dim=config.projection)
        )
        stage = TextStage(self.corpus, tokenizer, text_encoder, image_encoder, config)
        trained = fit(stage, self.context)
        self._save(trained.text, "text_encoder")
        self._save(trained.text, TEXT_ENCODER_BEFORE)
        self._save(trained.image, IMAGE_ENCODER)

    def vae(self) -> None:
        config = preset(VAEConfig, self.config.vae.preset)
        vae = VAE(dataclasses.replace(config, sample_size=self.pairs.size, scaling_factor=1.0))
        stage = VAEStage(self.corpus, vae, self.config.vae, torch.arange(min(SHOWN, len(self.pairs))))
        trained = fit(stage, self.context)
        generator = torch.Generator().manual_seed(mix(self.config.seed, "latents", 0))
        measured = torch.randperm(len(self.pairs), generator=generator)[:MEASURED]
        means, _ = encode_images(trained, self.corpus, measured)
        trained.normalise_latents_(means.mean(dim=(0, 2, 3)), means.std(dim=(0, 2, 3)))
        self._save(trained, "vae")

    def unet(self) -> None:
        config = self.config.unet
        tokenizer = self._built("tokenizer", Tokenizer)
        text_encoder = self._built("text_encoder", TextEncoder, TEXT_ENCODER_BEFORE).to(self.context.device)
        vae = self._built("vae", VAE).to(self.context.device)
        schedule = NoiseSchedule(
            ScheduleConfig.zero_terminal_snr()
            if config.zero_terminal_snr
            else ScheduleConfig(prediction_type=config.prediction, timestep_spacing="leading")
        )
        unet = UNet(
            dataclasses.replace(
                preset(UNetConfig, config.preset),
                sample_size=self.pairs.size // vae.config.factor,
                in_channels=vae.config.latent_channels,
                out_channels=vae.config.latent_channels,
                cross_attention_dim=text_encoder.config.hidden_size,
            )
        ).zero_init_()
        unet.gradient_checkpointing = config.gradient_checkpointing
        captions, caption = self.corpus.distinct_captions()
        mine = torch.arange(len(self.corpus))[distributed.part()]
        latents, spread = (
            distributed.gathered(part, len(self.corpus))
            for part in encode_images(vae, self.corpus, mine, config.optim.precision)
        )

        def pipeline(painter: Painter) -> Pipeline:
            return Pipeline(
                unet=painter.unet,
                vae=vae,
                text_encoder=painter.text_encoder or text_encoder,
                tokenizer=tokenizer,
                schedule=schedule,
                recommended=self.config.recommended,
                world=self.config.data.world if self.config.data.path is None else None,
            )

        def write(painter: Painter, step: int) -> Pipeline:
            """The model as it stands, so that it can be used while it trains."""
            made = pipeline(painter)
            card = model_card(self.config, self.pairs.description, made.unet, made.vae, made.text_encoder, step)
            write_text(self.out / "README.md", card)
            made.save_pretrained(self.out)
            return made

        texts = [*captions, ""]
        joint = config.train_text_encoder
        stage = UNetStage(
            Painter(unet, text_encoder if joint else None),
            schedule,
            latents * vae.config.scaling_factor,
            spread * vae.config.scaling_factor,
            tokenizer(texts) if joint else encode_texts(text_encoder, tokenizer, texts),
            caption,
            config,
            picture=lambda painter, step: grid(write(painter, step)(captions[: 3 * SHOWN], seed=0).images, SHOWN),
        )
        trained = fit(stage, self.context)
        if distributed.is_first():
            write(trained, config.optim.steps)

    @cached_property
    def corpus(self) -> Corpus:
        with Progress(console=self.console, disable=not self.console.is_terminal) as progress:
            task = progress.add_task("reading", total=len(self.pairs))
            return Corpus(self.pairs, advance=lambda: progress.advance(task))

    def _built(self, name: StageName, component: Any, folder: str | None = None) -> Any:
        if name not in self.done:
            raise TrainingError(f"{self.out} has no {name} yet: train that stage first, or all of them")
        return component.from_pretrained(self.out / (folder or name))

    def _save(self, component: Any, name: str) -> None:
        if distributed.is_first():
            component.save_pretrained(self.out / name)

    def _claim(self, resume: bool) -> list[StageName]:
        """Make the folder this run's own, or find that it already is; returns the stages it has done."""
        recorded, data = config_file(self.out), self.folder / "data.json"
        config = json.loads(json.dumps(dataclasses.asdict(self.config)))
        if not recorded.exists():
            if self.out.exists() and any(self.out.iterdir()):
                raise TrainingError(f"{self.out} is not empty and holds no training run: choose another folder")
            if resume:
                raise TrainingError(f"{self.out} holds no training run to resume: leave out --resume to start one")
            write_json(data, {"description": self.pairs.description})
            write_json(recorded, config)
            return []
        if not resume:
            raise TrainingError(f"{self.out} holds a training run: add --resume to go on, or choose another folder")
        if difference := first_difference(read_json(recorded), config):
            raise TrainingError(f"the run in {self.out} has another configuration: {difference}")
        if (was := read_json(data)["description"]) != self.pairs.description:
            raise TrainingError(
                f"the run in {self.out} began with other data: {was}; now it is {self.pairs.description}"
            )
        done = self.folder / "done.json"
        return read_json(done)["stages"] if done.exists() else []


def config_file(out: Path) -> Path:
    """Where a run keeps its configuration."""
    return out / "training" / "config.json"


def open_pairs(config: TrainConfig) -> Pairs:
    """The pairs that a configuration names: a folder's, or scenes."""
    data = config.data
    if data.path is not None:
        return FolderPairs(data.path, data.size)
    world = dataclasses.replace(find_world(data.world), size=data.size)
    return ScenePairs(world=world, count=data.count, seed=config.seed)


def preset(config_class: Any, name: str) -> Any:
    """The network configuration of that name: ``UNetConfig.nano()`` and its like."""
    return getattr(config_class, name)()


def first_difference(old: Any, new: Any, name: str = "") -> str:
    """Where two configurations differ first, in words; empty where they do not."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            if found := first_difference(old.get(key), new.get(key), f"{name}.{key}".lstrip(".")):
                return found
        return ""
    return "" if old == new else f"{name} was {old!r} and is now {new!r}"
