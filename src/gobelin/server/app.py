"""The app: every route of the server, behind its guard."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from gobelin import __version__
from gobelin.pipeline import Pipeline
from gobelin.server.a1111_api import a1111_routes
from gobelin.server.info_api import info_routes
from gobelin.server.jobs_api import jobs_routes, look_routes
from gobelin.server.limits import ServerLimits, ServerOptions
from gobelin.server.openai_api import openai_routes
from gobelin.server.page_files import page_routes
from gobelin.server.responses import AsciiJsonResponse, handle_errors
from gobelin.server.security import Guard, check_options
from gobelin.server.service import Service

_JOIN_SECONDS = 10.0  # for the step that runs

_DESCRIPTION = """\
Paints, edits and looks inside. A job is submitted, followed by server-sent events, and its images and maps are fetched.
Images travel as `data:` URLs; no address and no path is ever opened. Every error is one sentence in one shape.
"""


def create_app(pipeline: Pipeline, options: ServerOptions | None = None, limits: ServerLimits | None = None) -> FastAPI:
    """Create the app that serves a pipeline; its ``state.service`` has the jobs.

    Raises :class:`UsageError` for options that would let others in without a token.
    """
    options = options or ServerOptions()
    check_options(options)
    limits = limits or ServerLimits.of(pipeline.model, options.queue)
    service = Service(pipeline, options, limits)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        service.store.close()
        service.worker.join(_JOIN_SECONDS)

    app = FastAPI(
        title="Gobelin",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        default_response_class=AsciiJsonResponse,
        docs_url=None,  # its script would come from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    handle_errors(app)
    for router in (
        page_routes(),
        info_routes(service),
        jobs_routes(service),
        look_routes(service),
        openai_routes(service),
        a1111_routes(service),
    ):
        app.include_router(router)

    app.add_middleware(Guard, options=options, limits=limits, metrics=service.metrics)
    return app
