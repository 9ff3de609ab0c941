"""The routes that describe the server and the model, read settings from images, and say whether all is well."""

import asyncio
import dataclasses
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from gobelin.errors import DataError
from gobelin.formats.generation_info.all_programs import read_generation_info
from gobelin.samplers import SAMPLERS
from gobelin.scenes import WORLDS
from gobelin.scenes.captions import world_words
from gobelin.server.data_urls import EncodedImage, decode_image
from gobelin.server.model_worker import paint_a_step
from gobelin.server.responses import ERRORS, AsciiJsonResponse, error_response
from gobelin.server.schemas import Body
from gobelin.server.service import Service

_HEALTH_SECONDS = 30.0  # in which a step has to end
_FRESH_SECONDS = 5.0  # in which a step that ended, of anybody's, says that all is well
_SCENE_EXAMPLES = (
    "a red circle to the left of a blue star",
    "a yellow star above a purple ring",
    "three green rings",
    "a white cross",
    "a blue ring and a red star",
    "four orange squares",
)
_EXAMPLES = ("a castle on a hill at sunset", "a bowl of lemons, oil painting", "a red bicycle in front of a blue door")


def info_routes(service: Service) -> APIRouter:
    """Make the routes."""
    router = APIRouter(tags=["info"], responses=ERRORS)
    described = describe_model(service)
    health = _Health(service)

    @router.get("/v1/info")
    async def info() -> Any:
        """Describe the model, what it recommends, and the limits of requests."""
        return AsciiJsonResponse(described)

    @router.get("/v1/models")
    async def models() -> Any:
        """List the model, in the form of OpenAI's API."""
        model = {"id": service.pipeline.name, "object": "model", "created": 0, "owned_by": "gobelin"}
        return AsciiJsonResponse({"object": "list", "data": [model]})

    @router.get("/v1/samplers")
    async def samplers() -> Any:
        """List the samplers."""
        return AsciiJsonResponse({"samplers": list(SAMPLERS)})

    @router.post("/v1/image-settings")
    async def image_settings(body: ImageSettingsBody) -> Any:
        """Read the settings that Gobelin, AUTOMATIC1111's web UI, ComfyUI or another program wrote into an image."""
        read = partial(_read_settings, body.image, service.limits.input_pixels)
        return AsciiJsonResponse(await service.open_images(read))

    @router.get("/healthz")
    async def healthz() -> Any:
        """Say whether the model paints: a small step goes through its thread, unless one just did."""
        if await health.is_well():
            return AsciiJsonResponse({"status": "ok"})
        return error_response(503, "the model does not answer", "failed")

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Write counters for Prometheus."""
        service.metrics.waiting.set(service.store.waiting)
        service.metrics.kept_bytes.set(service.store.kept[1])
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router


class ImageSettingsBody(Body):
    """An image whose settings are wanted, as a ``data:`` URL."""

    image: str


def describe_model(service: Service) -> dict[str, Any]:
    """Describe a model as the page needs it."""
    pipeline, limits = service.pipeline, service.limits
    side = pipeline.unet.config.sample_size * pipeline.vae.config.factor
    world = pipeline.model.world
    bounds = ("pixels", "steps", "count", "prompt_characters", "queue", "work", "body", "input_pixels")
    return {
        "model": pipeline.name,
        "size": [side, side],
        "device": str(pipeline.unet.device),
        "dtype": str(pipeline.unet.dtype).removeprefix("torch."),
        "engine": pipeline.engine,
        "recommended": dict(pipeline.recommended),
        "samplers": list(SAMPLERS),
        "examples": list(pipeline.model.examples or (_EXAMPLES if world is None else _SCENE_EXAMPLES)),
        "limits": {name: getattr(limits, name) for name in bounds},
        "words_known": None if world not in WORLDS else world_words(WORLDS[world]),
        "pointing": pipeline.model.pointing,
        "sites": [dataclasses.asdict(site) for site in pipeline.unet.attention_sites],
        "settings": service.models.settings.model_json_schema(),
    }


class _Health:
    """Check of the model: made once at a time, however many ask."""

    def __init__(self, service: Service):
        self._service = service
        self._lock = asyncio.Lock()

    async def is_well(self) -> bool:
        """Tell whether a step ended lately, or ends soon."""
        async with self._lock:
            if time.monotonic() - self._service.worker.last_step < _FRESH_SECONDS:
                return True
            try:
                async with asyncio.timeout(_HEALTH_SECONDS):
                    await self._service.ask_model(partial(paint_a_step, self._service.pipeline))
            except Exception:  # of whatever kind: it does not paint
                return False
            self._service.worker.last_step = time.monotonic()
            return True


def _read_settings(image: str, most_pixels: int) -> dict[str, Any]:
    """Read the settings in an image; what they say of a model is told, and never opened."""
    encoded: EncodedImage = decode_image(image, "image", most_pixels)
    with tempfile.TemporaryDirectory(prefix="gobelin-") as folder:
        file = Path(folder) / "image"
        file.write_bytes(encoded.content)
        try:
            found = read_generation_info(file, SAMPLERS)
        except DataError as error:
            raise DataError(str(error).replace(str(file), "the image")) from None
    settings = dict(found.settings)
    return {
        "prompt": settings.pop("prompt", ""),
        "settings": settings,
        "source": found.source,
        "unknown": [missing.replace(str(file), "the image") for missing in found.missing],
    }
