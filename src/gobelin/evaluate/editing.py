"""Editing: change one word of a caption, and measure whether what it is about changes and nothing else.

Captions of the test list whose image the grader finds right get another colour, shape, number or relation. Afterwards
the image should answer to the new caption, the objects should keep what was not changed, and the pixels outside of
those that the word is about should stay. Three methods are compared: an edit by its defaults, prompt-to-prompt alone,
and generating anew.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from gobelin.errors import UsageError
from gobelin.evaluate.attribution import found_masks
from gobelin.evaluate.intervals import Mean, Share
from gobelin.evaluate.measurement_report import Report, ReportTable, as_json, mean_cell, share_cell
from gobelin.evaluate.word_changes import WORD_KINDS, WordChange, WordKind, change_word
from gobelin.pipeline import Pipeline
from gobelin.scenes import Detection, World, grade, sample
from gobelin.scenes.captions import Mention
from gobelin.scenes.relations import answers

EDITING_SEED = 78  # of the scenes, apart from training's and attribution's
TRIES_PER_EDIT = 16  # captions tried for each edit that is wanted
_BATCH_SIZE = 16
_SAME_PLACE = 0.5  # intersection over union with an object's former mask
_SAME_BOX = 0.25  # of the boxes around an object of another shape: the masks of a ring and of a star share little
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
_KEPT: dict[str, str] = {
    "colour": "every object overlaps by half (intersection over union) with its former mask and has its shape and, if "
    "the word was not about it, its colour.",
    "shape": "every object has its colour, overlaps by half with its former mask and has its shape; if the word was "
    "about it, only the boxes overlap, by a quarter.",
    "number": "the objects that are in both images overlap by half with their former masks, in their shape and colour.",
    "relation": "the objects are the same by shape and colour, wherever they are.",
}
_NOTE = (
    f"Moved outside: the mean share of pixels that changed by more than {_MOVED} of 255 levels in a channel, outside "
    f"the masks of what the word is about, before and after, dilated by {_RIM} pixels. Edit: `Pipeline.edit` by its "
    "defaults. Prompt-to-prompt alone: the paper's method. Painted anew: the new caption from the same noise."
)


@dataclass(frozen=True, kw_only=True)
class MethodScore:
    """The outcomes of one method's edits.

    ``answers``: the image shows what the new caption asks for. ``keeps``: :func:`keeps_objects`.
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
class KindScore:
    """The outcomes of the edits of one kind of word, by method."""

    edits: int
    methods: dict[str, MethodScore]


@dataclass(frozen=True, kw_only=True)
class Editing:
    """Edits of one model's images, by the kind of word that changes."""

    model: str
    world: str
    kinds: dict[WordKind, KindScore]

    def to_json(self) -> dict[str, Any]:
        """Convert to dicts, lists, strings and numbers."""
        return as_json(self)


@dataclass(frozen=True, kw_only=True)
class _RightImage:
    """An image with this ``seed`` that is right for its caption, and the grader's detections in it."""

    change: WordChange
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
    pipeline: Pipeline,
    world: World,
    count: int,
    kinds: Sequence[WordKind] = WORD_KINDS,
    advance: Callable[[], None] = lambda: None,
) -> Editing:
    """Edit the images of the first ``count`` captions that are right, or as many as there are, by every method.

    ``advance`` is called after each edited caption. Raises :class:`UsageError` where no caption's image is right.
    """
    scores: dict[WordKind, KindScore] = {kind: _measure_kind(pipeline, world, count, kind, advance) for kind in kinds}
    if not any(score.edits for score in scores.values()):
        raise UsageError(
            f"none of {TRIES_PER_EDIT * count:,} captions has a right image by this model: there is nothing to edit"
        )
    return Editing(model=pipeline.name, world=world.name, kinds=scores)


def keeps_objects(change: WordChange, before: Sequence[Detection], after: Sequence[Detection]) -> bool:
    """Return True where the objects kept what the change of a word is not about.

    Objects have their shape and colour, and overlap by half with their former selves; of one whose shape changes, the
    boxes do by a quarter. If a number changed, those that are in both images are still there. If a relation did, the
    objects are the same by shape and colour, wherever they are.
    """
    if change.kind == "relation":
        return sorted((thing.shape, thing.colour) for thing in before) == sorted(
            (thing.shape, thing.colour) for thing in after
        )
    changed = [change.before.mentions[number].wanted for number in change.mentions]

    def still(thing: Detection, others: Sequence[Detection]) -> bool:
        may_change = any(answers(wanted, thing) for wanted in changed)
        if may_change and change.kind == "shape":
            return any(thing.colour == other.colour and _box_overlap(thing, other) >= _SAME_BOX for other in others)
        return any(
            thing.shape == other.shape
            and (thing.colour == other.colour or (may_change and change.kind == "colour"))
            and (thing.mask & other.mask).sum() >= _SAME_PLACE * (thing.mask | other.mask).sum()
            for other in others
        )

    if change.kind == "number":
        fewer, more = sorted((before, after), key=len)
        return all(still(thing, more) for thing in fewer)
    return len(before) == len(after) and all(still(thing, after) for thing in before)


def _box_overlap(one: Detection, other: Detection) -> float:
    """Compute the intersection over union of two boxes (left, top, right, bottom)."""
    left, top = (max(one.box[side], other.box[side]) for side in (0, 1))
    right, bottom = (min(one.box[side], other.box[side]) for side in (2, 3))
    both = max(0, right - left) * max(0, bottom - top)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one.box, other.box))
    return both / (areas - both)


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
    tables = [
        ReportTable(
            title=f"Editing: one {kind} changed, in {score['edits']:,} images",
            columns=(
                "method",
                "answers to the new caption",
                "keeps the rest",
                "both",
                "moved outside",
                f"outside ≤ {_MOST_OUTSIDE:g}",
                f"both, and outside ≤ {_MOST_OUTSIDE:g}",
            ),
            rows=[
                (
                    name,
                    *(share_cell(method[outcome]) for outcome in ("answers", "keeps", "both")),
                    mean_cell(method["outside"]),
                    *(share_cell(method[outcome]) for outcome in ("outside_kept", "all")),
                )
                for name, method in score["methods"].items()
            ],
            note=f"Keeps: {_KEPT[kind]}" if place < len(content["kinds"]) - 1 else f"Keeps: {_KEPT[kind]} {_NOTE}",
        )
        for place, (kind, score) in enumerate(content["kinds"].items())
    ]
    return Report(
        title=f"Edits with {content['model']}",
        description=f"World {content['world']}, captions of the test list whose image the grader found right.",
        tables=tables,
    )


def _measure_kind(
    pipeline: Pipeline, world: World, count: int, kind: WordKind, advance: Callable[[], None]
) -> KindScore:
    """Edit images by words of one kind."""
    outcomes: dict[str, list[_Outcome]] = {name: [] for name in METHODS}
    for right in _right_images(pipeline, world, count, kind):
        before, after = right.change.before, right.change.after
        for name, options in METHODS.items():
            image = pipeline.edit(before.text, after.text, seed=right.seed, **options).images[1]
            outcomes[name].append(_outcome(right, image, world))
        advance()
    return KindScore(
        edits=len(outcomes["edit"]), methods={name: _method_score(found) for name, found in outcomes.items()}
    )


def _right_images(pipeline: Pipeline, world: World, count: int, kind: WordKind) -> Iterator[_RightImage]:
    """Generate images of the captions in batches; yield the first ``count`` that are right."""
    found = 0
    drawn = (
        (EDITING_SEED + index, change)
        for index in range(TRIES_PER_EDIT * count)
        if (change := change_word(sample(EDITING_SEED, index, world, "test"), world, kind, index)) is not None
    )
    while wanted := list(islice(drawn, _BATCH_SIZE)):
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
    change = right.change
    mask_before = mask_after = np.zeros((image.height, image.width), np.bool_)
    for number in change.mentions:
        everywhere = np.ones_like(mask_before)
        former = _mask_of(change.before.mentions[number], right.detections, everywhere)
        mask_before = mask_before | former
        mask_after = mask_after | _mask_of(change.after.mentions[number], detections, former)
    return _Outcome(
        answers=found_masks(change.after, detections) is not None,
        keeps=keeps_objects(change, right.detections, detections),
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
