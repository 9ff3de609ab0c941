"""Whether an image shows what its prompt asks for, by GenEval's rules."""

from collections.abc import Sequence
from dataclasses import dataclass

from gobelin.scenes.grader import Seen
from gobelin.scenes.prompts import Prompt
from gobelin.scenes.relations import found_in


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is right in an image.

    ``correct``: every object of the prompt is there, in its colour and its place. ``colour`` and ``shape``:
    there is an object for each named colour, or shape, whatever the rest. ``exact``: correct, and nothing
    more is there.
    """

    correct: bool
    colour: bool
    shape: bool
    exact: bool


def judge(prompt: Prompt, seen: Sequence[Seen]) -> Verdict:
    """Judge what ``grade`` saw in an image against the prompt that it was painted for."""
    correct = found_in(prompt.objects, prompt.relation, seen)
    return Verdict(
        correct=correct,
        colour=found_in([(None, colour) for _, colour in prompt.objects], None, seen),
        shape=found_in([(shape, None) for shape, _ in prompt.objects], None, seen),
        exact=correct and len(seen) == len(prompt.objects),
    )
