"""The state of the instruments: what the grader makes of pictures whose truth is known, and what the VAE loses."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import count, pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from gobelin.data import ScenePairs
from gobelin.evaluate.shares import Share
from gobelin.pipeline import to_pil
from gobelin.scenes import Prompt, Sample, World, grade, judge
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


def check_instruments(vae: VAE | None, world: World, each: int = 100, split: str = "dev") -> Instruments:
    """Grade true renders, VAE round trips, and renders blurred and drowned in noise (which must score less).

    ``each`` scenes of every category of the world are looked at, and as many in all for blur and noise.
    """
    samples = _samples(world, each, split)
    images = np.stack([sample.image for sample in samples])
    decoded = None if vae is None else np.stack([np.asarray(image) for image in round_trip(vae, images)])
    some = slice(None, None, len(samples) // each)  # all categories alike
    rng = np.random.default_rng(0)
    blurred = {
        f"{sigma:g} px": ndimage.gaussian_filter(images[some].astype(float), (0, sigma, sigma, 0)) for sigma in BLURS
    }
    noisy = {f"{sigma:g}": images[some] + rng.normal(0, 255 * sigma, images[some].shape) for sigma in NOISES}
    return Instruments(
        renders=_by_category(samples, images, world),
        round_trips=None if decoded is None else _by_category(samples, decoded, world),
        psnr=None if decoded is None else psnr(images, decoded),
        blurred={name: _right(samples[some], _pixels(values), world) for name, values in blurred.items()},
        noisy={name: _right(samples[some], _pixels(values), world) for name, values in noisy.items()},
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


def _samples(world: World, each: int, split: str) -> list[Sample]:
    """The first scenes of every category, so many of each, the categories by turns."""
    pairs = ScenePairs(world=world, count=1, split=split)
    found: dict[str, list[Sample]] = {category: [] for category, weight in world.mix if weight > 0}
    for index in count():
        if all(len(samples) == each for samples in found.values()):
            break
        sample = pairs.sample(index)
        if len(found[sample.category]) < each:
            found[sample.category].append(sample)
    return [sample for row in zip(*found.values(), strict=True) for sample in row]


def _by_category(samples: Sequence[Sample], pictures: np.ndarray, world: World) -> dict[str, Share]:
    outcomes: dict[str, list[bool]] = {}
    for sample, picture in zip(samples, pictures, strict=True):
        outcomes.setdefault(sample.category, []).append(_finds(sample, picture, world))
    return {category: Share.of(found) for category, found in outcomes.items()}


def _right(samples: Sequence[Sample], pictures: np.ndarray, world: World) -> float:
    return Share.of([_finds(sample, picture, world) for sample, picture in zip(samples, pictures, strict=True)]).value


def _finds(sample: Sample, picture: np.ndarray, world: World) -> bool:
    """Whether the grader sees exactly the scene's objects, and its relation where it has one."""
    scene = sample.scene
    wanted = tuple((thing.shape, thing.colour) for thing in scene.objects)
    prompt = Prompt(text=sample.caption, task="truth", objects=wanted, relation=scene.relation)
    return judge(prompt, grade(picture, world)).exact


def _pixels(values: np.ndarray) -> np.ndarray:
    return values.round().clip(0, 255).astype(np.uint8)
