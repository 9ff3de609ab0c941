"""Erasure: a colour or a shape is erased from a model, and the grader says whether it is gone and what else broke.

Prompts are those of the list. Of the prompts that ask for what is erased, the share of images that show it should fall
to that of the same prompts with another word in its place; of all others, as many should be right as before.
"""

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gobelin.errors import UsageError
from gobelin.evaluate.editing import moved_outside
from gobelin.evaluate.image_list import RequestedImage, requested_images
from gobelin.evaluate.intervals import Mean, Share
from gobelin.evaluate.measurement_report import Report, ReportTable, as_json, mean_cell, share_cell
from gobelin.evaluate.scored_images import ScoredImage, generate_images, score_images
from gobelin.pipeline import Pipeline
from gobelin.scenes import TASKS, Detection, World
from gobelin.scenes.captions import NOUNS, NUMBERS, pluralised
from gobelin.validation import refuse_unknown


@dataclass(frozen=True, kw_only=True)
class ErasureState:
    """Images of a model before or after erasure, or of prompts without the word.

    ``shows``: images of prompts that ask for what is erased, which show it. ``others_right``: images of other prompts
    that are right. ``others_moved``: share of these images' pixels that are not as before.
    """

    shows: Share
    others_right: Share | None = None
    others_moved: Mean | None = None


@dataclass(frozen=True, kw_only=True)
class Erasure:
    """Erasure of a colour or a shape from a model: its images before and after."""

    model: str
    world: str
    erased: str
    instead: str
    prompts: int
    other_prompts: int
    states: dict[str, ErasureState]

    def to_json(self) -> dict[str, Any]:
        """Convert to dicts, lists, strings and numbers."""
        return as_json(self)


def measure_erasure(
    pipeline: Pipeline,
    world: World,
    erased: str,
    instead: str,
    limit: int,
    ridge: float = 1e-3,
    advance: Callable[[int], None] = lambda count: None,
) -> Erasure:
    """Erase a colour or a shape of the world from a copy of the model, and paint the prompt list before and after.

    ``limit`` is the number of prompts of each task; ``advance`` is called with the number of images of each batch.
    Raises :class:`UsageError` for what is no colour or shape of the world.
    """
    refuse_unknown([erased], [*world.shapes, *world.colours], what="shape or colour of the world")
    requests = requested_images(world, ("dev",), TASKS, limit, 1)
    asking = [request for request in requests if _asks(request, erased)]
    others = [request for request in requests if not _asks(request, erased)]
    if not asking or not others:
        raise UsageError(f"{limit} prompts of each task are too few to ask for {erased!r} and for something else")
    changed = Pipeline(deepcopy(pipeline.model))
    changed.erase(_words(erased), instead, preserve=_phrases(world, erased), ridge=ridge)
    replaced = [_without(request, erased, instead) for request in asking]
    painted = {
        (name, kind): score_images(wanted, list(generate_images(one, wanted, advance=advance)), world)
        for name, one in (("before", pipeline), ("erased", changed))
        for kind, wanted in (("asking", asking), ("others", others))
    }
    without = score_images(replaced, list(generate_images(pipeline, replaced, advance=advance)), world)
    moved = zip(painted["before", "others"], painted["erased", "others"], strict=True)
    return Erasure(
        model=pipeline.name,
        world=world.name,
        erased=erased,
        instead=instead,
        prompts=len(asking),
        other_prompts=len(others),
        states={
            "before": ErasureState(
                shows=_shown(painted["before", "asking"], erased), others_right=_right(painted["before", "others"])
            ),
            "erased": ErasureState(
                shows=_shown(painted["erased", "asking"], erased),
                others_right=_right(painted["erased", "others"]),
                others_moved=Mean.of([[_moved(one, other)] for one, other in moved]),
            ),
            "another word in the prompt": ErasureState(shows=_shown(without, erased)),
        },
    )


def erasure_report(content: dict[str, Any]) -> Report:
    """Lay out an :class:`Erasure` from JSON."""
    erased, instead = content["erased"], content["instead"]
    rows = [
        (
            name,
            share_cell(state["shows"]),
            "–" if state["others_right"] is None else share_cell(state["others_right"]),
            mean_cell(state["others_moved"]),
        )
        for name, state in content["states"].items()
    ]
    table = ReportTable(
        title=f"“{erased}” read as {f'“{instead}”' if instead else 'nothing'}",
        columns=("images", f"show “{erased}”", "others right", "others moved"),
        rows=rows,
        note=(
            f"{content['prompts']:,} prompts of the list ask for it, {content['other_prompts']:,} do not. Shows: the "
            "grader finds one in the image. Others moved: the mean share of pixels that changed by more than 16 of 255 "
            "levels in a channel. Another word in the prompt: the model as it was, asked for something else."
        ),
    )
    return Report(title=f"Erasure from {content['model']}", description=f"World {content['world']}.", tables=[table])


def _asks(request: RequestedImage, erased: str) -> bool:
    return any(erased in wanted for wanted in request.prompt.objects)


def _words(erased: str) -> list[str]:
    """List the words of a colour or a shape: synonyms and plurals."""
    nouns = NOUNS.get(erased, ())
    return [*nouns, *map(pluralised, nouns)] or [erased]


def _phrases(world: World, erased: str) -> list[str]:
    """List phrases of all other colours and shapes, alone and in numbers, which are to be read as before."""
    shapes = [shape for shape in world.shapes if shape != erased]
    colours = [colour for colour in world.colours if colour != erased]
    alone = [f"a {colour} {shape}" for shape in shapes for colour in colours]
    counted = [
        f"{NUMBERS[2 + place % 3]} {colours[place % len(colours)]} {pluralised(shape)}"
        for place, shape in enumerate(shapes)
    ]
    return ["", *shapes, *alone, *counted]


def _without(request: RequestedImage, erased: str, instead: str) -> RequestedImage:
    """Ask for something else in the place of what is erased."""
    text = f" {request.prompt.text} "
    for word in sorted(_words(erased), key=len, reverse=True):
        for end in (" ", ","):
            text = text.replace(f" {word}{end}", f" {instead}{end}")
    return replace(request, prompt=replace(request.prompt, text=" ".join(text.split())))


def _shown(images: Iterable[ScoredImage], erased: str) -> Share:
    def shows(found: Sequence[Detection]) -> bool:
        return any(erased in (thing.shape, thing.colour) for thing in found)

    return Share.of([shows(image.detections) for image in images])


def _right(images: Iterable[ScoredImage]) -> Share:
    return Share.of([image.score.correct for image in images])


def _moved(one: ScoredImage, other: ScoredImage) -> float:
    """Compute the share of all pixels that moved from one image to the other."""
    before, after = (np.asarray(each.image) for each in (one, other))
    nothing = np.zeros(before.shape[:2], np.bool_)
    return moved_outside(before, after, nothing, nothing)
