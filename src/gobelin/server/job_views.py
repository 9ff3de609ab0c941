"""Jobs as JSON."""

from typing import Any

from gobelin.server.jobs import Job


def job_view(job: Job) -> dict[str, Any]:
    """Return what a job's owner sees of it."""
    url = f"/v1/jobs/{job.id}"
    return {
        "id": job.id,
        "kind": job.work.kind,
        "state": job.state,
        "position": job.position,
        "step": job.step,
        "steps": job.steps,
        "seconds": job.seconds,
        "error": job.error,
        "images": [
            {"url": f"{url}/images/{n}", "width": image.width, "height": image.height, "settings": image.settings}
            for n, image in enumerate(job.images)
        ],
        "maps": [f"{url}/maps/{n}" for n, image in enumerate(job.images) if image.heatmaps is not None],
        "notes": job.notes,
    }
