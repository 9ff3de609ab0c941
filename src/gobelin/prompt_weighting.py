"""Prompt weighting: ``(word:1.3)`` in the meaning of AUTOMATIC1111's web UI (``prompt_parser.py``) or of ComfyUI
(``sd1_clip.py``)."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from gobelin.errors import UsageError

PromptSyntax = Literal["a1111", "comfyui", "none"]
"""The tool in whose meaning a prompt's weights are read; "none" reads brackets as text."""

MAX_WEIGHT = 100.0  # beyond, embeddings overflow half precision; the tools themselves warn above 2
_ROUND, _SQUARE = 1.1, 1 / 1.1
_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?"
_PARTS = re.compile(rf"\\[()\[\]\\]|[()\[\]]|:\s*({_NUMBER})\s*\)|[^\\()\[\]:]+|:|\\", re.I)
MAX_CHARACTERS = 100_000  # read in a fraction of a second; a prompt of 64 chunks has some 20,000
MAX_NESTED = 100  # brackets within each other: the reader of ComfyUI's meaning calls itself for each
_ESCAPED = {r"\(": "\ue000", r"\)": "\ue001"}  # what stands for them while brackets are looked for

# What other tools do with a prompt over time, or before it is read; none of it is words to draw.
_SCHEDULES = (
    (
        re.compile(r"\[[^\[\]]*:\s*+(?:\d++(?:\.\d*+)?|\.\d++)\s*+\]"),
        "AUTOMATIC1111's prompt editing",
        ("a1111", "comfyui"),
    ),
    (re.compile(r"\[[^\[\]|]*+\|[^\[\]]*+\]"), "AUTOMATIC1111's alternating words", ("a1111", "comfyui")),
    (re.compile(r"\bAND\b"), "AUTOMATIC1111's AND, which composes prompts", ("a1111",)),
    (re.compile(r"\{[^{}|]*+\|[^{}]*+\}"), "a choice of ComfyUI's dynamic prompts", ("a1111", "comfyui")),
    (re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>"), "an added network", ("a1111", "comfyui")),
)


@dataclass(frozen=True, kw_only=True)
class WeightedText:
    """A part of a prompt, and its weight: 1 is neutral."""

    text: str
    weight: float


def parse_weights(prompt: str, syntax: PromptSyntax = "a1111") -> list[WeightedText]:
    """Parse a prompt into parts of one weight each; joined, they are the prompt without its brackets.

    ``(x)`` is 1.1 times as much, and a backslash before a bracket makes it one. In AUTOMATIC1111's meaning ``(x:1.3)``
    is 1.3 times as much as what is around it, ``[x]`` 1.1 times less, and a bracket that is not closed counts to the
    end; in ComfyUI's ``(x:1.3)`` is 1.3 wherever it stands, and such a bracket is one. Raises :class:`UsageError` for a
    weight that is not a number from 0 to 100, for brackets more than 100 deep, for text that is no Unicode, and for
    what other tools schedule over time (``[from:to:when]``, ``[a|b]``, ``AND``) or load (``<lora:name:1>``), which
    would be drawn as words.
    """
    if len(prompt) > MAX_CHARACTERS:
        raise UsageError(f"the prompt is {len(prompt):,} characters long: give {MAX_CHARACTERS:,} at most")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the prompt holds half a character at place {error.start}: give whole ones") from None
    refuse_schedules(prompt, syntax)
    if syntax == "none":
        parts = [(prompt, 1.0)]
    elif syntax == "comfyui":
        for mark, place_holder in _ESCAPED.items():
            prompt = prompt.replace(mark, place_holder)
        plain = str.maketrans({one: mark[1] for mark, one in _ESCAPED.items()})
        parts = [(text.translate(plain), weight) for text, weight in _in_round(prompt, 1.0, 0)]
    else:
        parts = _in_round_and_square(prompt)
    joined: list[WeightedText] = []
    for text, weight in parts:
        if not text:
            continue
        if not weight <= MAX_WEIGHT:
            raise UsageError(f"{text!r} has a weight of {weight:g} in the prompt: give {MAX_WEIGHT:g} at most")
        if joined and joined[-1].weight == weight:
            joined[-1] = WeightedText(text=joined[-1].text + text, weight=weight)
        else:
            joined.append(WeightedText(text=text, weight=weight))
    return joined or [WeightedText(text="", weight=1.0)]


def schedules(prompt: str, syntax: PromptSyntax) -> list[tuple[str, str]]:
    """Find what other tools would not draw as words: each (text, what it is there); none with syntax "none"."""
    plain = prompt.replace(r"\[", "  ").replace(r"\]", "  ")
    return [
        (found.group(), what)
        for pattern, what, where in _SCHEDULES
        if syntax in where
        for found in pattern.finditer(plain)
    ]


def refuse_schedules(prompt: str, syntax: PromptSyntax) -> None:
    """Raise :class:`UsageError` for the first of :func:`schedules`."""
    for text, what in schedules(prompt, syntax):
        remedy = (
            "load it with load_lora (--lora) and leave this out"
            if "network" in what
            else ("write what to draw in plain words, or give weights='none' to draw it as text")
        )
        raise UsageError(f"the prompt has {text!r}, {what}, which Gobelin does not do in a prompt: {remedy}")


def _in_round(text: str, weight: float, depth: int) -> Iterator[tuple[str, float]]:
    """Parse texts and weights as ComfyUI does."""
    if depth > MAX_NESTED:
        raise UsageError(f"the prompt's brackets are more than {MAX_NESTED} deep")
    start = level = 0
    for place, character in enumerate(text):
        if character == "(":
            if level == 0:
                yield text[start:place], weight
                start = place
            level += 1
        elif character == ")":
            level -= 1
            if level == 0:
                inner = text[start + 1 : place]
                said, _, number = inner.rpartition(":")
                if said and _is_number(number):
                    yield from _in_round(said, _weight(number), depth + 1)
                else:
                    yield from _in_round(inner, weight * _ROUND, depth + 1)
                start = place + 1
    yield text[start:], weight


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _in_round_and_square(prompt: str) -> list[tuple[str, float]]:
    """Parse texts and weights as AUTOMATIC1111 does."""
    texts: list[str] = []
    weights: list[float] = []
    open_round: list[int] = []
    open_square: list[int] = []

    def multiply(start: int, by: float) -> None:
        for index in range(start, len(weights)):
            weights[index] *= by

    for found in _PARTS.finditer(prompt):
        part = found.group()
        if part == "(":
            open_round.append(len(texts))
        elif part == "[":
            open_square.append(len(texts))
        elif part == ")" and open_round:
            multiply(open_round.pop(), _ROUND)
        elif part == "]" and open_square:
            multiply(open_square.pop(), _SQUARE)
        elif found.group(1) is not None and open_round:
            multiply(open_round.pop(), _weight(found.group(1)))
        else:
            texts.append(part[1:] if len(part) == 2 and part[0] == "\\" else part)
            weights.append(1.0)
        if len(open_round) + len(open_square) > MAX_NESTED:
            raise UsageError(f"the prompt's brackets are more than {MAX_NESTED} deep")
    for start in open_round:
        multiply(start, _ROUND)
    for start in open_square:
        multiply(start, _SQUARE)
    return list(zip(texts, weights, strict=True))


def _weight(text: str) -> float:
    weight = float(text)
    if not (math.isfinite(weight) and 0 <= weight <= MAX_WEIGHT):
        raise UsageError(f"the prompt has a weight of {text}: give a number from 0 to {MAX_WEIGHT:g}")
    return weight
