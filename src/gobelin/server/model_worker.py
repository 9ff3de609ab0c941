"""The worker: one thread that alone runs the model, job after job, with short tasks between a job's steps."""

import contextlib
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from PIL import Image

from gobelin.allocator import give_back_freed_memory
from gobelin.errors import Cancelled, GobelinError, UsageError, is_out_of_memory
from gobelin.pipeline import Pipeline
from gobelin.plan import inpaints
from gobelin.server.jobs import BusyError, JobStore
from gobelin.server.metrics import Metrics
from gobelin.server.runs import Runner

_Returned = TypeVar("_Returned")
_MOST_TASKS = 64
_SMALL_SIDE = 8  # latents
_IDLE = 2.0  # s, after which freed memory is given back; the next step enters its pages anew, so not between two jobs
FAILED = "the server could not finish this, and its own log says why"
"""The sentence for every error that is not one of ours: no traceback and no path leaves the server."""


def error_of(error: BaseException, field: str | None = None) -> dict[str, Any]:
    """Write an error as clients see it: a sentence of ours, and of others none of their own words."""
    if isinstance(error, GobelinError):
        return {"message": str(error), "type": "usage" if isinstance(error, UsageError) else "failed", "field": field}
    if is_out_of_memory(error):
        sentence = "out of memory: give a smaller size or fewer images, or tile for large ones"
        return {"message": sentence, "type": "failed", "field": None}
    traceback.print_exception(error, file=sys.stderr)
    return {"message": FAILED, "type": "failed", "field": None}


@dataclass(frozen=True)
class _Task:
    """A call that needs the model's thread, and its future."""

    call: Callable[[], Any]
    future: Future[Any]


def paint_a_step(pipeline: Pipeline) -> None:
    """Paint one step of a small image, and decode it."""
    side = min(_SMALL_SIDE, pipeline.unet.config.sample_size) * pipeline.vae.config.factor
    extra: dict[str, Any] = {}
    if inpaints(pipeline.unet):
        extra = {"init_image": Image.new("RGB", (side, side)), "mask": Image.new("L", (side, side), 255)}
    pipeline("health", steps=1, sampler="ddim", seed=0, guidance=2, height=side, width=side, **extra)


class ModelWorker:
    """The thread of the model: it takes batches of jobs from the store, and calls that are handed to it."""

    def __init__(self, pipeline: Pipeline, store: JobStore, metrics: Metrics):
        self._store = store
        self._tasks: deque[_Task] = deque()
        self._runner = Runner(pipeline=pipeline, store=store, metrics=metrics, between_steps=self._between_steps)
        self._thread = threading.Thread(target=self._run, name="gobelin-model", daemon=True)
        self.last_step = float("-inf")
        """When a step last ended, on the monotonic clock."""

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def join(self, seconds: float) -> None:
        """Wait until the thread has ended, after the store was closed."""
        self._thread.join(seconds)

    def call(self, call: Callable[[], _Returned]) -> Future[_Returned]:
        """Have the model's thread call a function, after its present step; raises :class:`BusyError`."""
        future: Future[_Returned] = Future()
        with self._store.changed:
            if len(self._tasks) >= _MOST_TASKS or self._store.is_closed or not self._thread.is_alive():
                raise BusyError("the model has more to answer than it can: try again in a moment", 2)
            self._tasks.append(_Task(call, future))
            self._store.changed.notify_all()
        return future

    def _run(self) -> None:
        with contextlib.suppress(Exception):  # what is wrong with the model, the first job says
            paint_a_step(self._runner.pipeline)  # kernels are compiled, and weights packed, before anybody waits
        while not self._store.is_closed:
            self._wait()
            self._run_tasks()
            if batch := self._store.take():
                self._run_batch(batch)
        for task in self._tasks:
            task.future.cancel()

    def _wait(self) -> None:
        """Wait until there is something to do, and give freed memory back after a while without."""
        with self._store.changed:
            if self._store.changed.wait_for(self._has_work, timeout=_IDLE):
                return
        give_back_freed_memory()
        with self._store.changed:
            self._store.changed.wait_for(self._has_work)

    def _has_work(self) -> bool:
        return bool(self._tasks or self._store.waiting or self._store.is_closed)

    def _run_batch(self, batch: list[Any]) -> None:
        """Run jobs that are painted together; whatever goes wrong ends them, and not the thread."""
        try:
            self._runner.run(batch)
        except Cancelled:
            for job in batch:
                self._store.finish(job, "cancelled")
        except Exception as error:
            for job in batch:
                self._store.finish(job, "failed", error_of(error))

    def _between_steps(self) -> None:
        self.last_step = time.monotonic()
        self._run_tasks()

    def _run_tasks(self) -> None:
        while True:
            with self._store.changed:
                if not self._tasks:
                    return
                task = self._tasks.popleft()
            if not task.future.set_running_or_notify_cancel():
                continue
            try:
                task.future.set_result(task.call())
            except Exception as error:
                task.future.set_exception(error)
