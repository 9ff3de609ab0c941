"""Explanations and maps of single steps: a kept run is asked again, in the model's thread."""

import dataclasses
from typing import Any

from torch import Tensor

from gobelin.errors import UsageError
from gobelin.explanation import explain_query, maps_at, token_names
from gobelin.images import data_url
from gobelin.look.heatmaps import HeatMaps
from gobelin.painting import Painting, decode_previews
from gobelin.pipeline import Pipeline
from gobelin.server.jobs import Job, KeptImage, StepRecord
from gobelin.server.schemas import ExplainRequest
from gobelin.server.works import PaintWork

_MOST_KEYS = 4096  # of one explanation: a grid of 64 × 64 patches
_MOST_PASSES = 8  # of the U-Net for one map: others wait for them
_DIGITS = 6


def explain_image(pipeline: Pipeline, job: Job, asked: ExplainRequest) -> dict[str, Any]:
    """Explain one query of an image's run, as JSON."""
    work, _, record = _painted(job, asked.image)
    index = _step(record, asked.step)
    if asked.broken is not None:
        work = dataclasses.replace(
            work, broken=asked.broken, site=asked.site if asked.broken == "silence_site" else None
        )
    painting = work.start_one(pipeline, asked.image)
    sites = pipeline.unet.attention_sites
    site = asked.site or next(site.name for site in sites if site.name.startswith("up_blocks") and site.kind == "cross")
    rows, columns = _grid_of(painting, site)
    if rows * columns > _MOST_KEYS and "attn1" in site:
        raise UsageError(f"site is {site}, whose {rows}×{columns} patches are too many keys: choose a coarser one")
    latents = record.noisy_latents[index : index + 1]
    explained = explain_query(painting, latents, record.timesteps[index], site, asked.head, (asked.x, asked.y))
    return {
        "step": index,
        "timestep": record.timesteps[index],
        "site": explained.site.name,
        "kind": explained.site.kind,
        "head": explained.head,
        "patch": [explained.row, explained.column],
        "grid": list(explained.grid),
        "tokens": token_names(painting) if explained.site.kind == "cross" else [str(n) for n in range(rows * columns)],
        **{
            name: _listed(getattr(explained, name))
            for name in ("query", "keys", "scores", "softmax", "probs", "values_norm", "output")
        },
        "shapes": explained.shapes,
        "latents": data_url(decode_previews(pipeline.vae, latents)[0]),
        "denoised": data_url(decode_previews(pipeline.vae, record.denoised[index : index + 1])[0]),
        "sites": [
            {
                "name": one.name,
                "kind": one.kind,
                "heads": one.heads,
                "rows": one.grid(*painting.plan.latent_size)[0],
                "columns": one.grid(*painting.plan.latent_size)[1],
            }
            for one in sites
        ],
    }


def maps_of_image(
    pipeline: Pipeline, job: Job, number: int, step: int | None, site: str | None, head: int | None
) -> HeatMaps:
    """Map an image again: at one step, or the mean of up to eight from the first to the last; at one site, or the mean
    of all; in one head, or the mean of all."""
    work, kept, record = _painted(job, number)
    last = len(record.timesteps) - 1
    passes = min(_MOST_PASSES, last + 1)
    spread = [round(last * place / max(1, passes - 1)) for place in range(passes)]
    chosen = spread if step is None else [_step(record, step)]
    assert kept.heatmaps is not None
    painting = work.start_one(pipeline, number)
    latents, timesteps = record.noisy_latents[chosen], [record.timesteps[one] for one in chosen]
    return maps_at(painting, latents, timesteps, kept.heatmaps.image, site, head)


def _painted(job: Job, number: int) -> tuple[PaintWork, KeptImage, StepRecord]:
    """Return an image's work and the record of its steps; raises :class:`UsageError` for one that was not painted."""
    kept = job.images[number]
    if not isinstance(job.work, PaintWork) or kept.record is None:
        raise UsageError("only steps of a painting that was traced can be looked at one by one: send it as kind paint")
    return job.work, kept, kept.record


def _step(record: StepRecord, step: int) -> int:
    if step >= len(record.timesteps):
        raise UsageError(f"step is {step}: the image has steps 0 to {len(record.timesteps) - 1}")
    return step


def _grid_of(painting: Painting, name: str) -> tuple[int, int]:
    """Return the grid of a site, 0 × 0 of one that there is not, which is refused later."""
    found = [site for site in painting.model.unet.attention_sites if site.name == name]
    return found[0].grid(*painting.plan.latent_size) if found else (0, 0)


def _listed(tensor: Tensor) -> Any:
    """List numbers, rounded to as many digits as matter."""
    if tensor.ndim > 1:
        return [_listed(row) for row in tensor]
    return [float(f"{number:.{_DIGITS}g}") for number in tensor.tolist()]
