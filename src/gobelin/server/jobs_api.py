"""The routes of jobs: submit, follow, cancel, and fetch what came of them."""

from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Body, Path, Query, Response
from fastapi.responses import HTMLResponse
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool

from gobelin.errors import UsageError
from gobelin.formats.png import encode_png
from gobelin.look.page import word_map_data, word_map_page
from gobelin.look.word_sheets import encode_animation, word_sheet
from gobelin.painting import decode_previews
from gobelin.server.data_urls import decode_image
from gobelin.server.events import follow, wait_for
from gobelin.server.explanations import explain_image, maps_of_image
from gobelin.server.job_views import job_view
from gobelin.server.jobs import Job, KeptImage, NotFoundError
from gobelin.server.responses import ERRORS, AsciiJsonResponse, to_json
from gobelin.server.schemas import ExplainRequest, JobView, given
from gobelin.server.security import STANDALONE_CSP
from gobelin.server.service import Service
from gobelin.server.works import EditWork, LookWork, PaintWork

_PING_SECONDS = 15
_SEND_SECONDS = 60  # for a reader that takes nothing: then the connection is closed
_MOST_ON_SHEET = 60  # words
_IMAGES = ("init_image", "mask")
JobId = Annotated[str, Path(pattern="^[0-9a-f]{1,64}$", description="A job's id.")]
ImageNumber = Annotated[int, Path(ge=0, le=10_000, description="The number of an image of a job, 0 being the first.")]


def make_work(service: Service, body: Any) -> PaintWork | EditWork | LookWork:
    """Make the work that a body describes, which may be of any kind of job."""
    limits = service.limits
    if body.kind == "look":
        image = decode_image(body.image, "image", limits.input_pixels)
        timesteps = {} if body.timesteps is None else {"timesteps": body.timesteps}
        return LookWork(image=image, caption=body.caption, seed=body.seed, **timesteps)
    options = {name: value for name, value in given(body.settings).items() if value is not None}
    for name in _IMAGES:
        if name in options:
            options[name] = decode_image(options[name], name, limits.input_pixels)
    if body.kind == "edit":
        return EditWork(prompt=body.prompt, to=body.to, options=options, controls=body.controls)
    return PaintWork(
        prompt=body.prompt,
        options=options,
        controls=body.controls,
        trace=body.trace,
        broken=body.broken,
        site=body.site,
    )


def jobs_routes(service: Service) -> APIRouter:
    """Make the routes of jobs."""
    router = APIRouter(prefix="/v1/jobs", tags=["jobs"], responses=ERRORS)
    store = service.store

    def find_image(job_id: str, number: int) -> tuple[Job, KeptImage]:
        job = store.find(job_id)
        if number >= len(job.images):
            raise NotFoundError(
                f"the job has {len(job.images)} images, and none of this number" if job.is_finished else _NOT_YET
            )
        return job, job.images[number]

    def find_traced(job_id: str, number: int) -> tuple[Job, KeptImage]:
        job, image = find_image(job_id, number)
        if image.heatmaps is None:
            raise NotFoundError("this image was painted without a trace: send trace true with its job")
        return job, image

    @router.post("", status_code=202, response_model=JobView)
    async def submit(body: Annotated[service.models.job, Body()]) -> Any:  # pyright: ignore[reportInvalidTypeForm]
        """Put a job into the queue: paint a prompt, edit an image, or look at one."""
        job = await service.submit(partial(make_work, service, body), previews=getattr(body, "previews", False))
        return AsciiJsonResponse(job_view(job), 202)

    @router.get("/{job_id}", response_model=JobView)
    async def show(job_id: JobId) -> Any:
        """Show a job as it is now."""
        return AsciiJsonResponse(job_view(store.find(job_id)))

    @router.delete("/{job_id}", response_model=JobView)
    async def cancel(job_id: JobId) -> Any:
        """Cancel a job: one that runs ends after its step."""
        job = store.find(job_id)
        store.cancel(job)
        return AsciiJsonResponse(job_view(job))

    @router.get("/{job_id}/events", response_class=EventSourceResponse)
    async def events(job_id: JobId) -> EventSourceResponse:
        """Follow a job: queued, started, step, then done, failed or cancelled, as server-sent events."""
        job = store.find(job_id)

        async def lines() -> AsyncIterator[ServerSentEvent]:
            async for name, data in follow(store, job):
                yield ServerSentEvent(event=name, data=to_json(data))

        return EventSourceResponse(lines(), ping=_PING_SECONDS, send_timeout=_SEND_SECONDS)

    @router.get("/{job_id}/images/{number}", response_class=Response, responses=_of_type("image/png"))
    async def image(job_id: JobId, number: ImageNumber) -> Response:
        """Fetch an image: a PNG with its settings in it."""
        return Response(find_image(job_id, number)[1].png, media_type="image/png")

    @router.get("/{job_id}/sheet/{number}", response_class=Response, responses=_of_type("image/png"))
    async def sheet(job_id: JobId, number: ImageNumber) -> Response:
        """Fetch a sheet of an image with the heat map of every word."""
        heatmaps = find_traced(job_id, number)[1].heatmaps
        assert heatmaps is not None
        words = range(min(len(heatmaps.words), _MOST_ON_SHEET))
        drawn = await run_in_threadpool(lambda: encode_png(word_sheet(heatmaps, words)))
        return Response(drawn, media_type="image/png")

    @router.get("/{job_id}/page/{number}", response_class=HTMLResponse)
    async def page(job_id: JobId, number: ImageNumber) -> HTMLResponse:
        """Fetch a page of one file that shows which word painted which pixel."""
        image = find_traced(job_id, number)[1]
        assert image.heatmaps is not None
        shares = None if image.record is None else image.record.word_shares
        text = await run_in_threadpool(word_map_page, image.heatmaps, shares)
        return HTMLResponse(text, headers={"Content-Security-Policy": STANDALONE_CSP})

    @router.get("/{job_id}/animation/{number}", response_class=Response, responses=_of_type("image/webp"))
    async def animation(job_id: JobId, number: ImageNumber) -> Response:
        """Fetch the image while it was denoised, as a WebP that moves."""
        record = find_traced(job_id, number)[1].record
        if record is None:
            raise NotFoundError("an animation is of the steps of a painting, and this job has none")
        frames = await service.ask_model(partial(decode_previews, service.pipeline.vae, record.denoised))
        return Response(await run_in_threadpool(encode_animation, frames), media_type="image/webp")

    @router.get("/{job_id}/maps/{number}")
    async def maps(
        job_id: JobId,
        number: ImageNumber,
        step: Annotated[int | None, Query(ge=0, le=10_000, description="One step, 0 being the first.")] = None,
        site: Annotated[str | None, Query(max_length=200, description="One attention site.")] = None,
        head: Annotated[int | None, Query(ge=0, le=10_000, description="One head.")] = None,
    ) -> Any:
        """Fetch the word maps of an image: sharp means with every step, or those of one step, site or head."""
        job, image = find_traced(job_id, number)
        assert image.heatmaps is not None
        if step is None and site is None and head is None:
            shares = None if image.record is None else image.record.word_shares
            return AsciiJsonResponse(await run_in_threadpool(word_map_data, image.heatmaps, shares))
        chosen = partial(maps_of_image, service.pipeline, job, number, step, site, head)
        return AsciiJsonResponse(word_map_data(await service.ask_model(chosen)))

    @router.post("/{job_id}/explain")
    async def explain(job_id: JobId, body: ExplainRequest) -> Any:
        """Explain one query: query, keys, scores, softmax and output of one pixel at one site, step and head."""
        job, _ = find_traced(job_id, body.image)
        return AsciiJsonResponse(await service.ask_model(partial(explain_image, service.pipeline, job, body)))

    return router


def look_routes(service: Service) -> APIRouter:
    """Make the route of a look that is answered at once."""
    router = APIRouter(tags=["look"], responses=ERRORS)

    @router.post("/v1/look")
    async def look(body: service.models.look) -> Any:  # pyright: ignore[reportInvalidTypeForm]
        """Look at an image with a caption, and wait for its word maps."""
        made = partial(_look_work, service, body)
        job = await service.submit(made, caller="look")
        await wait_for(service.store, job)
        if job.state != "done" or job.images[0].heatmaps is None:
            raise UsageError((job.error or {}).get("message", "the look was cancelled"))
        heatmaps = job.images[0].heatmaps
        data = await run_in_threadpool(word_map_data, heatmaps)
        return AsciiJsonResponse({"job": job_view(job), "maps": data})

    return router


def _look_work(service: Service, body: Any) -> LookWork:
    work = make_work(service, _AsLook(body))
    assert isinstance(work, LookWork)
    return work


class _AsLook:
    """A body of a look without its kind."""

    kind = "look"

    def __init__(self, body: Any):
        self.image, self.caption, self.timesteps, self.seed = body.image, body.caption, body.timesteps, body.seed


_NOT_YET = "the job has no images yet: wait for its done event"


def _of_type(kind: str) -> dict[int | str, dict[str, Any]]:
    return {200: {"content": {kind: {"schema": {"type": "string", "format": "binary"}}}}}
