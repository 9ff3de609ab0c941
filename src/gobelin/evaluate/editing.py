"""Editing: change one colour word of a caption, and measure whether its object changes and nothing else.

Captions of the test list whose image the grader finds right get another colour word. Afterwards the image should
answer to the new caption, every object should keep its place and shape, and the pixels outside the changed object
should stay. Three methods are compared: an edit by its defaults, prompt-to-prompt alone, and generating anew.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from gobelin.errors import UsageError
from gobelin.evaluate.attribution import found_masks
from gobelin.evaluate.intervals import Mean, Share
from gobelin.evaluate.measurement_report import Report, ReportTable, as_json, mean_cell, share_cell
from gobelin.pipeline import Pipeline
from gobelin.scenes import Detection, Sample, World, grade, sample
from gobelin.scenes.captions import Mention, Phrasing
from gobelin.scenes.relations import Wanted, answers

EDITING_SEED = 78  # of the scenes, apart from training's and attribution's
TRIES_PER_EDIT = 16  # captions tried for each edit that is wanted
_BATCH_SIZE = 16
_SAME_PLACE = 0.5  # intersection over union with an object's former mask
_RIM = 4  # pixels around the changed object that may change: one latent pixel of the models of these scenes
_MOVED = 16  # levels of 255: far above the pixels' noise, whose σ is 1 to 3 levels
_MOST_OUTSIDE = 0.05  # share of the pixels outside that may move
_ALONE: dict[str, Any] = {
    "method": "prompt_to_prompt",
    "self_replace": 0.4,
    "edit_guidance": 0.0,
    "local_blend": (),
}
METHODS: dict[str, dict[str, Any]] = {
    "edit": {},
    "prompt-to-prompt alone": _ALONE,
    "painted anew": {**_ALONE, "cross_replace": 0.0, "self_replace": 0.0},
}
"""Options of :meth:`gobelin.pipeline.Pipeline.edit`; all begin with the noise of the first image."""


@dataclass(frozen=True, kw_only=True)
class Recolouring:
    """A caption, and the same with another colour at the ``mention`` of that number."""

    before: Phrasing
    after: Phrasing
    mention: int


@dataclass(frozen=True, kw_only=True)
class MethodScore:
    """The outcomes of one method's edits.

    ``answers``: the image shows what the new caption asks for. ``keeps``: every object keeps its place and shape.
    ``both``: both of these. ``outside`` is the mean of :func:`moved_outside`, and ``outside_kept`` the share of edits
    where that is .05 or less. ``all``: both, and outside kept.
    """

    answers: Share
    keeps: Share
    both: Share
    outside: Mean
    outside_kept: Share
    all: Share


@dataclass(frozen=True, kw_only=True)
class Editing:
    """Edits of one model's images, by method."""

    model: str
    world: str
    edits: int
    methods: dict[str, MethodScore]

    def to_json(self) -> dict[str, Any]:
        """Convert to dicts, lists, strings and numbers."""
        return as_json(self)


@dataclass(frozen=True, kw_only=True)
class _RightImage:
    """An image with this ``seed`` that is right for its caption, and the grader's detections in it."""

    change: Recolouring
    seed: int
    image: Image.Image
    detections: list[Detection]


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """The outcome of one edit; ``outside`` is its :func:`moved_outside`."""

    answers: bool
    keeps: bool
    outside: float


def measure_editing(
    pipeline: Pipeline, world: World, count: int, advance: Callable[[], None] = lambda: None
) -> Editing:
    """Edit the images of the first ``count`` captions that are right, or as many as there are, by every method.

    ``advance`` is called after each edited caption. Raises :class:`UsageError` where no caption's image is right.
    """
    outcomes: dict[str, list[_Outcome]] = {name: [] for name in METHODS}
    for right in _right_images(pipeline, world, count):
        before, after = right.change.before, right.change.after
        for name, options in METHODS.items():
            image = pipeline.edit(before.text, after.text, seed=right.seed, **options).images[1]
            outcomes[name].append(_outcome(right, image, world))
        advance()
    edits = len(next(iter(outcomes.values())))
    if not edits:
        raise UsageError(
            f"none of {TRIES_PER_EDIT * count:,} captions has a right image by this model: there is nothing to edit"
        )
    return Editing(
        model=pipeline.name,
        world=world.name,
        edits=edits,
        methods={name: _method_score(found) for name, found in outcomes.items()},
    )


def recoloured(each: Sample, world: World, seed: int) -> Recolouring | None:
    """Change one colour word of a caption to one that no object has; None where it names none, or none is left."""
    rng = np.random.default_rng(seed)
    phrasing = each.phrasing
    coloured = [number for number, mention in enumerate(phrasing.mentions) if mention.colour]
    if not coloured:
        return None
    number = int(rng.choice(coloured))
    mention = phrasing.mentions[number]
    shape = each.scene.objects[mention.things[0]].shape
    there = {thing.colour for thing in each.scene.objects}
    free = [one for one in world.colours if one not in there and (shape, one) not in world.held_out_pairs]
    if not free:
        return None
    mentions = list(phrasing.mentions)
    mentions[number] = replace(mention, colour=str(rng.choice(free)))
    return Recolouring(before=phrasing, after=replace(phrasing, mentions=tuple(mentions)), mention=number)


def keeps_objects(changed: Wanted, before: Sequence[Detection], after: Sequence[Detection]) -> bool:
    """Return True where every object keeps its place, its shape and, unless it answers to ``changed``, its colour."""

    def still(thing: Detection) -> bool:
        return any(
            thing.shape == other.shape
            and (thing.colour == other.colour or answers(changed, thing))
            and (thing.mask & other.mask).sum() >= _SAME_PLACE * (thing.mask | other.mask).sum()
            for other in after
        )

    return len(before) == len(after) and all(map(still, before))


def moved_outside(
    before: NDArray[np.uint8], after: NDArray[np.uint8], mask_before: NDArray[np.bool_], mask_after: NDArray[np.bool_]
) -> float:
    """Compute the share of pixels outside the changed object that moved, in [0, 1]; 0 where nothing is outside.

    Images are [H, W, 3] in [0, 255]. The masks [H, W] are those of the object before and after the edit; both are
    dilated by 4 pixels, in all eight directions. A pixel moved where a channel changed by more than 16 levels.
    """
    reach = np.ones((2 * _RIM + 1, 2 * _RIM + 1), np.bool_)
    outside = ~np.asarray(ndimage.binary_dilation(mask_before | mask_after, reach), np.bool_)
    moved = np.abs(after.astype(int) - before.astype(int)).max(axis=-1) > _MOVED
    return float(moved[outside].mean()) if outside.any() else 0.0


def editing_report(content: dict[str, Any]) -> Report:
    """Lay out an :class:`Editing` from JSON."""
    rows = [
        (
            name,
            *(share_cell(score[outcome]) for outcome in ("answers", "keeps", "both")),
            mean_cell(score["outside"]),
            *(share_cell(score[outcome]) for outcome in ("outside_kept", "all")),
        )
        for name, score in content["methods"].items()
    ]
    table = ReportTable(
        title="Editing: one colour word changed",
        columns=(
            "method",
            "answers to the new caption",
            "keeps every object's place and shape",
            "both",
            "moved outside",
            f"outside ≤ {_MOST_OUTSIDE:g}",
            f"both, and outside ≤ {_MOST_OUTSIDE:g}",
        ),
        rows=rows,
        note=(
            "Of images that the grader found right. Keeps: every object overlaps by half (intersection over union) "
            "with its former mask, has its shape and, if the word was not about it, its colour. Moved outside: the "
            f"mean share of pixels that changed by more than {_MOVED} of 255 levels in a channel, outside the changed "
            f"object's masks before and after, both dilated by {_RIM} pixels. Edit: `Pipeline.edit` by its defaults. "
            "Prompt-to-prompt alone: the paper's method. Painted anew: the new caption from the same noise."
        ),
    )
    return Report(
        title=f"Edits with {content['model']}",
        description=f"World {content['world']}, {content['edits']:,} captions of the test list whose image is right.",
        tables=[table],
    )


def _right_images(pipeline: Pipeline, world: World, count: int) -> Iterator[_RightImage]:
    """Generate images of the captions in batches; yield the first ``count`` that are right."""
    found = 0
    for start in range(0, TRIES_PER_EDIT * count, _BATCH_SIZE):
        indices = range(start, start + _BATCH_SIZE)
        changes = [(index, recoloured(sample(EDITING_SEED, index, world, "test"), world, index)) for index in indices]
        wanted = [(EDITING_SEED + index, change) for index, change in changes if change is not None]
        if not wanted:
            continue
        images = pipeline([change.before.text for _, change in wanted], seed=[seed for seed, _ in wanted]).images
        for (seed, change), image in zip(wanted, images, strict=True):
            if found == count:
                return
            detections = grade(image, world)
            if found_masks(change.before, detections) is not None:
                found += 1
                yield _RightImage(change=change, seed=seed, image=image, detections=detections)


def _outcome(right: _RightImage, image: Image.Image, world: World) -> _Outcome:
    """Grade an edited image and compare it with the right one that it was made of."""
    detections = grade(image, world)
    old, new = (phrasing.mentions[right.change.mention] for phrasing in (right.change.before, right.change.after))
    mask_before = _mask_of(old, right.detections, np.ones((image.height, image.width), np.bool_))
    mask_after = _mask_of(new, detections, mask_before)
    return _Outcome(
        answers=found_masks(right.change.after, detections) is not None,
        keeps=keeps_objects(old.wanted, right.detections, detections),
        outside=moved_outside(np.asarray(right.image), np.asarray(image), mask_before, mask_after),
    )


def _mask_of(mention: Mention, detections: Sequence[Detection], place: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Mask the objects that answer to a mention: as many as it speaks of, first those that overlap most with ``place``.

    So an object that wrongly changed too, or was added, is no part of the mask.
    """
    answering = [thing for thing in detections if answers(mention.wanted, thing)]
    answering.sort(key=lambda thing: -int((thing.mask & place).sum()))
    mask = np.zeros_like(place)
    for thing in answering[: len(mention.things)]:
        mask |= thing.mask
    return mask


def _method_score(outcomes: Sequence[_Outcome]) -> MethodScore:
    """Compute the shares and the mean of one method's outcomes."""
    both = [one.answers and one.keeps for one in outcomes]
    kept = [one.outside <= _MOST_OUTSIDE for one in outcomes]
    return MethodScore(
        answers=Share.of([one.answers for one in outcomes]),
        keeps=Share.of([one.keeps for one in outcomes]),
        both=Share.of(both),
        outside=Mean.of([[one.outside] for one in outcomes]),
        outside_kept=Share.of(kept),
        all=Share.of([one and other for one, other in zip(both, kept, strict=True)]),
    )
