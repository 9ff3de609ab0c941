"""The service behind the routes: the model's worker, its jobs, and requests checked before they wait."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from gobelin.pipeline import Pipeline
from gobelin.server.events import wait_for
from gobelin.server.jobs import Job, JobStore
from gobelin.server.limits import ServerLimits, ServerOptions
from gobelin.server.metrics import Metrics
from gobelin.server.model_worker import ModelWorker
from gobelin.server.schemas import request_models
from gobelin.server.works import EditWork, LookWork, PaintWork

_Returned = TypeVar("_Returned")


class Service:
    """A pipeline that serves: one worker runs the model, requests wait in a store."""

    def __init__(self, pipeline: Pipeline, options: ServerOptions, limits: ServerLimits):
        self.pipeline = pipeline
        self.options = options
        self.limits = limits
        self.metrics = Metrics()
        self.store = JobStore(limits, self._count)
        self.worker = ModelWorker(pipeline, self.store, self.metrics)
        self.models = request_models(limits)
        self._planning = threading.Lock()

    async def submit(
        self, make: Callable[[], PaintWork | EditWork | LookWork], caller: str = "jobs", previews: bool = False
    ) -> Job:
        """Check a work, and put it into the queue.

        Raises :class:`UsageError` for what cannot be painted, :class:`gobelin.server.jobs.BusyError` for a full queue.
        """
        self.store.refuse_when_full()
        work, notes = await self.open_images(lambda: make().checked(self.pipeline, self.limits))
        return self.store.submit(work, caller, previews, notes)

    async def open_images(self, call: Callable[[], _Returned]) -> _Returned:
        """Call what opens images of requests, in a thread: one at a time, as they may be large."""

        def alone() -> _Returned:
            with self._planning:
                return call()

        return await run_in_threadpool(alone)

    async def ask_model(self, call: Callable[[], _Returned]) -> _Returned:
        """Have the model's thread call a function, and wait for what it returns."""
        return await asyncio.wrap_future(self.worker.call(call))

    async def finished(self, request: Request, job: Job) -> Job:
        """Wait until a job has ended; a client that goes away before cancels it."""
        done = asyncio.ensure_future(wait_for(self.store, job))
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait((done, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            done.cancel()
            gone.cancel()
            self.store.cancel(job)
        return job

    def stop(self) -> None:
        """Cancel all jobs and take no more, from a signal handler too: another thread waits for the locks."""
        threading.Thread(target=self.store.close, name="gobelin-stop").start()

    def _count(self, job: Job) -> None:
        self.metrics.jobs.labels(job.work.kind, job.state).inc()
        if job.seconds is not None:
            self.metrics.job_seconds.labels(job.work.kind).observe(job.seconds)


async def _disconnected(request: Request) -> None:
    """Wait until the client has gone away."""
    receive: Callable[[], Awaitable[dict[str, object]]] = request.receive  # pyright: ignore[reportAssignmentType]
    while (await receive())["type"] != "http.disconnect":
        pass
