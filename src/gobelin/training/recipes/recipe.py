"""A recipe: the stages of a run in their order, over one dataset, in one folder.

Whatever the stages are, a recipe opens the data, claims the folder, holds its lock, skips what is done, and keeps what
was computed from the data in the run's cache.
"""

import dataclasses
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress

from gobelin.data import CachedDataset, Dataset, SceneDataset, find_world
from gobelin.data.batches import derive_seed
from gobelin.data.encoded import LatentCache, TextCache, weights_hash
from gobelin.data.row_cache import content_hash
from gobelin.data.scene_groups import GroundingCache
from gobelin.data.subset import split_held_out
from gobelin.data.webdataset import open_images
from gobelin.errors import TrainingError
from gobelin.formats.files import write_json
from gobelin.pipeline import find_device
from gobelin.tokenizer import Tokenizer
from gobelin.training import distributed
from gobelin.training.checkpoints import is_disk_full, newest_step
from gobelin.training.config import Precision, RunConfig, config_file
from gobelin.training.precision import autocast, computes_in
from gobelin.training.recipes.claim import check_folder, claim, done_stages, is_longer
from gobelin.training.run_folder import Run, is_begun_by_this_launch, locked
from gobelin.training.run_report import write_run_report
from gobelin.training.stop_request import terminated_as_interrupted
from gobelin.training.trackers import open_tracker, require_tracker
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
        """Train all stages in order, or one; returns the folder.

        A run that ``torchrun`` starts again, after one of its processes failed, is resumed without being asked to be.
        SIGINT and SIGTERM raise KeyboardInterrupt, and a full disk :class:`TrainingError`; both are said with the
        command that goes on.
        """
        try:
            with terminated_as_interrupted():
                self._check_shares()  # before anything is written
                require_tracker(self.config.tracker)
                self._run(only)
        except KeyboardInterrupt:
            if distributed.is_main_process():
                self.console.print(f"stopped: {self._what_is_safe(only)}", highlight=False, soft_wrap=True)
            raise
        except Exception as error:
            if not is_disk_full(error):
                raise
            raise TrainingError(f"the disk is full ({error}): make room; {self._what_is_safe(only)}") from error
        return self.out

    def _run(self, only: str | None) -> None:
        main = distributed.is_main_process()
        is_new = not self.out.exists()
        if main:
            self._resume = self._resume or (config_file(self.out).exists() and is_begun_by_this_launch(self.folder))
            check_folder(self.out, self._resume)
        distributed.barrier()
        with locked(self.folder) if main else nullcontext():
            if main and not self._resume:
                check_folder(self.out, self._resume)  # again: another run may have come first
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
                self._close()
            except BaseException:
                with suppress(Exception):  # of two errors, the first is the one to tell
                    self._close()
                raise

    def _close(self) -> None:
        """End the tracker, and write the report of the run as far as it came."""
        self.context.tracker.close()
        if distributed.is_main_process():
            write_run_report(self.out)

    def _what_is_safe(self, only: str | None) -> str:
        """Say what of the run is on disk, and the command that goes on from there."""
        if not config_file(self.out).exists():
            return "nothing is trained yet, start again"
        command = ["train", "--out", str(self.out), "--resume", *(["--stage", only] if only else [])]
        done = done_stages(self.out)
        stage = next((name for name in ([only] if only else self.stages()) if name not in done), None)
        step = newest_step(self.folder / "checkpoints" / stage) if stage else 0
        safe = [*done, *([f"{stage} at step {step}"] if step else [])]
        return f"saved so far: {', '.join(safe) or 'nothing'}; go on with: {distributed.command(command)}"

    def _train(self, stages: dict[str, Callable[[], None]], only: str | None) -> None:
        for name in (only,) if only else stages:
            if name in self.done:
                self.console.print(f"{name}: done before, kept")
            else:
                torch.manual_seed(derive_seed(self.config.seed, name, 0))
                stages[name]()
                self.done.append(name)
                if distributed.is_main_process():
                    write_json(self.folder / "done.json", {"stages": self.done})
            if distributed.is_main_process():  # also of a stage whose run was killed right after it
                shutil.rmtree(self.folder / "checkpoints" / name, ignore_errors=True)
            distributed.barrier()
        if distributed.is_main_process() and self.config.data.cache is None and set(stages) <= set(self.done):
            shutil.rmtree(self.cache, ignore_errors=True)

    @cached_property
    def source(self) -> Dataset:
        """Open the data: folder or tars of images, or scenes."""
        source = self._open(self.config, "opening images")
        self.console.print(f"data: {source.description}", highlight=False)
        return source

    def _open(self, config: Config, what: str) -> Dataset:
        """Open the data of a configuration, this run's or one like it; in every process, the main one first."""
        if not distributed.is_main_process():
            distributed.wait_for_main()
        with Progress(console=self.console, disable=not self.console.is_terminal) as progress:
            task = progress.add_task(what, total=None)
            source = open_dataset(
                config,
                self.image_size,
                self._index(config.data.path),
                advance=lambda done, total: progress.update(task, completed=done, total=total),
            )
        if distributed.is_main_process():
            distributed.wait_for_main()
        return source

    def _index(self, path: str | None) -> Path:
        """Name the folder of the index of one's own images: each data set's own, as a cache may be shared."""
        return self.cache / f"index-{content_hash(str(Path(path).resolve()) if path else '').hex()}"

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
            distributed.wait_for_main()
        with Progress(console=self.console, disable=not self.console.is_terminal) as progress:
            task = progress.add_task(what, total=len(dataset))
            cached = CachedDataset(
                dataset,
                self.cache,
                self.config.data.workers,
                advance=lambda done, total: progress.update(task, completed=done, total=total),
            )
        if distributed.is_main_process():
            distributed.wait_for_main()
        return cached

    def latents(
        self, dataset: CachedDataset, vae: VAE, precision: Precision, is_half_size: bool = False
    ) -> LatentCache:
        """Encode a dataset's images, those that are not cached: every process takes its share.

        If ``is_half_size``, they are made half as high and wide before, each pixel the mean of four.
        """
        key = f"{weights_hash(vae)} in {computes_in(vae.device, precision)}{' at half size' * is_half_size}"
        cache = LatentCache(dataset, self.cache, key, self.config.data.flip)

        @torch.no_grad()
        def encode(images: torch.Tensor) -> Posterior:
            images = F.avg_pool2d(images, 2) if is_half_size else images
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

    def grounding(self, dataset: CachedDataset, tokenizer: Tokenizer, side: int) -> GroundingCache | None:
        """Compute the masks and tokens of a dataset of scenes, those that are not cached: every process its share.

        Images of a folder have no masks: None, with a sentence.
        """
        if not isinstance(dataset.dataset, SceneDataset):
            self.console.print("attention is not grounded: images of a folder have no masks of what words speak of")
            return None
        cache = GroundingCache(dataset.dataset, tokenizer, side, self.cache)
        with Progress(console=self.console, disable=not self.console.is_terminal) as progress:
            task = progress.add_task("drawing masks", total=len(dataset))
            cache.fill(distributed.shard(), lambda done, total: progress.update(task, completed=done, total=total))
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
        def may_change(name: str, was: Any, now: Any) -> bool:
            return is_longer(name, was, now, self.sections, self.config, self.out)

        return claim(self.out, self.config, self._identify(source), may_change)

    def _identify(self, source: Dataset) -> dict[str, Any]:
        """Describe all that is trained on, by which a resumed run knows it again."""
        return {"description": source.description, "count": len(source), "fingerprint": source.fingerprint}

    def _check_batches(self) -> None:
        """Raise for a configuration that the data or the model cannot be trained with; a recipe may know some."""

    def _check_shares(self) -> None:
        """Raise :class:`TrainingError` for a batch that the processes cannot share evenly."""
        for stage, section in self.sections.items():
            optim, processes = getattr(self.config, section).optim, distributed.world_size()
            accumulate = 1 if stage == "text_encoder" else optim.accumulate
            if optim.batch_size % (processes * accumulate):
                parts = f" in {accumulate} parts each" if accumulate > 1 else ""
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
