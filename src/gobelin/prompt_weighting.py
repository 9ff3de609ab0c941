"""Prompt weighting: ``(word:1.3)`` in the meaning of AUTOMATIC1111's web UI (``prompt_parser.py``) or of ComfyUI
(``sd1_clip.py``)."""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from gobelin.errors import UsageError
from gobelin.validation import shown

PromptSyntax = Literal["a1111", "comfyui", "none"]
"""The tool in whose meaning a prompt's weights are read; "none" reads brackets as text."""

MAX_WEIGHT = 100.0  # beyond, embeddings overflow half precision; the tools themselves warn above 2
_ROUND, _SQUARE = 1.1, 1 / 1.1
_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)"
_PARTS = re.compile(rf"\\[()\[\]\\]|[()\[\]]|:\s*({_NUMBER})\s*\)|[^\\()\[\]:]+|:|\\")
MAX_CHARACTERS = 100_000  # read in a fraction of a second; a prompt of 64 chunks has some 20,000
MAX_QUOTED = 200  # characters of a prompt in a sentence
MAX_NESTED = 100  # brackets within each other: the reader of ComfyUI's meaning calls itself for each
_ESCAPED = {r"\(": "\ue000", r"\)": "\ue001"}  # what stands for them while brackets are looked for

_IN_WORDS = "write what to draw in plain words, or give weights='none' to draw it as text"
_TAG = re.compile(r"<lora:([^<>]*)>", re.IGNORECASE)


class _Foreign(NamedTuple):
    """A part of a prompt that other tools act on, over time or before it is read, and do not draw as words."""

    find: Callable[[str], Iterable[str]]
    what: str
    where: tuple[PromptSyntax, ...] = ("a1111", "comfyui")
    remedy: str = _IN_WORDS


def _matches(pattern: str, flags: re.RegexFlag = re.NOFLAG) -> Callable[[str], Iterable[str]]:
    compiled = re.compile(pattern, flags)
    return lambda prompt: (found.group() for found in compiled.finditer(prompt))


def _in_square(own: str) -> Callable[[str], Iterable[str]]:
    """Find ``[…]`` whose own text, without the brackets within it, matches ``own``."""
    compiled = re.compile(own)
    return lambda prompt: (text for text, inner in _square_groups(prompt) if compiled.search(inner))


def _square_groups(prompt: str) -> Iterator[tuple[str, str]]:
    """List each ``[…]``, its beginning if it is long, with its own text, in which a space stands for other brackets."""
    opened: list[tuple[str, int, list[str]]] = []
    for place, character in enumerate(prompt):
        if character in "[(":
            opened.append((character, place, []))
        elif character in "])":
            if character == "]":
                while opened and opened[-1][0] == "(":
                    opened.pop()
            if not opened or (character == ")" and opened[-1][0] == "["):
                continue
            _, start, own = opened.pop()
            if opened:
                opened[-1][2].append(" ")
            if character == "]":
                yield prompt[start : min(place + 1, start + MAX_QUOTED)], "".join(own)
        elif opened:
            opened[-1][2].append(character)


# Tags are AUTOMATIC1111's (``modules/extra_networks.py``, which takes every <word:…> out of the prompt) and SwarmUI's
# (``docs/Features/Prompt Syntax.md``).
_FOREIGN = (
    # ``modules/prompt_parser.py`` (``schedule_parser``): prompts within each other, a number with a sign
    _Foreign(_in_square(r":\s*+[+-]?(?:\d++(?:\.\d*+)?|\.\d++)(?:e[+-]?\d+)?\s*+$"), "AUTOMATIC1111's prompt editing"),
    _Foreign(_in_square(r"\|"), "AUTOMATIC1111's alternating words"),
    _Foreign(_matches(r"\bAND\b"), "AUTOMATIC1111's AND, which composes prompts", ("a1111",)),
    _Foreign(_matches(r"\{[^{}|]*+\|[^{}]*+\}"), "a choice of ComfyUI's dynamic prompts"),
    _Foreign(
        _matches(_TAG.pattern, re.IGNORECASE),
        "a LoRA to load",
        remedy="load it with load_lora (--lora FILE, or --lora-dir with the folder that it is in) and leave this out",
    ),
    _Foreign(
        _matches(r"<lyco:[^<>]*>", re.IGNORECASE),
        "a LyCORIS network to load",
        remedy="load it with load_lora (--lora FILE), if it is a LoRA, LoHa or LoKr, and leave this out",
    ),
    _Foreign(
        _matches(r"<hypernet:[^<>]*>", re.IGNORECASE),
        "a hypernetwork to load",
        remedy="leave it out, as no hypernetworks are read",
    ),
    _Foreign(
        _matches(r"<embed(?:ding)?:[^<>]*>", re.IGNORECASE),
        "an embedding as SwarmUI writes it",
        remedy="load its file with load_textual_inversion (--inversion), and write its name alone",
    ),
    _Foreign(
        _matches(r"<(?!(?:lora|lyco|hypernet|embed|embedding):)\w+:[^<>]*>", re.IGNORECASE),
        "a tag of another program",
    ),
    _Foreign(
        _matches(r"(?<!\w)embedding:[^\s,()\[\]<>]+", re.IGNORECASE),
        "an embedding as ComfyUI writes it",
        ("a1111",),
        "load its file with load_textual_inversion (--inversion), and write its name alone or give weights='comfyui'",
    ),
)


@dataclass(frozen=True, kw_only=True)
class WeightedText:
    """A part of a prompt, and its weight: 1 is neutral."""

    text: str
    weight: float


@dataclass(frozen=True, kw_only=True)
class LoraTag:
    """A LoRA that a prompt asks for: the name of its file without the suffix, and its weight, 1 being as trained."""

    name: str
    weight: float


def extract_lora_tags(prompt: str) -> tuple[str, tuple[LoraTag, ...]]:
    """Take AUTOMATIC1111's ``<lora:name:0.8>`` out of a prompt: the prompt without them, and what they ask for.

    A tag without a number has weight 1 (``extensions-builtin/Lora/extra_networks_lora.py``). A second number, of the
    U-Net, has to be the first, of the text encoder, as a LoRA has one weight here. Raises :class:`UsageError` for tags
    with other numbers, named arguments, no name, and for a LoRA that is named twice.
    """
    if len(prompt) > MAX_CHARACTERS:
        raise UsageError(f"the prompt is {len(prompt):,} characters long: give {MAX_CHARACTERS:,} at most")
    tags: dict[str, LoraTag] = {}
    for found in _TAG.finditer(prompt):
        said = shown(found.group())
        name, *numbers = (part.strip() for part in found[1].split(":"))
        if named := [part for part in (name, *numbers) if "=" in part]:
            raise UsageError(f"the prompt has {said}, whose {shown(named[0])} is not done here: give one weight alone")
        weights = [float(number) for number in numbers if _is_number(number)]
        if not name or len(weights) < len(numbers) or len(weights) > 2 or not all(map(math.isfinite, weights)):
            raise UsageError(f"the prompt has {said}: give a LoRA's name and a number, as in <lora:style:0.8>")
        if len(set(weights)) > 1:
            raise UsageError(
                f"the prompt has {said}, with one weight for the text encoder and another for the U-Net: give the same "
                "for both, as in <lora:style:0.8>"
            )
        if name in tags:
            raise UsageError(
                f"the prompt names the LoRA {shown(name)} twice: give it once, with the weight it should have"
            )
        tags[name] = LoraTag(name=name, weight=weights[0] if weights else 1.0)
    return (_TAG.sub("", prompt).strip() if tags else prompt), tuple(tags.values())


def parse_weights(prompt: str, syntax: PromptSyntax = "a1111") -> list[WeightedText]:
    """Parse a prompt into parts of one weight each; joined, they are the prompt without its brackets.

    ``(x)`` is 1.1 times as much, and a backslash before a bracket makes it one. In AUTOMATIC1111's meaning ``(x:1.3)``
    is 1.3 times as much as what is around it, ``[x]`` 1.1 times less, and a bracket that is not closed counts to the
    end; in ComfyUI's ``(x:1.3)`` is 1.3 wherever it stands, and such a bracket is one. Raises :class:`UsageError` for a
    weight that is not a number from 0 to 100, for brackets more than 100 deep, for text that is no Unicode, and for
    what other tools schedule over time (``[from:to:when]``, ``[a|b]``, ``AND``) or load (``<lora:name:1>``,
    ``<embed:name>``, in AUTOMATIC1111's meaning ``embedding:name``), which would be drawn as words.
    """
    if len(prompt) > MAX_CHARACTERS:
        raise UsageError(f"the prompt is {len(prompt):,} characters long: give {MAX_CHARACTERS:,} at most")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the prompt holds half a character at place {error.start}: give whole ones") from None
    refuse_foreign_syntax(prompt, syntax)
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


def find_foreign_syntax(prompt: str, syntax: PromptSyntax) -> Iterator[tuple[str, str]]:
    """Find what other tools would not draw as words: each (text, what it is there); none with syntax "none"."""
    return ((text, foreign.what) for text, foreign in _found_foreign(prompt, syntax))


def refuse_foreign_syntax(prompt: str, syntax: PromptSyntax) -> None:
    """Raise :class:`UsageError` for the first of :func:`find_foreign_syntax`."""
    for text, foreign in _found_foreign(prompt, syntax):
        raise UsageError(
            f"the prompt has {shown(text)}, {foreign.what}, which Gobelin does not do in a prompt: {foreign.remedy}"
        )


def _found_foreign(prompt: str, syntax: PromptSyntax) -> Iterator[tuple[str, _Foreign]]:
    plain = re.sub(r"\\[()\[\]]", "  ", prompt)
    for foreign in _FOREIGN:
        if syntax in foreign.where:
            yield from ((text, foreign) for text in foreign.find(plain))


def in_a1111_syntax(prompt: str, syntax: PromptSyntax) -> str:
    """Write a prompt of any syntax as AUTOMATIC1111 would read it: each part in brackets with its weight."""
    if syntax == "a1111":
        return prompt
    written = ""
    for part in parse_weights(prompt, syntax):
        text = re.sub(r"[()\[\]\\]", r"\\\g<0>", part.text)
        written += text if part.weight == 1 else f"({text}:{part.weight:.10g})"
    return written


def _in_round(text: str, weight: float, depth: int) -> Iterator[tuple[str, float]]:
    """Parse texts and weights as ComfyUI does (``token_weights``)."""
    if depth > MAX_NESTED:
        raise UsageError(f"the prompt's brackets are more than {MAX_NESTED} deep")
    for part in _outer_brackets(text):
        if len(part) < 2 or part[0] != "(" or part[-1] != ")":
            yield part, weight
            continue
        inner = part[1:-1]
        said, _, number = inner.rpartition(":")
        if said and _is_number(number):
            yield from _in_round(said, _weight(number), depth + 1)
        else:
            yield from _in_round(inner, weight * _ROUND, depth + 1)


def _outer_brackets(text: str) -> Iterator[str]:
    """Split a text before and after its outermost brackets, the last of which may not be closed."""
    start = level = 0
    for place, character in enumerate(text):
        if character == "(":
            if level == 0:
                yield text[start:place]
                start = place
            level += 1
        elif character == ")":
            level -= 1
            if level == 0:
                yield text[start : place + 1]
                start = place + 1
    yield text[start:]


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
            texts.append(part.removeprefix("\\"))  # one before anything else is left out
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
