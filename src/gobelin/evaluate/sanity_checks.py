"""Sanity checks of the measurement: grade images whose scenes are known, and measure the VAE's loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image

from gobelin.evaluate.intervals import Share
from gobelin.evaluate.measurement_report import ReportTable, as_json
from gobelin.images import images_to_tensor, tensor_to_images
from gobelin.scenes import Sample, World, grade
from gobelin.scenes.calibration import add_pixel_noise, blur, category_samples, read_exactly
from gobelin.vae import VAE

_MIN_RENDERS, _MIN_ROUND_TRIPS = 0.995, 0.99  # shares that the grader has to read exactly before any score counts
_BLURS = (1.0, 2.0, 4.0)  # σ in pixels
_NOISES = (0.05, 0.1, 0.2)  # σ, where white is 1
_BATCH_SIZE = 50


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A condition that has to hold before scores count."""

    name: str
    measured: str
    required: str
    passed: bool


@dataclass(frozen=True, kw_only=True)
class SanityChecks:
    """Shares of known scenes that the grader reads exactly, as rendered, through the VAE, and spoiled.

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
        """The conditions that have to hold before scores count."""
        gates = []
        for name, shares, required in (
            ("true renders", self.renders, _MIN_RENDERS),
            ("VAE round trips", self.round_trips, _MIN_ROUND_TRIPS),
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
        """Convert to dicts, lists, strings and numbers; the gates too."""
        return as_json(self) | {"gates": as_json(self.gates)}


def run_sanity_checks(vae: VAE | None, world: World, each: int = 100) -> SanityChecks:
    """Grade true renders, VAE round trips, and renders with blur and noise, which must score less.

    ``each`` scenes of every category of the world are graded, and ``each`` in all for blur and noise.
    """
    by_turns = zip(*(category_samples(world, category, each) for category in world.categories), strict=True)
    samples = [sample for row in by_turns for sample in row]
    images = np.stack([sample.image for sample in samples])
    decoded = None if vae is None else np.stack([np.asarray(image) for image in vae_round_trip(vae, images)])
    return SanityChecks(
        renders=_by_category(samples, images, world),
        round_trips=None if decoded is None else _by_category(samples, decoded, world),
        psnr=None if decoded is None else psnr(images, decoded),
        blurred={
            f"{sigma:g} px": _exact_share(samples[:each], [blur(image, sigma) for image in images[:each]], world)
            for sigma in _BLURS
        },
        noisy={
            f"{sigma:g}": _exact_share(
                samples[:each], [add_pixel_noise(image, sigma) for image in images[:each]], world
            )
            for sigma in _NOISES
        },
    )


def gate_table(content: dict[str, Any]) -> ReportTable:
    """Lay out the gates of :class:`SanityChecks` from JSON."""
    rows = [
        (gate["name"], gate["measured"], gate["required"], "yes" if gate["passed"] else "NO")
        for gate in content["gates"]
    ]
    decibels = content["psnr"]
    return ReportTable(
        title="Sanity checks",
        columns=("gate: exact scenes among", "measured", "required", "holds"),
        rows=rows,
        note="" if decibels is None else f"VAE round trips keep {decibels:.1f} dB.",
    )


@torch.no_grad()
def vae_round_trip(vae: VAE, images: np.ndarray) -> list[Image.Image]:
    """Encode and decode uint8 images [N, H, W, 3]."""
    tensor = images_to_tensor(images).to(vae.device, vae.dtype)
    batches = [vae.latents_to_images(vae.images_to_latents(batch)) for batch in tensor.split(_BATCH_SIZE)]
    return tensor_to_images(torch.cat(batches))


def psnr(images: np.ndarray, others: np.ndarray) -> float:
    """Compute the peak signal-to-noise ratio of uint8 images [N, H, W, 3], in dB, averaged over images."""
    errors = np.square(images.astype(float) - others.astype(float)).mean(axis=(1, 2, 3))
    return float(np.mean(10 * np.log10(255**2 / np.maximum(errors, 1e-9))))


def _by_category(samples: Sequence[Sample], images: np.ndarray, world: World) -> dict[str, Share]:
    """Compute the share of images whose scene is read exactly, by category."""
    outcomes: dict[str, list[bool]] = {}
    for sample, image in zip(samples, images, strict=True):
        outcomes.setdefault(sample.category, []).append(read_exactly(sample, grade(image, world)))
    return {category: Share.of(found) for category, found in outcomes.items()}


def _exact_share(samples: Sequence[Sample], images: Sequence[np.ndarray], world: World) -> float:
    """Compute the share of images whose scene is read exactly."""
    outcomes = [read_exactly(sample, grade(image, world)) for sample, image in zip(samples, images, strict=True)]
    return Share.of(outcomes).value
