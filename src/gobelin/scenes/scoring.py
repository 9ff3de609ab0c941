"""Scoring: compare the grader's detections with a prompt, by GenEval's rules."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gobelin.scenes.grader import Detection
from gobelin.scenes.prompt_lists import Prompt
from gobelin.scenes.relations import INVERSE, found_in
from gobelin.scenes.textures import TEXTURES
from gobelin.scenes.world import COUNTS

_OTHER_SIZE = {"small": "large", "large": "small"}


@dataclass(frozen=True, kw_only=True)
class Score:
    """The score of an image for a prompt.

    ``correct``: every object of the prompt is there, in its colour and its place, and where the prompt counts them
    no other that is like them. ``colour`` and ``shape``: there is an object for each named colour, or shape,
    whatever the rest. ``exact``: correct, and nothing more is there.
    """

    correct: bool
    colour: bool
    shape: bool
    exact: bool


def score(prompt: Prompt, detections: Sequence[Detection]) -> Score:
    """Score what ``grade`` detected in an image against the prompt that the image was generated for."""
    correct = found_in(prompt.objects, prompt.relation, detections, count=prompt.count)
    return Score(
        correct=correct,
        colour=found_in([(None, wanted[1]) for wanted in prompt.objects], None, detections),
        shape=found_in([(wanted[0], None) for wanted in prompt.objects], None, detections),
        exact=correct and len(detections) == len(prompt.objects),
    )


def swapped(prompt: Prompt) -> Prompt | None:
    """Exchange the parts of a prompt, as a model that mixes them up would; None where there is nothing to exchange.

    The relation is turned round, or the number is one higher or (from four on) one lower, or the two colours are
    exchanged; one object gets another texture, or the other size. An image that is right for the prompt is wrong
    for the result, whose text stays that of the prompt.
    """
    if prompt.relation:
        return replace(prompt, relation=INVERSE[prompt.relation])
    if prompt.count:
        count = prompt.count + (1 if prompt.count < COUNTS[-1] else -1)
        return replace(prompt, objects=prompt.objects[:1] * count, count=count)
    if len(prompt.objects) == 1:
        return _with_other_texture_or_size(prompt)
    (shape, colour, *more), (other_shape, other_colour, *other_more) = prompt.objects
    if shape == other_shape or colour == other_colour:
        return None
    return replace(prompt, objects=((shape, other_colour, *more), (other_shape, colour, *other_more)))


def _with_other_texture_or_size(prompt: Prompt) -> Prompt | None:
    """Ask for another texture, or else another size, of the one object; None where the prompt says neither."""
    shape, colour, texture, size = (*prompt.objects[0], None, None)[:4]
    if texture:
        following = (*TEXTURES, *TEXTURES)
        return replace(prompt, objects=((shape, colour, following[following.index(texture) + 1], size),))
    return replace(prompt, objects=((shape, colour, None, _OTHER_SIZE[size]),)) if size else None
