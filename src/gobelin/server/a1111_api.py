"""AUTOMATIC1111's API: txt2img, img2img, samplers, models, options, progress and interrupt.

Shapes: the web UI's ``modules/api/models.py`` and ``modules/api/api.py``. What has no meaning here is refused where it
would change the image, and listed under ``ignored`` in ``info`` where it would not.
"""

import base64
import json
from functools import partial
from typing import Annotated, Any

from annotated_types import Interval, Len, MaxLen
from fastapi import APIRouter, Request
from pydantic import ConfigDict, Field, create_model

from gobelin.errors import UsageError
from gobelin.formats.generation_info.a1111 import A1111_SAMPLERS, format_a1111_parameters
from gobelin.samplers import SAMPLERS
from gobelin.server.data_urls import decode_image
from gobelin.server.jobs import Job
from gobelin.server.openai_api import failure
from gobelin.server.responses import ERRORS, AsciiJsonResponse
from gobelin.server.schemas import Body, Text, or_none
from gobelin.server.service import Service
from gobelin.server.works import PaintWork
from gobelin.settings import MAX_SEED

_CALLER = "a1111"
# Fields that would change the image, and the values at which they do not.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "enable_hr": (False, None),
    "restore_faces": (False, None),
    "tiling": (False, None),
    "subseed_strength": (0, None),
    "refiner_checkpoint": (None, ""),
    "script_name": (None, ""),
    "alwayson_scripts": (None, {}),
    "styles": (None, []),
    "inpainting_mask_invert": (0, None),
    "inpaint_full_res": (False, 0, None),
    "resize_mode": (0, None),
    "image_cfg_scale": (None,),
    "eta": (None,),
    "s_churn": (0, None),
    "s_noise": (1, None),
    "s_min_uncond": (0, None),
    "mask_blur": (0, None),
}


def a1111_routes(service: Service) -> APIRouter:
    """Make the routes."""
    router = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"], responses=ERRORS)
    text_body, image_body = _bodies(service)

    async def paint(request: Request, body: Any) -> Any:
        job = await service.finished(request, await service.submit(partial(_make_work, service, body), caller=_CALLER))
        return _answer(job, body) if job.state == "done" else failure(job)

    @router.post("/txt2img")
    async def txt2img(request: Request, body: text_body) -> Any:  # pyright: ignore[reportInvalidTypeForm]
        """Paint a prompt, and wait for its images."""
        return await paint(request, body)

    @router.post("/img2img")
    async def img2img(request: Request, body: image_body) -> Any:  # pyright: ignore[reportInvalidTypeForm]
        """Paint over an image, or inpaint where its mask is white, and wait for the images."""
        return await paint(request, body)

    @router.get("/samplers")
    async def samplers() -> Any:
        """List the samplers by the web UI's names."""
        named = {ours: name for name, ours in A1111_SAMPLERS.items()}
        return AsciiJsonResponse(
            [{"name": _shown_sampler(sampler, named), "aliases": [sampler], "options": {}} for sampler in SAMPLERS]
        )

    @router.get("/schedulers")
    async def schedulers() -> Any:
        """List the spacings of noise levels."""
        return AsciiJsonResponse(
            [{"name": name.lower(), "label": name, "aliases": None} for name in ("Automatic", "Uniform", "Karras")]
        )

    @router.get("/sd-models")
    async def sd_models() -> Any:
        """List the model."""
        name = service.pipeline.name
        return AsciiJsonResponse(
            [{"title": name, "model_name": name, "hash": None, "sha256": None, "filename": name, "config": None}]
        )

    @router.get("/options")
    async def options() -> Any:
        """Show the options that this server has."""
        skipped = service.pipeline.recommended.clip_skip or 0
        return AsciiJsonResponse(
            {"sd_model_checkpoint": service.pipeline.name, "CLIP_stop_at_last_layers": skipped + 1}
        )

    @router.get("/progress")
    async def progress() -> Any:
        """Show how far the running job is."""
        running = service.store.running
        job = running[0] if running else None
        done, steps = (0, 0) if job is None else (job.step, job.steps)
        state = {
            "skipped": False,
            "interrupted": False,
            "job": "" if job is None else job.work.kind,
            "job_count": service.store.waiting + len(running),
            "job_no": 0,
            "sampling_step": done,
            "sampling_steps": steps,
        }
        return AsciiJsonResponse(
            {
                "progress": done / steps if steps else 0.0,
                "eta_relative": 0.0,
                "state": state,
                "current_image": None,
                "textinfo": None,
            }
        )

    @router.post("/interrupt")
    async def interrupt() -> Any:
        """Cancel the running jobs that came in by this API."""
        service.store.cancel_of(_CALLER)
        return AsciiJsonResponse({})

    return router


def _bodies(service: Service) -> tuple[type[Body], type[Body]]:
    limits = service.limits
    text = Annotated[Text, MaxLen(limits.prompt_characters)]
    short = or_none(Annotated[str, MaxLen(200)])
    number = Annotated[int, Interval(ge=1, le=limits.count)]
    side = or_none(Annotated[int, Interval(ge=1, le=limits.pixels)])
    image = Annotated[str, MaxLen(limits.body)]
    fields: dict[str, Any] = {
        "prompt": (text, ""),
        "negative_prompt": (or_none(text), ""),
        "seed": (or_none(Annotated[int, Interval(ge=-1, le=MAX_SEED)]), -1),
        "steps": (or_none(Annotated[int, Interval(ge=1, le=limits.steps)]), None),
        "cfg_scale": (float | None, None),
        "width": (side, None),
        "height": (side, None),
        "sampler_name": (short, None),
        "sampler_index": (short, None),
        "scheduler": (short, None),
        "batch_size": (or_none(number), 1),
        "n_iter": (or_none(number), 1),
        "denoising_strength": (or_none(Annotated[float, Interval(ge=0, le=1)]), None),
        "clip_skip": (or_none(Annotated[int, Interval(ge=1, le=12)]), None),
        "send_images": (bool | None, True),
        "override_settings": (or_none(Annotated[dict[str, Any], MaxLen(50)]), None),
    }
    base = create_model("A1111Body", __base__=_Lenient, **fields)
    given: dict[str, Any] = {
        "init_images": (Annotated[list[image], Len(1, 1)], Field(description="One image, in base64.")),
        "mask": (or_none(image), None),
    }
    return create_model("Txt2ImgRequest", __base__=base), create_model("Img2ImgRequest", __base__=base, **given)


class _Lenient(Body):
    """A body whose unknown fields are looked at one by one."""

    model_config = ConfigDict(extra="allow")


def _make_work(service: Service, body: Any) -> PaintWork:
    limits = service.limits
    _refuse_what_changes(body)
    options: dict[str, Any] = {
        "negative_prompt": body.negative_prompt or None,
        "seed": None if body.seed in (None, -1) else body.seed,
        "steps": body.steps,
        "guidance": body.cfg_scale,
        "width": body.width,
        "height": body.height,
        "sampler": _sampler(body.sampler_name or body.sampler_index, body.scheduler),
        "clip_skip": _clip_skip(body),
        "count": (body.batch_size or 1) * (body.n_iter or 1),
    }
    if options["count"] > limits.count:
        raise UsageError(f"batch_size × n_iter is {options['count']}: give {limits.count} images at most")
    if images := getattr(body, "init_images", None):
        options["init_image"] = decode_image(images[0], "init_images", limits.input_pixels, plain=True)
        options["strength"] = 0.75 if body.denoising_strength is None else body.denoising_strength  # the web UI's own
        if body.mask is not None:
            options["mask"] = decode_image(body.mask, "mask", limits.input_pixels, plain=True)
    given = {name: value for name, value in options.items() if value is not None}
    return PaintWork(prompt=body.prompt, options=given)


def _refuse_what_changes(body: Any) -> None:
    """Raise :class:`UsageError` for a field that asks for another image than would be painted."""
    for name, harmless in _REFUSED.items():
        value = (body.model_extra or {}).get(name)
        if value not in harmless:
            raise UsageError(f"{name} is not what this server can do: leave it out")
    for name in body.override_settings or {}:
        if name not in ("CLIP_stop_at_last_layers", "sd_model_checkpoint"):
            raise UsageError(f"override_settings has {name!r}, which this server does not have: leave it out")


def _clip_skip(body: Any) -> int | None:
    """Return the layers to leave out: the web UI counts from 1, which is none."""
    value = (body.override_settings or {}).get("CLIP_stop_at_last_layers", body.clip_skip)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"CLIP_stop_at_last_layers is {value!r}: give a whole number of 1 or more")
    return value - 1


def _sampler(name: str | None, scheduler: str | None) -> str | None:
    """Find a sampler by the web UI's name, or by ours; its Karras' form by either field."""
    if not name:
        return None
    karras = name.endswith(" Karras") or (scheduler or "").lower() == "karras"
    plain = name.removesuffix(" Karras")
    ours = A1111_SAMPLERS.get(plain, plain)
    if scheduler and scheduler.lower() not in ("automatic", "uniform", "normal", "karras"):
        raise UsageError(f"scheduler is {scheduler!r}: give Automatic, Uniform or Karras")
    if karras and not ours.endswith("_karras"):
        ours = f"{ours}_karras"
    if ours not in SAMPLERS:
        raise UsageError(f"sampler_name is {name!r}: /sdapi/v1/samplers lists those that there are")
    return ours


def _shown_sampler(sampler: str, named: dict[str, str]) -> str:
    plain = sampler.removesuffix("_karras")
    return named.get(plain, plain) + (" Karras" if plain != sampler else "")


def _answer(job: Job, body: Any) -> AsciiJsonResponse:
    """Answer as the web UI does: images in base64, the parameters, and ``info`` as a JSON text."""
    settings = [image.settings for image in job.images]
    first = settings[0]
    extra = [name for name in (body.model_extra or {}) if name not in _REFUSED]
    info = {
        "prompt": first["prompt"],
        "all_prompts": [one["prompt"] for one in settings],
        "negative_prompt": first["negative_prompt"],
        "all_negative_prompts": [one["negative_prompt"] for one in settings],
        "seed": first["seed"],
        "all_seeds": [one["seed"] for one in settings],
        "width": first["width"],
        "height": first["height"],
        "sampler_name": first["sampler"],
        "cfg_scale": first["guidance"],
        "steps": first["steps"],
        "batch_size": len(settings),
        "sd_model_name": first["model"],
        "clip_skip": first["clip_skip"] + 1,
        "infotexts": [format_a1111_parameters(one) for one in settings],
        "ignored": extra,
    }
    images = [base64.b64encode(image.png).decode("ascii") for image in job.images]
    known = set(type(body).model_fields) - {"init_images", "mask", "override_settings"}
    parameters = body.model_dump(include=known)
    return AsciiJsonResponse(
        {
            "images": images if body.send_images is not False else [],
            "parameters": parameters,
            "info": json.dumps(info, ensure_ascii=True),
        }
    )
