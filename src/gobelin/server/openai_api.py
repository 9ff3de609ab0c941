"""OpenAI's image API: ``POST /v1/images/generations``, as its clients send it, answered with base64.

Shapes: OpenAI's API reference, *Create image*. ``seed``, ``steps`` and ``guidance`` are Gobelin's own beside it.
"""

import base64
import re
import time
from functools import partial
from typing import Annotated, Any, Literal

from annotated_types import Interval, MaxLen
from fastapi import APIRouter, Request
from pydantic import Field, create_model

from gobelin.errors import UsageError
from gobelin.server.jobs import Job
from gobelin.server.responses import ERRORS, AsciiJsonResponse, error_response
from gobelin.server.schemas import Body, Text, or_none
from gobelin.server.service import Service
from gobelin.server.works import PaintWork
from gobelin.settings import MAX_SEED

_STATUS = {"usage": 422, "failed": 500, "cancelled": 409}


def openai_routes(service: Service) -> APIRouter:
    """Make the route."""
    router = APIRouter(tags=["OpenAI"], responses=ERRORS)
    limits, name = service.limits, service.pipeline.name
    short = or_none(Annotated[str, MaxLen(200)])
    request_body = create_model(
        "ImageGenerationRequest",
        __base__=Body,
        prompt=(service.models.prompt, ...),
        model=(short, Field(default=None, description="The model's name, as /v1/models lists it.")),
        n=(or_none(Annotated[int, Interval(ge=1, le=limits.count)]), 1),
        size=(or_none(Annotated[str, MaxLen(20)]), Field(default="auto", description="WIDTHxHEIGHT, or auto.")),
        response_format=(Literal["b64_json"] | None, "b64_json"),
        output_format=(Literal["png"] | None, "png"),
        background=(Literal["auto", "opaque"] | None, "auto"),
        quality=(short, Field(default=None, description="Accepted, and without effect.")),
        style=(short, Field(default=None, description="Accepted, and without effect.")),
        moderation=(short, Field(default=None, description="Accepted, and without effect.")),
        user=(short, Field(default=None, description="Accepted, and without effect.")),
        seed=(or_none(Annotated[int, Interval(ge=0, le=MAX_SEED)]), None),
        steps=(or_none(Annotated[int, Interval(ge=1, le=limits.steps)]), None),
        guidance=(float | None, None),
        negative_prompt=(or_none(Annotated[Text, MaxLen(limits.prompt_characters)]), None),
        sampler=(short, None),
    )

    def make(body: Any) -> PaintWork:
        if body.model not in (None, name):
            raise UsageError(f"model is {body.model!r}: this server has {name!r} alone")
        names = ("seed", "steps", "guidance", "negative_prompt", "sampler")
        options = {one: getattr(body, one) for one in names if getattr(body, one) is not None}
        return PaintWork(prompt=body.prompt, options={**options, **_size(body.size), "count": body.n or 1})

    @router.post("/v1/images/generations")
    async def generate(request: Request, body: request_body) -> Any:  # pyright: ignore[reportInvalidTypeForm]
        """Paint a prompt, and wait for its images."""
        job = await service.finished(request, await service.submit(partial(make, body), caller="openai"))
        if job.state != "done":
            return failure(job)
        data = [{"b64_json": base64.b64encode(image.png).decode("ascii")} for image in job.images]
        return AsciiJsonResponse({"created": int(time.time()), "data": data})

    return router


def _size(size: str | None) -> dict[str, int]:
    if size in (None, "auto"):
        return {}
    found = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", size)
    if found is None:
        raise UsageError(f"size is {size!r}: give WIDTHxHEIGHT, such as 512x512, or auto")
    return {"width": int(found[1]), "height": int(found[2])}


def failure(job: Job) -> AsciiJsonResponse:
    """Make the response for a job that was waited for and did not end well."""
    error = job.error or {"message": "the job was cancelled", "type": "cancelled", "field": None}
    return error_response(_STATUS[error["type"]], error["message"], error["type"], error["field"])
