"""A recipe: the stages of a run in their order, over one dataset, in one folder.

Whatever the stages are, a recipe opens the data, claims the folder, holds its lock, skips what is done, and keeps what
was computed from the data in the run's cache.
"""

import dataclasses
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from rich.console import Console
from rich.progress import Progress

from gobelin.data import CachedDataset, Dataset, SceneDataset, find_world
from gobelin.data.batches import derive_seed
from gobelin.data.encoded import LatentCache, TextCache, weights_hash
from gobelin.data.subset import split_held_out
from gobelin.data.webdataset import open_images
from gobelin.errors import TrainingError
from gobelin.formats.files import write_json
from gobelin.pipeline import find_device
from gobelin.training import distributed
from gobelin.training.config import RunConfig
from gobelin.training.precision import Precision, autocast
from gobelin.training.recipes.claim import check_folder, claim, is_longer
from gobelin.training.run_folder import Run, locked
from gobelin.training.run_report import write_run_report
from gobelin.training.trackers import open_tracker
from gobelin.vae import VAE, Posterior

Config = TypeVar("Config", bound=RunConfig)
Encode = Callable[[list[str]], torch.Tensor]


class Recipe(ABC, Generic[Config]):
    """A run of a recipe; :meth:`stages` are its parts."""

    sections: ClassVar[dict[str, str]]
    """The section of the configuration that each stage with gradients has."""

    def __init__(self, config: Config, out: Path, resume: bool, console: Console):
        self.config, self.out, self.console = config, out, console
        self.folder = out / "training"
        self.device = find_device(config.device)
        self._resume = resume
        self.done: list[str] = []

    @abstractmethod
    def stages(self) -> dict[str, Callable[[], None]]:
        """Name the stages in order, and what trains each."""

    @property
    @abstractmethod
    def image_size(self) -> int:
        """Height and width of a square image, in pixels."""

    @property
    def cache(self) -> Path:
        """The folder of what was computed from the data: the run's own, or one that several runs share."""
        return self.folder / "cache" if self.config.data.cache is None else Path(self.config.data.cache)

    def run(self, only: str | None) -> Path:
        """Train all stages in order, or one; returns the folder."""
        main = distributed.is_main_process()
        is_new = not self.out.exists()
        if main:
            check_folder(self.out, self._resume)
        distributed.barrier()
        with locked(self.folder) if main else nullcontext():
            try:
                self._check_batches()
                source = self.source  # opened by every process, one after the other
                self.done = distributed.broadcast(self._claim(source) if main else [])
            except BaseException:
                if is_new and main:  # a run that is refused leaves nothing behind
                    shutil.rmtree(self.out, ignore_errors=True)
                raise
            try:
                self._train(self.stages(), only)
            finally:
                self.context.tracker.close()
                if main:
                    write_run_report(self.out)
        return self.out

    def _train(self, stages: dict[str, Callable[[], None]], only: str | None) -> None:
        for name in (only,) if only else stages:
            if name in self.done:
                self.console.print(f"{name}: done before, kept")
                continue
            torch.manual_seed(derive_seed(self.config.seed, name, 0))
            stages[name]()
            self.done.append(name)
            if distributed.is_main_process():
                write_json(self.folder / "done.json", {"stages": self.done})
                shutil.rmtree(self.folder / "checkpoints" / name, ignore_errors=True)
            distributed.barrier()
        if distributed.is_main_process() and self.config.data.cache is None and set(stages) <= set(self.done):
            shutil.rmtree(self.cache, ignore_errors=True)

    @cached_property
    def source(self) -> Dataset:
        """Open the data: folder or tars of images, or scenes; in every process, the main one first."""
        if not distributed.is_main_process():
            distributed.barrier()
        with Progress(console=self.console, disable=not self.console.is_terminal) as progress:
            task = progress.add_task("opening images", total=None)
            source = open_dataset(
                self.config,
                self.image_size,
                self.cache / "index",
                advance=lambda done, total: progress.update(task, completed=done, total=total),
            )
        if distributed.is_main_process():
            distributed.barrier()
        self.console.print(f"data: {source.description}", highlight=False)
        return source

    @cached_property
    def split(self) -> tuple[Dataset, Dataset | None]:
        """The images to train on, and those held out: of scenes, others."""
        source, count = self.source, self.config.data.validation
        if isinstance(source, SceneDataset):
            return source, dataclasses.replace(source, split="dev", count=count) if count else None
        return split_held_out(source, count)

    @cached_property
    def dataset(self) -> CachedDataset:
        """The images to train on, read once when the first stage needs them."""
        return self.cached(self.split[0], "reading images")

    @cached_property
    def context(self) -> Run:
        """The folder and settings that all stages share."""
        config = self.config
        tracker = config.tracker if distributed.is_main_process() else "none"
        return Run(
            folder=self.folder,
            seed=config.seed,
            device=self.device,
            save_every=config.save_every,
            sample_every=config.sample_every,
            console=self.console,
            parallelism=config.parallelism,
            tracker=open_tracker(tracker, self.out, dataclasses.asdict(config)),
        )

    def cached(self, dataset: Dataset, what: str) -> CachedDataset:
        """Read a dataset into the cache; the main process does, and the others wait for it."""
        if not distributed.is_main_process():
            distributed.barrier()
        with Progress(console=self.console, disable=not self.console.is_terminal) as progress:
            task = progress.add_task(what, total=len(dataset))
            cached = CachedDataset(
                dataset,
                self.cache,
                self.config.data.workers,
                advance=lambda done, total: progress.update(task, completed=done, total=total),
            )
        if distributed.is_main_process():
            distributed.barrier()
        return cached

    def latents(self, dataset: CachedDataset, vae: VAE, precision: Precision) -> LatentCache:
        """Encode a dataset's images, those that are not cached: every process takes its share."""
        cache = LatentCache(dataset, self.cache, weights_hash(vae), self.config.data.flip)

        @torch.no_grad()
        def encode(images: torch.Tensor) -> Posterior:
            with autocast(vae.device, precision):
                return vae.encode(images.to(vae.device))

        with Progress(console=self.console, disable=not self.console.is_terminal) as progress:
            task = progress.add_task("encoding images", total=len(dataset))
            cache.fill(
                encode, distributed.shard(), lambda done, total: progress.update(task, completed=done, total=total)
            )
        distributed.barrier()
        cache.refresh()
        return cache

    def texts(self, dataset: CachedDataset, encode: Encode, key: str) -> TextCache:
        """Encode a dataset's captions, those that are not cached: every process takes its share."""
        cache = TextCache(self.cache, key)
        with Progress(console=self.console, disable=not self.console.is_terminal) as progress:
            task = progress.add_task("encoding captions", total=None)
            cache.fill(
                dataset,
                encode,
                distributed.shard(),
                lambda done, total: progress.update(task, completed=done, total=total),
            )
        distributed.barrier()
        cache.refresh()
        return cache

    def _claim(self, source: Dataset) -> list[str]:
        data = {"description": source.description, "count": len(source), "fingerprint": source.fingerprint}

        def may_change(name: str, was: Any, now: Any) -> bool:
            return is_longer(name, was, now, self.sections, self.config, self.out)

        return claim(self.out, self.config, data, may_change)

    def _check_batches(self) -> None:
        """Raise :class:`TrainingError` for a batch that the processes cannot share evenly."""
        for stage, section in self.sections.items():
            optim, processes = getattr(self.config, section).optim, distributed.world_size()
            if stage != "text_encoder" and optim.batch_size % (processes * optim.accumulate):
                parts = f" in {optim.accumulate} parts each" if optim.accumulate > 1 else ""
                raise TrainingError(
                    f"a batch of {optim.batch_size} cannot be shared evenly among {processes} processes{parts}: change "
                    f"{section}.optim.batch_size, or their number"
                )


def open_dataset(
    config: RunConfig, size: int, index: Path | None, advance: Callable[[int, int], None] = lambda done, total: None
) -> Dataset:
    """Open the dataset of a configuration: a folder of images or of tars, or scenes; ``advance`` shows progress."""
    data = config.data
    if data.path is not None:
        return open_images(
            data.path,
            size,
            data.caption_column,
            advance=advance,
            index=index,
            buckets=data.buckets,
            fit=data.fit,
            background=data.background,
        )
    return SceneDataset(
        world=dataclasses.replace(find_world(data.world), size=size), count=data.count, seed=config.seed
    )
