"""Train a model from scratch: tokenizer, text encoder, VAE, U-Net, one after the other, into one model folder.

The result is a diffusers folder; its ``training`` subfolder keeps the configuration, the metrics, the sample grids and,
until a stage is done, its checkpoints.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from gobelin.checkpoint import Model
from gobelin.clip import ImageEncoder, ImageEncoderConfig, TextEncoder, TextEncoderConfig
from gobelin.data import CachedDataset, Dataset, ImageFolderDataset, SceneDataset, find_world
from gobelin.errors import TrainingError, UsageError
from gobelin.formats.files import read_json, write_json, write_text
from gobelin.pipeline import Pipeline, find_device
from gobelin.schedule import NoiseSchedule, ScheduleConfig
from gobelin.tokenizer import Tokenizer
from gobelin.training import distributed
from gobelin.training.checkpoints import newest_step
from gobelin.training.config import TrainConfig
from gobelin.training.model_card import model_card
from gobelin.training.stages import (
    TextStage,
    TrainedModules,
    UNetStage,
    VAEStage,
    encode_images,
    encode_texts,
    image_grid,
)
from gobelin.training.trainer import Run, derive_seed, fit
from gobelin.unet import UNet, UNetConfig
from gobelin.vae import VAE, VAEConfig

StageName = Literal["tokenizer", "text_encoder", "vae", "unet"]
STAGES: tuple[StageName, ...] = get_args(StageName)
IMAGE_ENCODER = "image_encoder"
_INITIAL_TEXT_ENCODER = "training/text_encoder"  # from its own stage: the U-Net's stage starts here, resumed or not
# Fields that change no weight: when something is written, where the same data and the device are, what is recommended.
_HARMLESS = ("save_every", "sample_every", "device", "data.path", "recommended.")
_GRID_COLUMNS = 8  # images in a row of the sample grid
_LATENT_STATISTICS = 8192  # images for the latents' mean and variance: 2 million values a channel at 64×64


def train(
    config: TrainConfig,
    out: str | Path,
    *,
    resume: bool = False,
    stage: str | None = None,
    console: Console | None = None,
) -> Path:
    """Train a model from scratch into the folder ``out``, which diffusers opens too; returns the folder.

    ::

        import gobelin

        config = gobelin.training.find_preset("nano")  # about 13 minutes on two CPU cores
        folder = gobelin.train(config, "runs/mine")
        gobelin.Pipeline.from_pretrained(folder)("a red circle").save("out")

    ``resume`` continues the run in ``out``, with the same configuration and data; finished stages are kept. What
    changes no weight may be other: ``save_every``, ``sample_every``, the device, the place of the data, what is
    recommended; and a stage may be longer while its learning rate holds. ``stage`` trains one stage alone: tokenizer,
    text_encoder, vae or unet. ``console`` shows progress; by default that is standard error if it is a terminal, and
    nothing is printed otherwise (``out/training/metrics.jsonl`` has the losses). SIGINT (Ctrl-C) and SIGTERM save a
    checkpoint and raise KeyboardInterrupt. Torch's global random generator is seeded.

    Under ``torchrun`` the processes share the U-Net's batches; the other stages are computed alike in each.

    Raises, before anything is written:

    - :class:`UsageError` for an unknown stage, world or device, or a ``config`` that is no :class:`TrainConfig`;
    - :class:`DataError` for a data folder that is missing or has too few usable images;
    - :class:`TrainingError` if ``out`` holds a run and ``resume`` is off, holds files but no run, or a run with another
      configuration or other data; if there is nothing to resume; or if the processes cannot share a batch evenly.

    Raises, later, :class:`TrainingError` if a stage that ``stage`` builds on is missing, if the loss is not finite, or
    if a checkpoint cannot be written or read.
    """
    if not isinstance(config, TrainConfig):
        raise UsageError(f"config is {config!r}: give a TrainConfig, such as gobelin.training.find_preset('nano')")
    if stage is not None and stage not in STAGES:
        raise UsageError(f"unknown stage {stage!r}: the choices are {', '.join(STAGES)}")
    with distributed.init_process_group(find_device(config.device)):
        if not distributed.is_main_process():
            console = Console(quiet=True)
        elif console is None:
            console = Console(stderr=True)
            console.quiet = not console.is_terminal
        return _FromScratch(config, Path(out), resume, console).run(cast(StageName | None, stage))


class _FromScratch:
    """A run of the recipe: one method a stage, each reads what the stages before it wrote."""

    def __init__(self, config: TrainConfig, out: Path, resume: bool, console: Console):
        self.config = config
        self.out = out
        self.console = console
        self.folder = out / "training"
        with Progress(console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task("opening images")
            self.source = open_dataset(
                config, advance=lambda done, total: progress.update(task, completed=done, total=total)
            )
        console.print(f"data: {self.source.description}", highlight=False)
        if config.unet.optim.batch_size % distributed.world_size():
            raise TrainingError(
                f"a batch of {config.unet.optim.batch_size} cannot be shared evenly among {distributed.world_size()} "
                "processes: change unet.optim.batch_size, or their number"
            )
        self.done = distributed.broadcast(self._claim(resume) if distributed.is_main_process() else [])
        self.context = Run(
            folder=self.folder,
            seed=config.seed,
            device=find_device(config.device),
            save_every=config.save_every,
            sample_every=config.sample_every,
            console=console,
        )

    def run(self, only: StageName | None) -> Path:
        """Train all stages in order, or one; returns the model folder."""
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
            torch.manual_seed(derive_seed(self.config.seed, name, 0))
            actions[name]()
            self.done.append(name)
            if distributed.is_main_process():
                write_json(self.folder / "done.json", {"stages": self.done})
                shutil.rmtree(self.folder / "checkpoints" / name, ignore_errors=True)
            distributed.broadcast(name)
        return self.out

    def tokenizer(self) -> None:
        """Learn a byte-pair vocabulary from the captions."""
        config = self.config.tokenizer
        captions = chain.from_iterable(self.dataset.captions)
        tokenizer = Tokenizer.train(captions, config.vocab_size, config.max_length)
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
            ImageEncoderConfig(image_size=self.source.size, text_width=config.width, projection_dim=config.projection)
        )
        stage = TextStage(self.dataset, tokenizer, text_encoder, image_encoder, config)
        trained = fit(stage, self.context)
        self._save(trained.text, "text_encoder")
        self._save(trained.text, _INITIAL_TEXT_ENCODER)
        self._save(trained.image, IMAGE_ENCODER)

    def vae(self) -> None:
        """Train the VAE, then normalise its latents channel by channel, folded into its weights."""
        config = _network_config(VAEConfig, self.config.vae.preset)
        vae = VAE(dataclasses.replace(config, sample_size=self.source.size, scaling_factor=1.0))
        stage = VAEStage(self.dataset, vae, self.config.vae, torch.arange(min(_GRID_COLUMNS, len(self.source))))
        trained = fit(stage, self.context)
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, "latents", 0))
        measured = torch.randperm(len(self.source), generator=generator)[:_LATENT_STATISTICS]
        means, _ = encode_images(trained, self.dataset, measured)
        trained.normalise_latents_(means.mean(dim=(0, 2, 3)), means.std(dim=(0, 2, 3)))
        self._save(trained, "vae")

    def unet(self) -> None:
        """Train the U-Net on cached latents; the model folder is written at every sample grid and at the end."""
        config = self.config.unet
        tokenizer = self._load("tokenizer", Tokenizer)
        text_encoder = self._load("text_encoder", TextEncoder, _INITIAL_TEXT_ENCODER).to(self.context.device)
        vae = self._load("vae", VAE).to(self.context.device)
        schedule = NoiseSchedule(
            ScheduleConfig.zero_terminal_snr()
            if config.zero_terminal_snr
            else ScheduleConfig(prediction_type=config.prediction, timestep_spacing="leading")
        )
        unet = UNet(
            dataclasses.replace(
                _network_config(UNetConfig, config.preset),
                sample_size=self.source.size // vae.config.factor,
                in_channels=vae.config.latent_channels,
                out_channels=vae.config.latent_channels,
                cross_attention_dim=text_encoder.config.hidden_size,
            )
        ).zero_init_()
        unet.gradient_checkpointing = config.gradient_checkpointing
        captions, caption_index = self.dataset.unique_captions()
        rows = torch.arange(len(self.dataset))[distributed.shard()]
        latents, stds = (
            distributed.all_gather_rows(part, len(self.dataset))
            for part in encode_images(vae, self.dataset, rows, config.optim.precision)
        )

        def write(modules: TrainedModules, step: int) -> Pipeline:
            """Write the model folder as it stands, so that it can be used while it trains."""
            pipeline = Pipeline(
                Model(
                    unet=modules.unet,
                    vae=vae,
                    text_encoder=modules.text_encoder or text_encoder,
                    tokenizer=tokenizer,
                    schedule=schedule,
                    recommended=self.config.recommended.settings(),
                    world=self.config.data.world if self.config.data.path is None else None,
                )
            )
            card = model_card(
                self.config, self.source.description, pipeline.unet, pipeline.vae, pipeline.text_encoder, step
            )
            write_text(self.out / "README.md", card)
            pipeline.save_pretrained(self.out)
            return pipeline

        def sample(modules: TrainedModules, step: int) -> Image.Image:
            return image_grid(write(modules, step)(captions[: 3 * _GRID_COLUMNS], seed=0).images, _GRID_COLUMNS)

        texts = [*captions, ""]
        joint = config.train_text_encoder
        stage = UNetStage(
            TrainedModules(unet, text_encoder if joint else None),
            schedule,
            latents * vae.config.scaling_factor,
            stds * vae.config.scaling_factor,
            tokenizer(texts) if joint else encode_texts(text_encoder, tokenizer, texts),
            caption_index,
            config,
            sample,
        )
        trained = fit(stage, self.context)
        if distributed.is_main_process():
            write(trained, config.optim.steps)

    @cached_property
    def dataset(self) -> CachedDataset:
        """Read the data once, when the first stage needs it."""
        with Progress(console=self.console, disable=not self.console.is_terminal) as progress:
            task = progress.add_task("reading data", total=len(self.source))
            return CachedDataset(self.source, advance=lambda: progress.advance(task))

    def _load(self, name: StageName, component: Any, folder: str | None = None) -> Any:
        """Read a component that an earlier stage wrote."""
        if name not in self.done:
            raise TrainingError(f"{self.out} has no {name} yet: train that stage first, or all of them")
        return component.from_pretrained(self.out / (folder or name))

    def _save(self, component: Any, name: str) -> None:
        """Write a component into the model folder, in the main process."""
        if distributed.is_main_process():
            component.save_pretrained(self.out / name)

    def _claim(self, resume: bool) -> list[StageName]:
        """Record the configuration in the folder, or compare it with the recorded one; returns the finished stages."""
        recorded, data = config_file(self.out), self.folder / "data.json"
        config = json.loads(json.dumps(dataclasses.asdict(self.config)))
        if not recorded.exists():
            if self.out.exists() and not self.out.is_dir():
                raise TrainingError(f"{self.out} is a file: choose a folder to write the model to")
            if self.out.exists() and any(self.out.iterdir()):
                raise TrainingError(f"{self.out} is not empty and holds no training run: choose another folder")
            if resume:
                raise TrainingError(
                    f"{self.out} holds no training run to resume: leave out --resume (resume=True) to start one"
                )
            write_json(data, self._data())
            write_json(recorded, config)
            return []
        if not resume:
            raise TrainingError(
                f"{self.out} holds a training run: add --resume (resume=True) to go on, or choose another folder"
            )
        done = read_json(self.folder / "done.json")["stages"] if (self.folder / "done.json").exists() else []
        for name, was, now in differences(read_json(recorded), config):
            if not name.startswith(_HARMLESS) and not self._is_longer(name, was, now, done):
                raise TrainingError(
                    f"the run in {self.out} has another configuration: {name} was {was!r} and is {now!r}"
                )
        before, today = read_json(data), self._data()
        if before["fingerprint"] != today["fingerprint"]:
            raise TrainingError(
                f"the run in {self.out} began with other data: {before['description']}; now it is "
                f"{today['description']}"
                + (", with other captions or images" if before["count"] == today["count"] else "")
            )
        write_json(recorded, config)
        return done

    def _data(self) -> dict[str, Any]:
        """Describe the data, so that a run does not go on with other."""
        source = self.source
        return {"description": source.description, "count": len(source), "fingerprint": source.fingerprint}

    def _is_longer(self, name: str, was: Any, now: Any, done: list[StageName]) -> bool:
        """Tell whether a change makes a stage longer while its learning rate holds: its steps so far are the same."""
        section, _, field = name.partition(".")
        if field != "optim.steps" or not now > was:
            return False
        stage: StageName = "text_encoder" if section == "text" else cast(StageName, section)
        optim = getattr(self.config, section).optim
        saved = newest_step(self.folder / "checkpoints" / stage)
        falls = min(max(optim.warmup_steps, round(optim.hold * steps)) for steps in (was, now))
        if stage in done or saved > falls:
            raise TrainingError(
                f"{name} was {was} and is {now}: a stage can be made longer until its learning rate falls, at step "
                f"{falls}, and {'it is done' if stage in done else f'it is saved at step {saved}'}"
            )
        return True


def config_file(out: Path) -> Path:
    """Name the file that records a run's configuration."""
    return out / "training" / "config.json"


def open_dataset(config: TrainConfig, advance: Callable[[int, int], None] = lambda done, total: None) -> Dataset:
    """Open the dataset of a configuration: a folder of images, or scenes; ``advance`` is called after each image."""
    data = config.data
    if data.path is not None:
        return ImageFolderDataset(data.path, data.size, data.caption_column, advance)
    world = dataclasses.replace(find_world(data.world), size=data.size)
    return SceneDataset(world=world, count=data.count, seed=config.seed)


def differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """List the fields in which two configurations differ: (dotted name, old value, new value)."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
    elif old != new:
        yield name, old, new


def _network_config(config_class: Any, preset: str) -> Any:
    """Call a network configuration's preset: ``UNetConfig.nano()`` and its like."""
    return getattr(config_class, preset)()
