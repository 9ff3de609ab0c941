"""The state of the instruments: what the grader makes of pictures whose truth is known, and what the VAE loses."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image

from gobelin.evaluate.intervals import Share
from gobelin.pipeline import to_pil
from gobelin.scenes import Sample, World, grade
from gobelin.scenes.calibration import blur, drown, examples, reads
from gobelin.vae import VAE

RENDERS, ROUND_TRIPS = 0.995, 0.99  # what the grader has to find before any score counts
BLURS = (1.0, 2.0, 4.0)  # σ in pixels
NOISES = (0.05, 0.1, 0.2)  # σ, where white is 1
BATCH = 50


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One thing that has to hold before scores count."""

    name: str
    measured: str
    required: str
    passed: bool


@dataclass(frozen=True, kw_only=True)
class Instruments:
    """The grader's own score, and the VAE's, on scenes whose truth is known: all objects, and nothing else, found.

    ``renders`` and ``round_trips`` are by category of scene, the latter, like ``psnr`` (in dB, the mean over
    images), None without a VAE. ``blurred`` and ``noisy`` are by amount, rising.
    """

    renders: dict[str, Share]
    round_trips: dict[str, Share] | None
    psnr: float | None
    blurred: dict[str, float]
    noisy: dict[str, float]

    @property
    def gates(self) -> list[Gate]:
        """What has to hold before scores count."""
        gates = []
        for name, shares, required in (
            ("true renders", self.renders, RENDERS),
            ("VAE round trips", self.round_trips, ROUND_TRIPS),
        ):
            for category, share in (shares or {}).items():
                gates.append(
                    Gate(
                        name=f"{name}: {category}",
                        measured=str(share),
                        required=f"≥ {required:g}",
                        passed=share.value >= required,
                    )
                )
        for name, values in (("renders blurred by", self.blurred), ("renders with noise of", self.noisy)):
            gates.append(
                Gate(
                    name=f"{name} {', '.join(values)}",
                    measured=", ".join(f"{value:.3f}" for value in values.values()),
                    required="falling",
                    passed=all(one >= other for one, other in pairwise(values.values())),
                )
            )
        return gates

    def to_json(self) -> dict[str, Any]:
        """Dicts, lists, strings and numbers; the gates too."""
        return {**asdict(self), "gates": [asdict(gate) for gate in self.gates]}


def check_instruments(vae: VAE | None, world: World, each: int = 100) -> Instruments:
    """Grade true renders, VAE round trips, and renders blurred and drowned in noise (which must score less).

    ``each`` scenes of every category of the world are looked at, and as many in all for blur and noise.
    """
    by_turns = zip(*(examples(world, category, each) for category in world.categories), strict=True)
    samples = [sample for row in by_turns for sample in row]
    images = np.stack([sample.image for sample in samples])
    decoded = None if vae is None else np.stack([np.asarray(image) for image in round_trip(vae, images)])
    return Instruments(
        renders=_by_category(samples, images, world),
        round_trips=None if decoded is None else _by_category(samples, decoded, world),
        psnr=None if decoded is None else psnr(images, decoded),
        blurred={
            f"{sigma:g} px": _right(samples[:each], [blur(image, sigma) for image in images[:each]], world)
            for sigma in BLURS
        },
        noisy={
            f"{sigma:g}": _right(samples[:each], [drown(image, sigma) for image in images[:each]], world)
            for sigma in NOISES
        },
    )


@torch.no_grad()
def round_trip(vae: VAE, images: np.ndarray) -> list[Image.Image]:
    """uint8 images [N, H, W, 3] through the VAE and back."""
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).to(vae.device, vae.dtype) / 127.5 - 1
    batches = [vae.latents_to_images(vae.images_to_latents(batch)) for batch in tensor.split(BATCH)]
    return to_pil(torch.cat(batches))


def psnr(images: np.ndarray, others: np.ndarray) -> float:
    """Peak signal to noise ratio of uint8 images [N, H, W, 3], in dB, averaged over images."""
    errors = np.square(images.astype(float) - others.astype(float)).mean(axis=(1, 2, 3))
    return float(np.mean(10 * np.log10(255**2 / np.maximum(errors, 1e-9))))


def _by_category(samples: Sequence[Sample], pictures: np.ndarray, world: World) -> dict[str, Share]:
    outcomes: dict[str, list[bool]] = {}
    for sample, picture in zip(samples, pictures, strict=True):
        outcomes.setdefault(sample.category, []).append(reads(sample, grade(picture, world)))
    return {category: Share.of(found) for category, found in outcomes.items()}


def _right(samples: Sequence[Sample], pictures: Sequence[np.ndarray], world: World) -> float:
    outcomes = [reads(sample, grade(picture, world)) for sample, picture in zip(samples, pictures, strict=True)]
    return Share.of(outcomes).value
