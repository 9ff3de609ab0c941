"""Limits of the server: the most that one request, the queue and the memory of finished jobs may take."""

from dataclasses import dataclass

from gobelin.checkpoint import Model
from gobelin.errors import UsageError
from gobelin.settings import Settings

_LEAST_PIXELS = 2**18  # that a small model may paint: 512 × 512
_WORK_STEPS = 50  # of one image of the most pixels


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Options of a server: its address, the names of a proxy before it, its token, and the jobs that may wait."""

    host: str = "127.0.0.1"
    names: tuple[str, ...] = ()
    token: str | None = None
    queue: int = 64


@dataclass(frozen=True, kw_only=True)
class ServerLimits:
    """Limits of one request, and of what is kept.

    ``work`` bounds pixels × images × steps; ``batch_images`` and ``batch_pixels`` what the model paints at once;
    ``body`` and ``waiting_bytes`` the bytes of a request and of all that wait, ``input_pixels`` an image that is given;
    ``kept_jobs`` and ``kept_bytes`` finished jobs, of which the oldest are dropped.
    """

    pixels: int
    steps: int = 150
    count: int = 16
    prompt_characters: int = 4000
    queue: int = 64
    work: int
    batch_images: int = 16
    batch_pixels: int
    body: int = 32 * 2**20
    body_seconds: float = 30.0
    waiting_bytes: int = 256 * 2**20
    input_pixels: int = 2**24
    kept_jobs: int = 200
    kept_bytes: int = 512 * 2**20

    @classmethod
    def of(cls, model: Model, queue: int = 64) -> "ServerLimits":
        """Choose limits for a model: four times its own pixels, or 512 × 512 where that is more."""
        own = (model.unet.config.sample_size * model.vae.config.factor) ** 2
        pixels = max(4 * own, _LEAST_PIXELS)
        return cls(pixels=pixels, work=_WORK_STEPS * pixels, batch_pixels=pixels, queue=queue)

    def check(self, settings: Settings, size: tuple[int, int], images: int = 1) -> None:
        """Raise :class:`UsageError` for settings that would take too much at a size (height, width) in pixels;
        ``images`` are painted for each that is asked for."""
        height, width = size
        if height * width > self.pixels:
            raise UsageError(f"width × height is {width}×{height}: this server paints {self.pixels:,} pixels at most")
        assert settings.steps is not None
        work = height * width * settings.count * images * settings.steps
        if work > self.work:
            raise UsageError(
                f"steps × count × pixels is {work:,}: this server takes {self.work:,} at most in one request, so give "
                "fewer steps, images or pixels"
            )
