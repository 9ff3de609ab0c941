"""The verdict of caption validation: one sentence that says whether the caption is heard, or why that cannot be told.

The rules are the constants below and the order of the cases in :func:`describe_caption_losses`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gobelin.data.subset import FEWEST_HELD_OUT
from gobelin.training.caption_validation import (
    Against,
    CaptionLosses,
    Gain,
    caption_gain,
    noise_level,
    percent,
)

FEWEST_PAIRS = FEWEST_HELD_OUT
"""Fewer pairs tell nothing: one odd image decides."""
_WIDEST = 0.05  # a margin: with a wider one "no effect" would hide an effect as large as the usual ones
_LEAST_GAIN = 0.01  # of a loss: with many pairs a smaller share is soon sure, and no image shows it
_RISE = 0.01  # of the held-out loss: the pairs and noise are always the same, less is the weights' own jitter


@dataclass(frozen=True, kw_only=True)
class _Check:
    """A validation at a step. Its gains have intervals of 95 % for all bins together (Bonferroni).

    The sentence speaks of the bin that shows most, which without it would be chance's choice in one check of ten.
    """

    step: int
    losses: CaptionLosses

    def gains(self, against: Against) -> list[Gain]:
        return caption_gain(self.losses, against, confidence=1 - 0.05 / len(self.losses.bins))

    def at(self, number: int) -> str:
        return f"at {noise_level(self.losses.bins, number)}"

    def surely_above(self, number: int, *against: Against) -> bool:
        """Tell whether the right caption is better than each of the others: by enough, the interval above 0."""
        return all(_is_gain(self.gains(each)[number]) for each in against)


def describe_caption_losses(held_out: Sequence[Mapping[str, Any]], training: Sequence[Mapping[str, Any]]) -> str:
    """Describe in one sentence what the records of a run say: is the caption heard, used, of no effect, or memorised?

    A record is :meth:`CaptionLosses.as_record` with its ``step``. The cases, in this order: nothing to tell by;
    memorising; heard (better than none and than a wrong one); told from a wrong one alone; used (better than none
    alone); harmful; too few pairs; no effect yet. Raises :class:`TrainingError` for a damaged record.
    """
    checks, others = _checks(held_out), _checks(training)
    if not checks:
        return "Whether the caption is heard was not measured: no images were held out."
    last = checks[-1]
    if not last.losses.finite:
        return f"The validation loss of step {last.step:,} is not a number: the training has diverged."
    if last.losses.count < FEWEST_PAIRS:
        return (
            f"Too few pairs to tell whether the caption is heard: {last.losses.count} were held out, "
            f"and {FEWEST_PAIRS} are the least that tell anything."
        )
    beside = _beside(last, others)
    return _memorising(checks, beside) or _heard(checks, beside) or _not_heard(last)


def _checks(records: Sequence[Mapping[str, Any]]) -> list[_Check]:
    """Sort records by step; of one step the last counts."""
    by_step = {int(record["step"]): CaptionLosses.from_record(record) for record in records}
    return [_Check(step=step, losses=by_step[step]) for step in sorted(by_step)]


def _beside(last: _Check, training: list[_Check]) -> _Check | None:
    """Find the check of training pairs at the step of the last held-out one, where it can be compared."""
    same = [one for one in training if one.step == last.step and one.losses.bins == last.losses.bins]
    return same[0] if same and same[0].losses.finite and same[0].losses.count >= FEWEST_PAIRS else None


def _memorising(checks: list[_Check], training: _Check | None) -> str | None:
    """Say that it is memorising, if training pairs gain clearly more *and* the held-out loss rises, in one bin.

    A gap alone is usual, and a rise alone may have other reasons; together they are what memorising means.
    """
    if training is None:
        return None
    last = checks[-1]
    found = []
    for number, (known, new) in enumerate(zip(training.gains("empty"), last.gains("empty"), strict=True)):
        rise, since = _rise(checks, number)
        if _is_gap(known, new) and rise >= _RISE:
            found.append((known.value - new.value, number, known, new, rise, since))
    if not found:
        return None
    _, number, known, new, rise, since = max(found, key=lambda one: one[0])
    return (
        f"The U-Net is memorising: {last.at(number)} the caption lowers the loss of training pairs by "
        f"{percent(known.value)} and that of held-out pairs by {percent(new.value)}, and the held-out loss has risen "
        f"by {percent(rise)} since step {since:,}; train no longer than that, or on more pairs."
    )


def _heard(checks: list[_Check], training: _Check | None) -> str | None:
    """Say that the caption is heard, if it is better than none and than a wrong one in one bin of the last check."""
    last = checks[-1]
    heard = [number for number in range(len(last.losses.bins)) if last.surely_above(number, "empty", "wrong")]
    if not heard:
        return None
    # The bin is chosen among those that hear, by the gain that a U-Net which only uses text cannot have.
    number = max(heard, key=lambda each: last.gains("wrong")[each].value)
    since = last.step  # of an unbroken row of checks: a single lucky one long ago says nothing
    for check in reversed(checks):
        if check.losses.bins != last.losses.bins or not check.surely_above(number, "empty", "wrong"):
            break
        since = check.step
    return (
        f"From step {since:,} on the caption is heard: {last.at(number)} the right one lowers the loss of held-out "
        f"pairs by {percent(last.gains('empty')[number].value)} against none and by "
        f"{percent(last.gains('wrong')[number].value)} against a wrong one{_beside_training(checks, training, number)}."
    )


def _beside_training(checks: list[_Check], training: _Check | None, number: int) -> str:
    """Compare with the training pairs: is the gain on new pairs the same, and does their loss still fall?"""
    if training is None:
        return "; training pairs were not checked beside them, so memorising cannot be told"
    known, new = training.gains("empty")[number], checks[-1].gains("empty")[number]
    said = f", and that of training pairs by {percent(known.value)} against none"
    rise, since = _rise(checks, number)
    if rise >= _RISE:  # without a gap, or memorising would have been said
        return f"{said}, though the held-out loss has risen by {percent(rise)} since step {since:,}"
    if _is_gap(known, new):
        return f"{said}; these gain clearly more, but the held-out loss does not rise: it is not memorising yet"
    return f"{said}: it is not memorising"


def _is_gain(gain: Gain) -> bool:
    return gain.low > 0 and gain.value >= _LEAST_GAIN


def _is_gap(known: Gain, new: Gain) -> bool:
    """Tell whether training pairs surely gain more than held-out ones: two independent means."""
    return known.value - new.value > math.hypot(known.margin, new.margin)


def _rise(checks: list[_Check], number: int) -> tuple[float, int]:
    """Compute the rise of the held-out loss in a bin since its lowest, as a share of that, and the lowest's step."""
    known = [one for one in checks if one.losses.bins == checks[-1].losses.bins and one.losses.finite]
    lowest = min(known, key=lambda one: one.losses.right[number])
    least = lowest.losses.right[number]
    return (checks[-1].losses.right[number] / least - 1 if least else 0.0), lowest.step


def _not_heard(last: _Check) -> str:
    """Say what the last check shows where the caption is not heard."""
    empty, wrong = last.gains("empty"), last.gains("wrong")
    told, used, harmful = (
        [number for number in range(len(empty)) if condition(number)]
        for condition in (
            lambda number: _is_gain(wrong[number]),
            lambda number: _is_gain(empty[number]),
            lambda number: empty[number].high < 0 and empty[number].value <= -_LEAST_GAIN,
        )
    )
    if told:
        best = max(told, key=lambda number: wrong[number].value)
        return (
            f"At step {last.step:,} the right caption is told from a wrong one, but not surely better than none: "
            f"{last.at(best)} it lowers the held-out loss by {wrong[best]} against a wrong one and by {empty[best]} "
            "against none."
        )
    if used:
        best = max(used, key=lambda number: empty[number].value)
        return (
            f"At step {last.step:,} a caption is used but not heard: {last.at(best)} the right one lowers the held-out "
            f"loss by {percent(empty[best].value)} against none, and a wrong one does as well (the right one's gain on "
            f"it is {wrong[best]})."
        )
    if harmful:
        worst = min(harmful, key=lambda number: empty[number].value)
        return (
            f"At step {last.step:,} the right caption does harm: {last.at(worst)} it raises the held-out loss by "
            f"{percent(-empty[worst].value)} against none; see whether the captions belong to their images."
        )
    best = max(range(len(wrong)), key=lambda number: wrong[number].value)
    if min(gain.margin for gain in wrong) > _WIDEST:
        return (
            f"Too few pairs to tell whether the caption is heard: with {last.losses.count} held out the right one's "
            f"gain on a wrong one is {wrong[best]} {last.at(best)}."
        )
    return (
        f"Up to step {last.step:,} the caption has no effect yet: {last.at(best)} the right one's gain on a wrong one "
        f"is {wrong[best]}, and on none {empty[best]}."
    )
