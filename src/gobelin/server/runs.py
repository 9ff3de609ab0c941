"""Runs of jobs: a batch of paintings, an edit, or a look, step by step, with what is to be kept of them."""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image

from gobelin.attention import Trace
from gobelin.checkpoint import Model
from gobelin.errors import Cancelled
from gobelin.formats.png import encode_png
from gobelin.images import data_url
from gobelin.look.sharp_maps import sharp_trace
from gobelin.look.step_shares import StepCollector
from gobelin.painting import Painting, PaintingStep
from gobelin.pipeline import Pipeline
from gobelin.server.jobs import Job, JobStore, KeptImage, StepRecord
from gobelin.server.metrics import Metrics
from gobelin.server.works import EditWork, LookWork, PaintWork

_PREVIEW_REST = 4  # times as long as previews took to decode, until the next: they take a fifth of the time at most


@dataclass(frozen=True, kw_only=True)
class Runner:
    """The model with what a run tells: ``between_steps`` is called after each step."""

    pipeline: Pipeline
    store: JobStore
    metrics: Metrics
    between_steps: Callable[[], None]

    def run(self, batch: Sequence[Job]) -> None:
        """Run jobs that are painted together, or one of another kind; ends those that were not cancelled."""
        self.metrics.batches.observe(len(batch))
        work = batch[0].work
        if isinstance(work, EditWork):
            self._edit(batch[0], work)
        elif isinstance(work, LookWork):
            self._look(batch[0], work)
        else:
            PaintRun(runner=self, jobs=batch).run()

    def _edit(self, job: Job, work: EditWork) -> None:
        editing = work.start(self.pipeline)
        previews = Previews()
        for number, step in enumerate(editing, start=1):
            if number == 1:
                self.store.start(job, _started(len(editing), [work.options["seed"]], self._size(step)))
            changed = len(step.latents) - 1
            event = _step_event(number, len(editing), step.timestep, previews.of(job, step, [changed]))
            if not self.goes_on([job], [event]):
                return
        result = editing.result
        traced = result.heatmaps
        self.done(job, [keep(*one) for one in zip(result.images, result.settings, traced, strict=True)])

    def _look(self, job: Job, work: LookWork) -> None:
        self.store.start(job, {"steps": len(work.timesteps), "seeds": [work.seed], "width": None, "height": None})
        image = work.image.open()
        numbers = itertools.count(1)

        def advance(timestep: int) -> None:
            if not self.goes_on([job], [_step_event(next(numbers), len(work.timesteps), timestep, [])]):
                raise Cancelled("the look was cancelled: it has no result")

        (heatmaps,) = self.pipeline.look(image, work.caption, timesteps=work.timesteps, seed=work.seed, advance=advance)
        settings = {"caption": work.caption, "timesteps": list(work.timesteps), "seed": work.seed}
        self.done(job, [keep(heatmaps.image, {**settings, "model": self.pipeline.name}, heatmaps)])

    def goes_on(self, jobs: Sequence[Job], events: Sequence[dict[str, Any]]) -> bool:
        """Tell of a step, let others use the model, and say whether any job still waits for the next."""
        for job, event in zip(jobs, events, strict=True):
            self.store.step(job, event)
        self.between_steps()
        return any(not job.is_finished for job in jobs)

    def done(self, job: Job, images: list[KeptImage]) -> None:
        """Keep a job's images, unless it was cancelled meanwhile."""
        with self.store.changed:
            if not job.is_finished:
                job.images, job.step = images, job.steps
                self.metrics.images.inc(len(images))
                self.store.finish(job, "done")

    def _size(self, step: PaintingStep) -> tuple[int, int]:
        height, width = (side * self.pipeline.vae.config.factor for side in step.latents.shape[2:])
        return height, width


def all_steps_trace(model: Model, latent_size: tuple[int, int]) -> Trace:
    """Trace the sites of sharp maps at every step: for the mean late ones will do, for a step its own."""
    return replace(sharp_trace(model.unet.attention_sites, latent_size, model.head_weights), start=0.0)


def keep(
    image: Image.Image, settings: dict[str, Any], heatmaps: Any = None, record: StepRecord | None = None
) -> KeptImage:
    """Encode an image with its settings, to be kept with its heat maps and the record of its steps."""
    png = encode_png(image, settings if "prompt" in settings else None)
    return KeptImage(
        png=png, width=image.width, height=image.height, settings=settings, heatmaps=heatmaps, record=record
    )


class Previews:
    """Previews of a job's steps: decoded while somebody listens, and seldom enough not to slow the painting much."""

    def __init__(self) -> None:
        self._rest_until = 0.0

    def of(self, job: Job, step: PaintingStep, rows: Sequence[int]) -> list[str]:
        """Decode rows of a batch as ``data:`` URLs; none where nobody wants them now."""
        begun = time.monotonic()
        if not (job.wants_previews and job.listeners and rows) or begun < self._rest_until:
            return []
        previews = [data_url(step.preview(row)) for row in rows]
        ended = time.monotonic()
        self._rest_until = ended + _PREVIEW_REST * (ended - begun)
        return previews


def _started(steps: int, seeds: Sequence[int], size: tuple[int, int]) -> dict[str, Any]:
    return {"steps": steps, "seeds": list(seeds), "height": size[0], "width": size[1]}


def _step_event(number: int, steps: int, timestep: float, previews: list[str], first: int = 0) -> dict[str, Any]:
    """Describe a step; ``first`` is the number of the image that the first preview is of."""
    return {"step": number, "steps": steps, "timestep": timestep, "previews": previews, "first": first}


@dataclass(kw_only=True)
class PaintRun:
    """Painting of several jobs in one batch, or of one job's many images in several batches."""

    runner: Runner
    jobs: Sequence[Job]
    _works: dict[Job, PaintWork] = field(init=False)
    _previews: dict[Job, Previews] = field(init=False)
    _kept: dict[Job, list[KeptImage]] = field(init=False)
    _steps_done: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._works = {job: job.work for job in self.jobs if isinstance(job.work, PaintWork)}
        self._previews = {job: Previews() for job in self.jobs}
        self._kept = {job: [] for job in self.jobs}

    def run(self) -> None:
        """Paint all images, and end the jobs that were not cancelled."""
        rows = [(job, index) for job, work in self._works.items() for index in range(work.image_count)]
        at_once = self._works[self.jobs[0]].most_at_once
        batches = [rows[start : start + at_once] for start in range(0, len(rows), at_once)]
        for batch in batches:
            if not self._paint(batch, len(batches)):
                return
        for job, kept in self._kept.items():
            self.runner.done(job, kept)

    def _paint(self, rows: Sequence[tuple[Job, int]], batches: int) -> bool:
        """Paint one batch, and keep its images; False where nobody waits for them any more."""
        painting = self._start(rows)
        steps = batches * len(painting)
        if not self._steps_done:
            for job, work in self._works.items():
                self.runner.store.start(job, _started(steps, work.seeds, (work.height, work.width)))
        recorder = StepRecorder(self.runner.pipeline.model, painting) if self._works[self.jobs[0]].trace else None
        begun = time.monotonic()
        for step in painting:
            self._steps_done += 1
            if recorder is not None:
                recorder.add(step)
            events = [self._event(job, step, rows, steps) for job in self.jobs]
            self.runner.metrics.step_seconds.observe(time.monotonic() - begun)
            if not self.runner.goes_on(self.jobs, events):
                painting.cancel()
                return False
            begun = time.monotonic()
        result = painting.result
        for row, (job, _) in enumerate(rows):
            image, settings = result.images[row], result.settings[row]
            traced = {} if recorder is None else recorder.traced(row, image)
            self._kept[job].append(keep(image, settings, **traced))
        return True

    def _start(self, rows: Sequence[tuple[Job, int]]) -> Painting:
        """Start painting images of one job, with its controls, or of several that share all settings."""
        pipeline, first = self.runner.pipeline, self._works[self.jobs[0]]
        settings = replace(first.settings(), count=1, seed=[self._works[job].seeds[index] for job, index in rows])
        if first.trace:
            factor = pipeline.vae.config.factor
            trace = all_steps_trace(pipeline.model, (first.height // factor, first.width // factor))
            settings = replace(settings, trace=trace)
        return pipeline.start([self._works[job].prompt for job, _ in rows], **settings)

    def _event(self, job: Job, step: PaintingStep, rows: Sequence[tuple[Job, int]], steps: int) -> dict[str, Any]:
        own = [row for row, (other, _) in enumerate(rows) if other is job]
        first = rows[own[0]][1] if own else 0
        return _step_event(self._steps_done, steps, step.timestep, self._previews[job].of(job, step, own), first)


class StepRecorder:
    """Recorder of a painting's steps: sharp maps, words' shares, and the latents, for each of its images."""

    def __init__(self, model: Model, painting: Painting):
        plan = painting.plan
        trace = sharp_trace(model.unet.attention_sites, plan.latent_size, model.head_weights)
        start = min(
            trace.start, model.schedule.progress(plan.levels.timesteps[-1])
        )  # the last step is always among them
        words = [chunks.words.at_length(plan.length) for chunks in plan.texts]
        self._progress = model.schedule.progress
        self._maps = StepCollector(replace(trace, start=start), words, plan.latent_size)
        self._steps: list[PaintingStep] = []

    def add(self, step: PaintingStep) -> None:
        """Add a step."""
        self._maps.add(step.maps, self._progress(step.timestep))
        self._steps.append(replace(step, maps={}))

    def traced(self, row: int, image: Image.Image) -> dict[str, Any]:
        """Return the heat maps of one image of the batch, and the record of its steps."""
        record = StepRecord(
            timesteps=[step.timestep for step in self._steps],
            noisy_latents=torch.stack([step.noisy_latents[row] for step in self._steps]).cpu(),
            denoised=torch.stack([step.denoised[row] for step in self._steps]).cpu(),
            word_shares=self._maps.shares(row),
        )
        return {"heatmaps": self._maps.heatmaps(row, image), "record": record}
