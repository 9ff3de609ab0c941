"""Jobs: what was asked for, how far it is, what came of it; a bounded queue, and a bounded number of finished ones."""

import math
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from gobelin.errors import GobelinError
from gobelin.look.heatmaps import HeatMaps
from gobelin.server.limits import ServerLimits

JobKind = Literal["paint", "edit", "look"]
JobState = Literal["queued", "running", "done", "failed", "cancelled"]
ErrorType = Literal["usage", "busy", "not_found", "cancelled", "failed"]
_FINISHED = ("done", "failed", "cancelled")
_RECENT = 20  # jobs, whose mean time says when to come back


class BusyError(GobelinError):
    """A queue that is full; ``retry_after`` are the seconds after which there may be room."""

    def __init__(self, sentence: str, retry_after: int):
        super().__init__(sentence)
        self.retry_after = retry_after


class NotFoundError(GobelinError):
    """A job, an image or a file that there is not."""


@runtime_checkable
class Work(Protocol):
    """The work of a job: what is to be run, and how much of the waiting requests' memory it takes."""

    @property
    def kind(self) -> JobKind: ...

    @property
    def size(self) -> int: ...

    @property
    def batch_key(self) -> Hashable | None: ...

    @property
    def image_count(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """The steps of one image: the latents that the U-Net saw, the clean ones that it aimed at, and words' shares.

    ``noisy_latents`` and ``denoised`` are [steps, C, h, w], ``word_shares`` [steps, words, rows, columns].
    """

    timesteps: Sequence[float]
    noisy_latents: Tensor
    denoised: Tensor
    word_shares: Tensor


@dataclass(frozen=True, kw_only=True)
class KeptImage:
    """An image of a job: its PNG with its settings, and what was traced of it."""

    png: bytes = field(repr=False)
    width: int
    height: int
    settings: dict[str, Any]
    heatmaps: HeatMaps | None = None
    record: StepRecord | None = None

    @property
    def size(self) -> int:
        """Bytes that it takes."""
        tensors: list[Tensor] = []
        pixels = 0
        if self.heatmaps is not None:
            tensors += self.heatmaps.maps.values()
            pixels = 3 * self.width * self.height
        if self.record is not None:
            tensors += [self.record.noisy_latents, self.record.denoised, self.record.word_shares]
        return len(self.png) + pixels + sum(one.numel() * one.element_size() for one in tensors)


@dataclass(eq=False, kw_only=True)
class Job:
    """A job. Only the worker's thread and its store change it, under the store's lock."""

    id: str
    work: Work
    caller: str = "jobs"
    wants_previews: bool = False
    state: JobState = "queued"
    position: int | None = None
    step: int = 0
    steps: int = 0
    seconds: float | None = None
    error: dict[str, Any] | None = None
    images: list[KeptImage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    started: dict[str, Any] | None = None
    last_step: dict[str, Any] | None = None
    begun: float = 0.0
    listeners: set[Callable[[], None]] = field(default_factory=set, repr=False)

    @property
    def is_finished(self) -> bool:
        """Tell whether nothing more will come of it."""
        return self.state in _FINISHED

    @property
    def size(self) -> int:
        """Bytes that it takes."""
        return self.work.size + sum(image.size for image in self.images)

    def tell(self) -> None:
        """Wake up those who listen."""
        for wake in tuple(self.listeners):
            wake()


class JobStore:
    """Every job by its id: those that wait, in their order, the running ones, and the last of the finished."""

    def __init__(self, limits: ServerLimits, on_finish: Callable[[Job], None] = lambda job: None):
        self.limits = limits
        self.changed = threading.Condition(threading.RLock())
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._waiting: list[Job] = []
        self._finished: OrderedDict[str, int] = OrderedDict()
        self._seconds: deque[float] = deque(maxlen=_RECENT)
        self._on_finish = on_finish
        self._is_closed = False

    def submit(self, work: Work, caller: str = "jobs", previews: bool = False, notes: Sequence[str] = ()) -> Job:
        """Put a job at the end of the queue; raises :class:`BusyError` where that is full."""
        with self.changed:
            self.refuse_when_full(work.size)
            job = Job(id=secrets.token_hex(12), work=work, caller=caller, wants_previews=previews, notes=list(notes))
            self._jobs[job.id] = job
            self._waiting.append(job)
            self._number()
            self.changed.notify_all()
            return job

    def refuse_when_full(self, size: int = 0) -> None:
        """Raise :class:`BusyError` where no job, of so many bytes, can wait now."""
        with self.changed:
            if self._is_closed:
                raise BusyError("the server is stopping: come back when it has started again", 10)
            waiting_bytes = sum(job.work.size for job in self._waiting)
            if len(self._waiting) >= self.limits.queue or waiting_bytes + size > self.limits.waiting_bytes:
                raise BusyError(
                    f"{len(self._waiting)} jobs are waiting, which is as many as this server takes: try again later",
                    self._retry_after(),
                )

    def find(self, job_id: str) -> Job:
        """Find a job; raises :class:`NotFoundError` for one that there is not, or not any more."""
        with self.changed:
            job = self._jobs.get(job_id)
        if job is None:
            raise NotFoundError("there is no such job: it was never here, or is so old that it was dropped")
        return job

    def cancel(self, job: Job) -> None:
        """Cancel a job: one that waits leaves the queue, one that runs ends after its step; a finished one stays."""
        with self.changed:
            if job in self._waiting:
                self._waiting.remove(job)
                self._number()
            self.finish(job, "cancelled")

    def cancel_of(self, caller: str) -> None:
        """Cancel the running jobs that came in by one way."""
        with self.changed:
            for job in [one for one in self._jobs.values() if one.caller == caller and one.state == "running"]:
                self.finish(job, "cancelled")

    def take(self) -> list[Job]:
        """Take the job that waits longest, with those that can be painted in one batch with it; none where none is."""
        with self.changed:
            if not self._waiting:
                return []
            first = self._waiting[0]
            batch, images = [first], first.work.image_count
            key = first.work.batch_key
            if key is not None:
                for job in self._waiting[1:]:
                    if job.work.batch_key == key and images + job.work.image_count <= self._most_images(job):
                        batch.append(job)
                        images += job.work.image_count
            for job in batch:
                self._waiting.remove(job)
                job.state, job.position, job.begun = "running", None, time.monotonic()
            self._number()
            return batch

    def _most_images(self, job: Job) -> int:
        """Count the images of this job's kind that fit in one batch."""
        return getattr(job.work, "most_at_once", self.limits.batch_images)

    def start(self, job: Job, started: dict[str, Any]) -> None:
        """Note what a job is painted with, its steps first of all, and tell."""
        with self.changed:
            job.steps, job.started = started["steps"], started
        job.tell()

    def step(self, job: Job, event: dict[str, Any]) -> None:
        """Note a step, and tell."""
        with self.changed:
            if job.state != "running":
                return
            job.step, job.last_step = event["step"], event
        job.tell()

    def finish(self, job: Job, state: JobState, error: dict[str, Any] | None = None) -> None:
        """End a job that has not ended yet, tell, and drop the oldest finished ones where they are too many."""
        with self.changed:
            if job.is_finished:
                return
            if state != "done":
                job.images = []
            job.state, job.error, job.position, job.last_step = state, error, None, None
            if job.begun:
                job.seconds = round(time.monotonic() - job.begun, 3)
                self._seconds.append(job.seconds)
            self._finished[job.id] = job.size
            while len(self._finished) > self.limits.kept_jobs or (
                len(self._finished) > 1 and sum(self._finished.values()) > self.limits.kept_bytes
            ):
                oldest, _ = self._finished.popitem(last=False)
                del self._jobs[oldest]
        self._on_finish(job)
        job.tell()

    def close(self) -> None:
        """Cancel every job, and take no more."""
        with self.changed:
            self._is_closed = True
            for job in [one for one in self._jobs.values() if not one.is_finished]:
                self.cancel(job)
            self.changed.notify_all()

    @property
    def is_closed(self) -> bool:
        """Tell whether no jobs are taken any more."""
        return self._is_closed

    @property
    def waiting(self) -> int:
        """Number of jobs that wait."""
        return len(self._waiting)

    @property
    def running(self) -> list[Job]:
        """Jobs that run."""
        with self.changed:
            return [job for job in self._jobs.values() if job.state == "running"]

    @property
    def kept(self) -> tuple[int, int]:
        """Number and bytes of the finished jobs that are kept."""
        with self.changed:
            return len(self._finished), sum(self._finished.values())

    def _number(self) -> None:
        """Give the waiting jobs their positions, the next one's being 1, and tell them."""
        for position, job in enumerate(self._waiting, start=1):
            if job.position != position:
                job.position = position
                job.tell()

    def _retry_after(self) -> int:
        """Guess the seconds until there is room: one job's."""
        mean = sum(self._seconds) / len(self._seconds) if self._seconds else 1.0
        return min(60, max(1, math.ceil(mean)))
