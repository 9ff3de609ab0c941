"""Caption validation: the U-Net's loss with an image's own caption, a wrong one and none, under the same noise.

A right caption that lowers the loss below a wrong one's is heard; below none's alone, the text is merely used. No image
is generated, so it takes the time of a few training steps.
"""

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from scipy.special import stdtrit
from torch import Generator, Tensor

from gobelin.errors import DataError, TrainingError, UsageError
from gobelin.schedule import NoiseSchedule
from gobelin.training.config import Precision
from gobelin.training.precision import autocast
from gobelin.types import Latents, TextEmbeddings

Against = Literal["empty", "wrong"]


@dataclass(frozen=True, kw_only=True)
class Gain:
    """The share by which the right caption lowers a loss, with its interval; negative where it raises it."""

    value: float
    low: float
    high: float

    @property
    def margin(self) -> float:
        """Half of the interval."""
        return (self.high - self.low) / 2

    def __str__(self) -> str:
        return f"{percent(self.value)} [{100 * self.low:.1f} to {100 * self.high:.1f}]".replace("-", "−")


@dataclass(frozen=True, kw_only=True)
class CaptionLosses:
    """The mean squared error of ``count`` images' predictions in bins of timesteps, for three captions of each.

    ``bins`` are (first, last) timesteps, from clean to noise; ``right``, ``wrong`` and ``empty`` have a mean for each.
    ``empty_gain_error`` and ``wrong_gain_error`` are standard errors of :func:`caption_gain`, paired by image.
    """

    bins: tuple[tuple[int, int], ...]
    right: tuple[float, ...]
    wrong: tuple[float, ...]
    empty: tuple[float, ...]
    empty_gain_error: tuple[float, ...]
    wrong_gain_error: tuple[float, ...]
    count: int

    def as_record(self) -> dict[str, Any]:
        """Convert to what JSON holds: lists and numbers, None for what is not finite."""
        record: dict[str, Any] = {"bins": [list(one) for one in self.bins], "count": self.count}
        for name in _MEANS:
            record[name] = [value if math.isfinite(value) else None for value in getattr(self, name)]
        return record

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "CaptionLosses":
        """Read what :meth:`as_record` wrote, other entries beside it ignored.

        Raises :class:`TrainingError` for anything else.
        """
        try:
            means = {
                name: tuple(math.nan if value is None else float(value) for value in record[name]) for name in _MEANS
            }
            bins = tuple((int(first), int(last)) for first, last in record["bins"])
            count = int(record["count"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise TrainingError(
                f"a record of caption losses has a damaged or missing entry ({error!r}): expected bins, count, "
                f"{', '.join(_MEANS)}; leave that line out"
            ) from error
        lengths = {len(values) for values in means.values()}
        if not bins or lengths != {len(bins)}:
            raise TrainingError(
                f"a record of caption losses has {len(bins)} bins and lists of {sorted(lengths)} numbers: expected one "
                "a bin; leave that line out"
            )
        return cls(bins=bins, count=count, **means)

    @property
    def finite(self) -> bool:
        """Tell whether every mean is a number: those of a run that diverged are not."""
        return all(math.isfinite(value) for values in (self.right, self.wrong, self.empty) for value in values)


_MEANS = tuple(field.name for field in fields(CaptionLosses) if field.name not in ("bins", "count"))


def wrong_captions(captions: Sequence[str], seed: int = 0) -> list[tuple[int, int]]:
    """Choose for each image another one whose caption is wrong for it: (image, that other image), by image.

    Captions that differ only in letter case and spaces are the same, as they are to a tokenizer. Every caption is wrong
    for at most one image. Where more than half of the images share a caption, no such choice has room for all of them,
    and those too many are left out. Raises :class:`DataError` where no two captions differ.
    """
    groups: dict[str, list[int]] = {}
    for image, caption in enumerate(captions):
        groups.setdefault(" ".join(caption.lower().split()), []).append(image)
    rest = len(captions) - max(map(len, groups.values()), default=0)
    if not rest:
        raise DataError(f"of {len(captions)} captions no two differ: give images with other captions to compare with")
    texts = sorted(groups)
    random.Random(seed).shuffle(texts)  # sorted ones would meet their likes: "a red circle" and "a red circle above…"
    ring = [image for text in texts for image in groups[text][:rest]]
    # In a ring in which equal captions are neighbours, a turn by the longest run of them leaves none in its run.
    turn = max(min(len(images), rest) for images in groups.values())
    return sorted((image, ring[(place + turn) % len(ring)]) for place, image in enumerate(ring))


@torch.no_grad()
def caption_losses(
    unet: Callable[[Tensor, Tensor, Tensor], Tensor],
    schedule: NoiseSchedule,
    latents: Latents,
    right: TextEmbeddings,
    wrong: TextEmbeddings,
    empty: TextEmbeddings,
    *,
    seed: int,
    device: torch.device,
    bins: int = 4,
    batch_size: int = 32,
    precision: Precision = "float32",
) -> CaptionLosses:
    """Measure losses of scaled latents [n, c, h, w] with three text embeddings [n, L, D] of each, in bins of timesteps.

    Each image is seen once in every bin, at a timestep of its own, spread evenly over the bin. Noise and timesteps
    follow from ``seed`` and the shape alone: they are the same for the three captions and in every call, so that
    differences between captions, and between steps of a run, are not the noise's. ``unet`` predicts what the schedule
    says from (noisy latents, timesteps, text embeddings) on ``device``.

    Raises :class:`DataError` for fewer than two images, and :class:`UsageError` for more bins than timesteps.
    """
    count, steps = len(latents), schedule.config.num_train_timesteps
    if count < 2:
        raise DataError(f"{count} captioned images to validate on: give 2 or more, for a standard error")
    if not 1 <= bins <= steps:
        raise UsageError(f"bins is {bins}: give 1 to {steps}, the number of timesteps")
    edges = [steps * number // bins for number in range(bins + 1)]
    ranges = tuple((first, after - 1) for first, after in itertools.pairwise(edges))
    generator = Generator().manual_seed(seed)
    latents = latents.float().cpu()
    errors = []
    for first, last in ranges:
        timesteps = _stratified(first, last, count, generator)
        noise = torch.randn(latents.shape, generator=generator)
        noisy_latents = schedule.add_noise(latents, noise, timesteps)
        target = schedule.target(latents, noise, timesteps)
        with autocast(device, precision):
            predicted = [
                _predict(unet, noisy_latents, timesteps, text, device, batch_size) for text in (right, wrong, empty)
            ]
        errors.append(torch.stack([(one - target).square().mean(dim=(1, 2, 3)) for one in predicted]))
    return _summary(torch.stack(errors, dim=1).double(), ranges)


def caption_gain(losses: CaptionLosses, against: Against, confidence: float = 0.95) -> list[Gain]:
    """Compute by which share of the loss the right caption is better than none ("empty") or a wrong one, by bin.

    The interval is that of a ratio of means of paired values, to first order, with Student's quantile.
    """
    others, errors = getattr(losses, against), getattr(losses, f"{against}_gain_error")
    quantile = float(stdtrit(losses.count - 1, (1 + confidence) / 2)) if losses.count > 1 else math.inf
    gains = []
    for right, other, error in zip(losses.right, others, errors, strict=True):
        value = 1 - right / other if other else 0.0  # no loss at all leaves nothing to gain
        margin = quantile * error
        gains.append(Gain(value=value, low=value - margin, high=value + margin))
    return gains


def percent(share: float) -> str:
    """Write a share in percent: with a decimal below 10 %, where it counts."""
    digits = 0 if abs(share) >= 0.0995 else 1
    return f"{100 * share:.{digits}f} %".replace("-", "−")


def noise_level(bins: Sequence[tuple[int, int]], number: int) -> str:
    """Name a bin of timesteps: low, middle or high noise, and its timesteps."""
    first, last = bins[number]
    level = "all" if len(bins) == 1 else "low" if not number else "high" if number == len(bins) - 1 else "middle"
    return f"{level} noise (timesteps {first}–{last})"


def _stratified(first: int, last: int, count: int, generator: Generator) -> Int[Tensor, " count"]:
    """Draw a timestep from each of ``count`` equal parts of first … last, in random order."""
    even = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    return (first + even * (last + 1 - first)).long().clamp(max=last)


def _predict(
    unet: Callable[[Tensor, Tensor, Tensor], Tensor],
    noisy_latents: Latents,
    timesteps: Int[Tensor, " batch"],
    text_embeddings: TextEmbeddings,
    device: torch.device,
    batch_size: int,
) -> Latents:
    """Predict batch by batch, in float32 on the CPU."""
    parts = zip(*(each.split(batch_size) for each in (noisy_latents, timesteps, text_embeddings)), strict=True)
    return torch.cat([unet(*(each.to(device) for each in part)).float().cpu() for part in parts])


def _summary(errors: Float[Tensor, "3 bins images"], bins: tuple[tuple[int, int], ...]) -> CaptionLosses:
    """Average squared errors of the right, wrong and empty captions over images."""
    right, wrong, empty = errors

    def gain_error(other: Tensor) -> tuple[float, ...]:
        """Compute the standard error of 1 − mean(right) / mean(other), a ratio of paired means, to first order."""
        ratio = right.mean(dim=1) / other.mean(dim=1)
        spread = (right - ratio[:, None] * other).std(dim=1) / other.mean(dim=1)
        return tuple((spread / right.shape[1] ** 0.5).nan_to_num(0.0).tolist())

    def means(values: Tensor) -> tuple[float, ...]:
        return tuple(values.mean(dim=1).tolist())

    return CaptionLosses(
        bins=bins,
        right=means(right),
        wrong=means(wrong),
        empty=means(empty),
        empty_gain_error=gain_error(empty),
        wrong_gain_error=gain_error(wrong),
        count=right.shape[1],
    )
