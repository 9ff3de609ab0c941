"""Whether an image shows what its prompt asks for, by GenEval's rules."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gobelin.scenes.grader import Seen
from gobelin.scenes.prompt_lists import Prompt
from gobelin.scenes.relations import INVERSE, found_in
from gobelin.scenes.textures import TEXTURES
from gobelin.scenes.world import COUNTS

_OTHER_SIZE = {"small": "large", "large": "small"}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is right in an image.

    ``correct``: every object of the prompt is there, in its colour and its place, and where it counts them no
    other that is like them. ``colour`` and ``shape``: there is an object for each named colour, or shape,
    whatever the rest. ``exact``: correct, and nothing
    more is there.
    """

    correct: bool
    colour: bool
    shape: bool
    exact: bool


def judge(prompt: Prompt, seen: Sequence[Seen]) -> Verdict:
    """Judge what ``grade`` saw in an image against the prompt that it was painted for."""
    correct = found_in(prompt.objects, prompt.relation, seen, count=prompt.count)
    return Verdict(
        correct=correct,
        colour=found_in([(None, wanted[1]) for wanted in prompt.objects], None, seen),
        shape=found_in([(wanted[0], None) for wanted in prompt.objects], None, seen),
        exact=correct and len(seen) == len(prompt.objects),
    )


def swapped(prompt: Prompt) -> Prompt | None:
    """What a painter that mixes up the parts of the prompt would have been asked for; None where nothing can be.

    The relation turned round, or a number one higher or (from four on) one lower, or the two colours exchanged;
    of one object, another texture, or the other size. A picture that is right for the prompt is wrong for this
    one. The text stays that of the prompt.
    """
    if prompt.relation:
        return replace(prompt, relation=INVERSE[prompt.relation])
    if prompt.count:
        count = prompt.count + (1 if prompt.count < COUNTS[-1] else -1)
        return replace(prompt, objects=prompt.objects[:1] * count, count=count)
    if len(prompt.objects) == 1:
        return _otherwise(prompt)
    (shape, colour, *more), (other_shape, other_colour, *other_more) = prompt.objects
    if shape == other_shape or colour == other_colour:
        return None
    return replace(prompt, objects=((shape, other_colour, *more), (other_shape, colour, *other_more)))


def _otherwise(prompt: Prompt) -> Prompt | None:
    """The prompt for one object with another texture, or else another size; None where it says neither."""
    shape, colour, texture, size = (*prompt.objects[0], None, None)[:4]
    if texture:
        following = (*TEXTURES, *TEXTURES)
        return replace(prompt, objects=((shape, colour, following[following.index(texture) + 1], size),))
    return replace(prompt, objects=((shape, colour, None, _OTHER_SIZE[size]),)) if size else None
