"""Grader calibration: measure how far the grader can be trusted, on images whose scenes are known.

Its gates: 99.5 % or more of true renders are read exactly in every category, and 99 % or more of the images that
came out of a VAE; blobs are no shapes; swapped attributes score nothing, and shuffled captions score at chance;
scores fall steadily as images get worse.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from gobelin.scenes.blobs import BLOBS, blob
from gobelin.scenes.grader import UNKNOWN, Detection, grade
from gobelin.scenes.prompt_lists import Prompt
from gobelin.scenes.relations import found_in
from gobelin.scenes.sampling import Sample, sample
from gobelin.scenes.scoring import score, swapped
from gobelin.scenes.world import World

_Image = NDArray[np.uint8]

_SEED = 97
# Stand-ins for a VAE's round trip, worse than a good one: σ of the blur in pixels, and of the noise where white is 1.
_BLUR, _NOISE = 0.7, 0.02
_BLURS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)  # pixels
_NOISES = (0.0, 0.02, 0.04, 0.06, 0.1, 0.15)  # where white is 1


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The grader's results; all but ``milliseconds`` are shares in [0, 1].

    By category, for ``count`` scenes each: ``renders``, ``blurred`` (by 0.7 pixels), ``noisy`` (by 0.02, where
    white is 1) and ``round_trips`` (empty without a VAE) are the images that are read exactly; ``swapped`` those
    that are right for their prompt with its parts exchanged. ``blur_ladder`` and ``noise_ladder``: images read
    exactly, by amount. ``blobs``: blobs called a shape, by kind. ``shuffled``: images right for another image's
    caption by the grader, and ``chance``: by the scenes themselves. ``milliseconds`` is the time to grade an image.
    """

    world: str
    count: int
    renders: dict[str, float]
    blurred: dict[str, float]
    noisy: dict[str, float]
    round_trips: dict[str, float]
    swapped: dict[str, float]
    blur_ladder: dict[str, float]
    noise_ladder: dict[str, float]
    blobs: dict[str, float]
    shuffled: float
    chance: float
    milliseconds: float


def calibrate(
    world: World,
    count: int = 1000,
    through: Callable[[_Image], _Image] | None = None,
    advance: Callable[[str], None] = lambda part: None,
) -> Calibration:
    """Calibrate the grader on ``count`` scenes of each category, half of them held-out ones.

    ``through`` sends an image through a VAE and back: uint8 [size, size, 3] in, the same out. The ladders take a
    fifth as many scenes, from all categories. ``advance`` is called with the name of each part as it begins.
    """
    scenes = {category: category_samples(world, category, count) for category in world.categories}
    advance("renders")
    started = time.perf_counter()
    detected = {category: [grade(one.image, world) for one in some] for category, some in scenes.items()}
    milliseconds = 1000 * (time.perf_counter() - started) / (count * len(scenes))

    def read(spoil: Callable[[_Image], _Image]) -> dict[str, float]:
        return {
            category: _mean_outcome([read_exactly(one, grade(spoil(one.image), world)) for one in some])
            for category, some in scenes.items()
        }

    renders = {
        category: _mean_outcome([read_exactly(*both) for both in zip(some, detected[category], strict=True)])
        for category, some in scenes.items()
    }
    advance("blur and noise")
    blurred, noisy = read(lambda image: blur(image, _BLUR)), read(lambda image: add_pixel_noise(image, _NOISE))
    advance("ladders")
    some = [one for row in zip(*scenes.values(), strict=True) for one in row][: max(count // 5, 1)]
    blur_ladder = {
        f"{sigma:g}": _mean_outcome([read_exactly(s, grade(blur(s.image, sigma), world)) for s in some])
        for sigma in _BLURS
    }
    noise_ladder = {
        f"{sigma:g}": _mean_outcome([read_exactly(s, grade(add_pixel_noise(s.image, sigma), world)) for s in some])
        for sigma in _NOISES
    }
    advance("round trips")
    round_trips = read(through) if through else {}
    advance("blobs")
    blobs = {kind: _mean_outcome([_looks_like_shape(world, kind, number) for number in range(count)]) for kind in BLOBS}
    advance("captions")
    return Calibration(
        world=world.name,
        count=count,
        renders=renders,
        blurred=blurred,
        noisy=noisy,
        round_trips=round_trips,
        swapped=_swapped(scenes, detected),
        blur_ladder=blur_ladder,
        noise_ladder=noise_ladder,
        blobs=blobs,
        **_shuffled(scenes, detected),
        milliseconds=milliseconds,
    )


def category_samples(world: World, category: str, count: int) -> list[Sample]:
    """Draw ``count`` scenes of one category, the same each time, every second one held out."""
    alone = replace(world, mix=((category, 1.0),))
    return [sample(_SEED, index, alone, ("test", "heldout")[index % 2]) for index in range(count)]


def exact_prompt(sample: Sample) -> Prompt:
    """Build the prompt that asks for everything in a scene, as far as its world has words for it."""
    scene, plain = sample.scene, sample.world.textures == ("solid",) and not sample.world.sizes
    return Prompt(
        text=sample.caption,
        task=sample.category,
        objects=tuple(
            (thing.shape, thing.colour) if plain else (thing.shape, thing.colour, thing.texture, thing.size)
            for thing in scene.objects
        ),
        relation=scene.relation,
        count=len(scene.objects) if sample.category == "count" else None,
    )


def read_exactly(sample: Sample, detected: Sequence[Detection]) -> bool:
    """Return True where a sample's scene was read exactly: its objects, their relation, and nothing else.

    In worlds whose captions name the background, that too.
    """
    grounds = {thing.background for thing in detected} <= {sample.scene.background}
    return score(exact_prompt(sample), detected).exact and (grounds or not sample.world.grounded)


def blur(image: _Image, sigma: float) -> _Image:
    """Blur an image [H, W, 3] by a Gaussian of ``sigma`` pixels."""
    return _to_uint8(ndimage.gaussian_filter(image.astype(np.float32), (sigma, sigma, 0)))


def add_pixel_noise(image: _Image, sigma: float) -> _Image:
    """Add normal noise of standard deviation ``sigma``, where white is 1, to an image [H, W, 3]; the same each time."""
    noise = np.random.default_rng(crc32(image.tobytes())).standard_normal(image.shape)
    return _to_uint8(image + 255 * sigma * noise)


def _looks_like_shape(world: World, kind: str, number: int) -> bool:
    """Return True where the grader takes a blob for a shape."""
    detected = grade(blob(np.random.default_rng((_SEED, number)), world, kind), world)
    return len(detected) == 1 and detected[0].shape != UNKNOWN


def _swapped(scenes: dict[str, list[Sample]], detected: dict[str, list[list[Detection]]]) -> dict[str, float]:
    """Compute the share of images that are right for their prompt with its parts exchanged, by category."""
    shares = {}
    for category, some in scenes.items():
        asked = [swapped(exact_prompt(one)) for one in some]
        right = [
            score(prompt, found).correct for prompt, found in zip(asked, detected[category], strict=True) if prompt
        ]
        if right:
            shares[category] = _mean_outcome(right)
    return shares


def _shuffled(scenes: dict[str, list[Sample]], detected: dict[str, list[list[Detection]]]) -> dict[str, float]:
    """Compute the share of images that are right for another's caption, by the grader and by the scenes themselves."""
    everything = [
        (one, found) for category, some in scenes.items() for one, found in zip(some, detected[category], strict=True)
    ]
    ring = [everything[at] for at in np.random.default_rng(0).permutation(len(everything))]
    shuffled, chance = [], []
    for at, (one, found) in enumerate(ring):
        said = ring[at - 1][0].phrasing
        shuffled.append(found_in(said.wanted, said.relation, found, count=said.count))
        chance.append(found_in(said.wanted, said.relation, one.scene.objects, count=said.count))
    return {"shuffled": _mean_outcome(shuffled), "chance": _mean_outcome(chance)}


def _mean_outcome(outcomes: Sequence[bool]) -> float:
    """Compute the share of True; NaN without outcomes."""
    return sum(outcomes) / len(outcomes) if outcomes else math.nan


def _to_uint8(levels: NDArray[np.floating]) -> _Image:
    """Round levels and clip them to [0, 255]."""
    return np.clip(np.rint(levels), 0, 255).astype(np.uint8)
