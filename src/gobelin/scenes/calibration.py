"""How far the grader can be trusted: what it says of pictures whose truth is known.

Its gates: of true renders 99.5 % or more are read exactly in every category, and 99 % or more of the pictures that
came out of a VAE; blobs are no shapes; swapped attributes score nothing, and shuffled captions what is due by
chance; and scores fall steadily as pictures get worse.
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
from gobelin.scenes.grader import UNKNOWN, Seen, grade
from gobelin.scenes.prompt_lists import Prompt
from gobelin.scenes.relations import found_in
from gobelin.scenes.sampling import Sample, sample
from gobelin.scenes.scoring import judge, swapped
from gobelin.scenes.world import World

Image = NDArray[np.uint8]

_SEED = 97
# What stands in for a VAE's round trip: worse than a good one.
_BLUR, _NOISE = 0.7, 0.02
_BLURS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)  # pixels
_NOISES = (0.0, 0.02, 0.04, 0.06, 0.1, 0.15)  # where white is 1


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What the grader says; all are shares in [0, 1].

    By category, of ``count`` scenes each: ``renders``, ``blurred`` (by 0.7 pixels), ``noisy`` (by 0.02, where
    white is 1) and ``round_trips`` (empty without a VAE) are the pictures that are read exactly; ``swapped`` those
    that are right for their prompt with its parts exchanged, of two objects or more. ``blur_ladder`` and
    ``noise_ladder``: pictures read exactly, by amount. ``blobs``: those called a shape, by kind. ``shuffled``:
    pictures right for another's caption, and ``chance``: how many are, by the scenes themselves. ``milliseconds``
    is the time to grade a picture.
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
    through: Callable[[Image], Image] | None = None,
    advance: Callable[[str], None] = lambda part: None,
) -> Calibration:
    """Measure the grader on ``count`` scenes of each category, half of them held-out ones.

    ``through`` is an image's round trip through a VAE: uint8 [size, size, 3] in, the same out. The ladders are of
    a fifth as many scenes, of all categories. ``advance`` hears what comes next.
    """
    scenes = {category: examples(world, category, count) for category in world.categories}
    advance("renders")
    started = time.perf_counter()
    seen = {category: [grade(one.image, world) for one in some] for category, some in scenes.items()}
    milliseconds = 1000 * (time.perf_counter() - started) / (count * len(scenes))

    def read(spoil: Callable[[Image], Image]) -> dict[str, float]:
        return {
            category: _share([reads(one, grade(spoil(one.image), world)) for one in some])
            for category, some in scenes.items()
        }

    renders = {
        category: _share([reads(*both) for both in zip(some, seen[category], strict=True)])
        for category, some in scenes.items()
    }
    advance("blur and noise")
    blurred, noisy = read(lambda image: blur(image, _BLUR)), read(lambda image: drown(image, _NOISE))
    advance("ladders")
    some = [one for row in zip(*scenes.values(), strict=True) for one in row][: max(count // 5, 1)]
    blur_ladder = {
        f"{sigma:g}": _share([reads(s, grade(blur(s.image, sigma), world)) for s in some]) for sigma in _BLURS
    }
    noise_ladder = {
        f"{sigma:g}": _share([reads(s, grade(drown(s.image, sigma), world)) for s in some]) for sigma in _NOISES
    }
    advance("round trips")
    round_trips = read(through) if through else {}
    advance("blobs")
    blobs = {kind: _share([_a_shape(world, kind, number) for number in range(count)]) for kind in BLOBS}
    advance("captions")
    return Calibration(
        world=world.name,
        count=count,
        renders=renders,
        blurred=blurred,
        noisy=noisy,
        round_trips=round_trips,
        swapped=_swapped(scenes, seen),
        blur_ladder=blur_ladder,
        noise_ladder=noise_ladder,
        blobs=blobs,
        **_shuffled(scenes, seen),
        milliseconds=milliseconds,
    )


def examples(world: World, category: str, count: int) -> list[Sample]:
    """Scenes of one category, the same each time, held-out ones by turns."""
    alone = replace(world, mix=((category, 1.0),))
    return [sample(_SEED, index, alone, ("test", "heldout")[index % 2]) for index in range(count)]


def truth(sample: Sample) -> Prompt:
    """The prompt that asks for all that is in a scene, as far as its world has words for it."""
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


def reads(sample: Sample, seen: Sequence[Seen]) -> bool:
    """Whether a sample's scene was read exactly: its objects, their relation, and nothing else.

    And its background, where captions name that.
    """
    grounds = {thing.background for thing in seen} <= {sample.scene.background}
    return judge(truth(sample), seen).exact and (grounds or not sample.world.grounded)


def blur(image: Image, sigma: float) -> Image:
    """An image [H, W, 3] after a Gaussian blur of so many pixels."""
    return _pixels(ndimage.gaussian_filter(image.astype(np.float32), (sigma, sigma, 0)))


def drown(image: Image, sigma: float) -> Image:
    """An image [H, W, 3] in normal noise, where white is 1; always the same for an image."""
    noise = np.random.default_rng(crc32(image.tobytes())).standard_normal(image.shape)
    return _pixels(image + 255 * sigma * noise)


def _a_shape(world: World, kind: str, number: int) -> bool:
    """Whether the grader takes a blob for a shape."""
    seen = grade(blob(np.random.default_rng((_SEED, number)), world, kind), world)
    return len(seen) == 1 and seen[0].shape != UNKNOWN


def _swapped(scenes: dict[str, list[Sample]], seen: dict[str, list[list[Seen]]]) -> dict[str, float]:
    """The share of pictures that are right for the prompt with its parts exchanged."""
    shares = {}
    for category, some in scenes.items():
        asked = [swapped(truth(one)) for one in some]
        right = [judge(prompt, found).correct for prompt, found in zip(asked, seen[category], strict=True) if prompt]
        if right:
            shares[category] = _share(right)
    return shares


def _shuffled(scenes: dict[str, list[Sample]], seen: dict[str, list[list[Seen]]]) -> dict[str, float]:
    """The share of pictures that are right for another's caption, as the grader has it and as it is."""
    everything = [
        (one, found) for category, some in scenes.items() for one, found in zip(some, seen[category], strict=True)
    ]
    ring = [everything[at] for at in np.random.default_rng(0).permutation(len(everything))]
    shuffled, chance = [], []
    for at, (one, found) in enumerate(ring):
        said = ring[at - 1][0].phrasing
        shuffled.append(found_in(said.wanted, said.relation, found, count=said.count))
        chance.append(found_in(said.wanted, said.relation, one.scene.objects, count=said.count))
    return {"shuffled": _share(shuffled), "chance": _share(chance)}


def _share(outcomes: Sequence[bool]) -> float:
    return sum(outcomes) / len(outcomes) if outcomes else math.nan


def _pixels(levels: NDArray[np.floating]) -> Image:
    return np.clip(np.rint(levels), 0, 255).astype(np.uint8)
