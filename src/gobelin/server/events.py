"""Events of a job, for those who listen: the newest state at once, then every change; nothing is kept for the slow."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from gobelin.server.job_views import job_view
from gobelin.server.jobs import Job, JobStore


async def follow(store: JobStore, job: Job) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """Yield a job's events until it ends: (name, data).

    Whoever reads slowly, or comes late, gets the newest step and not those before it: there is no queue of events.
    """
    loop, changed = asyncio.get_running_loop(), asyncio.Event()

    def wake() -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(changed.set)

    job.listeners.add(wake)
    position: int | None = None
    has_started = False
    last_step: dict[str, Any] | None = None
    try:
        while True:
            changed.clear()
            with store.changed:
                state, now, started, step = job.state, job.position, job.started, job.last_step
            if state == "queued" and now != position:
                position = now
                yield "queued", {"position": now}
            if started is not None and not has_started and state in ("running", "done"):
                has_started = True
                yield "started", started
            if state == "running" and step is not None and step is not last_step:
                last_step = step
                yield "step", step
            if state == "done":
                yield "done", {"job": job_view(job)}
            elif state == "failed":
                yield "failed", {"error": job.error}
            elif state == "cancelled":
                yield "cancelled", {}
            if job.is_finished and state == job.state:
                return
            await changed.wait()
    finally:
        job.listeners.discard(wake)


async def wait_for(store: JobStore, job: Job) -> None:
    """Wait until a job has ended."""
    async for _ in follow(store, job):
        pass
