"""Prompts as people write them: words with weights, any length, in pieces that a text encoder can take.

``(word:1.3)`` is read in the meaning of AUTOMATIC1111's web UI (``prompt_parser.py``) or of ComfyUI (``sd1_clip.py``).
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gobelin.clip import TextEncoder
from gobelin.errors import UsageError
from gobelin.tokenizer import Token, Tokenizer, Words

Style = Literal["a1111", "comfyui", "none"]

CHUNKED_LENGTH = 77
"""Only models whose texts have CLIP's length were ever shown longer ones in several chunks."""
MOST_WEIGHT = 100.0
_ROUND, _SQUARE = 1.1, 1 / 1.1
_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?"
_PARTS = re.compile(rf"\\[()\[\]\\]|[()\[\]]|:\s*({_NUMBER})\s*\)|[^\\()\[\]:]+|:|\\", re.I)
MOST_CHARACTERS = 100_000
MOST_CHUNKS = 64
MOST_BRACKETS = 100  # within each other
_BREAK = re.compile(r"(\s*\bBREAK\b\s*)")
_ESCAPED = {r"\(": "\ue000", r"\)": "\ue001"}  # what stands for them while brackets are looked for
_COMMA_REACH = 20  # tokens: how far back AUTOMATIC1111 looks for a comma to end a chunk after
_LONG_WORD = 8  # tokens: words as long, between spaces, may be cut between ComfyUI's chunks


@dataclass(frozen=True, kw_only=True)
class Weighted:
    """A part of a prompt and its weight."""

    text: str
    weight: float


def parse(prompt: str, style: Style = "a1111") -> list[Weighted]:
    """A prompt in parts of one weight each; joined, they are what is said, without the brackets.

    ``(x)`` is 1.1 times as much, and a backslash before a bracket makes it one. In AUTOMATIC1111's meaning ``(x:1.3)``
    is 1.3 times as much as what is around it, ``[x]`` 1.1 times less, and a bracket that is not closed counts to the
    end; in ComfyUI's ``(x:1.3)`` is 1.3 wherever it stands, and such a bracket is one. Raises :class:`UsageError` for a
    weight that is not a number from 0 to 100, for brackets more than 100 deep, and for what is no text.
    """
    if len(prompt) > MOST_CHARACTERS:
        raise UsageError(f"the prompt is {len(prompt):,} characters long: give {MOST_CHARACTERS:,} at most")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the prompt holds half a character at place {error.start}: give whole ones") from None
    if style == "none":
        parts = [(prompt, 1.0)]
    elif style == "comfyui":
        for mark, place_holder in _ESCAPED.items():
            prompt = prompt.replace(mark, place_holder)
        plain = str.maketrans({one: mark[1] for mark, one in _ESCAPED.items()})
        parts = [(text.translate(plain), weight) for text, weight in _in_round(prompt, 1.0, 0)]
    else:
        parts = _in_round_and_square(prompt)
    joined: list[Weighted] = []
    for text, weight in parts:
        if not text:
            continue
        if not weight <= MOST_WEIGHT:
            raise UsageError(f"{text!r} has a weight of {weight:g} in the prompt: give {MOST_WEIGHT:g} at most")
        if joined and joined[-1].weight == weight:
            joined[-1] = Weighted(text=joined[-1].text + text, weight=weight)
        else:
            joined.append(Weighted(text=text, weight=weight))
    return joined or [Weighted(text="", weight=1.0)]


def _in_round(text: str, weight: float, depth: int) -> Iterator[tuple[str, float]]:
    """Texts and weights as ComfyUI reads them."""
    if depth > MOST_BRACKETS:
        raise UsageError(f"the prompt's brackets are more than {MOST_BRACKETS} deep")
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
    """Texts and weights as AUTOMATIC1111 reads them."""
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
        if len(open_round) + len(open_square) > MOST_BRACKETS:
            raise UsageError(f"the prompt's brackets are more than {MOST_BRACKETS} deep")
    for start in open_round:
        multiply(start, _ROUND)
    for start in open_square:
        multiply(start, _SQUARE)
    return list(zip(texts, weights, strict=True))


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """A prompt's tokens in chunks of the text encoder's length, with each token's weight.

    ``words`` are those of the prompt without its weights; their tokens are numbered through all chunks. ``cut`` is the
    end of it that did not fit.
    """

    token_ids: Int[Tensor, "chunks length"]
    weights: Float[Tensor, "chunks length"]
    words: Words
    cut: str


def chunked(tokenizer: Tokenizer, prompt: str, style: Style = "a1111") -> Chunks:
    """Put a prompt's tokens into chunks, each with its own BOS, EOS and padding; a model of another length has one.

    In AUTOMATIC1111's meaning ``BREAK`` begins a new one. Raises :class:`UsageError` for more than 64 of them.
    """
    parts = parse(prompt, style)
    text = "".join(part.text for part in parts)
    in_chunks = tokenizer.max_length == CHUNKED_LENGTH
    sections: list[list[tuple[Token, float]]] = [[]]
    start = 0
    for part in parts:
        for number, piece in enumerate(_BREAK.split(part.text) if in_chunks and style == "a1111" else [part.text]):
            if number % 2:
                sections.append([])
            else:
                sections[-1] += [(token.moved(start), part.weight) for token in tokenizer.tokens(piece)]
            start += len(piece)
    room = tokenizer.max_length - 2
    tokens = [token for section in sections for token in section]
    if len(tokens) > room * MOST_CHUNKS or len(sections) > MOST_CHUNKS:
        raise UsageError(f"the prompt has {len(tokens):,} tokens: give {room * MOST_CHUNKS:,} at most")
    if in_chunks:
        groups = [group for section in sections for group in _split(section, room, text, style)]
    else:
        groups = [tokens[:room]]
    kept = sum(map(len, groups))
    placed = [
        (token, chunk * tokenizer.max_length + 1 + place)
        for chunk, group in enumerate(groups)
        for place, (token, _) in enumerate(group)
    ]
    return Chunks(
        token_ids=torch.tensor([tokenizer.padded([token.id for token, _ in group]) for group in groups]),
        weights=torch.tensor([_padded([weight for _, weight in group], tokenizer.max_length) for group in groups]),
        words=tokenizer.words_at(text, placed, length=len(groups) * tokenizer.max_length),
        cut=text[tokens[kept][0].start :].strip() if kept < len(tokens) else "",
    )


def encode(
    text_encoder: TextEncoder, chunks: Chunks, empty: Float[Tensor, "1 length width"], style: Style, clip_skip: int = 0
) -> Float[Tensor, "tokens width"]:
    """The text embeddings of all chunks, one after the other, with their weights applied.

    ``empty`` are the embeddings of no words, from which ComfyUI measures (``sd1_clip.py``); AUTOMATIC1111 multiplies,
    and then brings the mean of a chunk back to what it was (``sd_emphasis.py``).
    """
    embeddings = text_encoder(chunks.token_ids.to(text_encoder.device), clip_skip)
    weights = chunks.weights.to(embeddings)[:, :, None]
    if bool((weights != 1).any()):
        if style == "comfyui":
            embeddings = empty + (embeddings - empty) * weights
        else:
            mean = embeddings.mean(dim=(1, 2), keepdim=True)
            embeddings = embeddings * weights
            embeddings = embeddings * (mean / embeddings.mean(dim=(1, 2), keepdim=True))
    return embeddings.flatten(0, 1)


def _weight(text: str) -> float:
    weight = float(text)
    if not (math.isfinite(weight) and 0 <= weight <= MOST_WEIGHT):
        raise UsageError(f"the prompt has a weight of {text}: give a number from 0 to {MOST_WEIGHT:g}")
    return weight


def _padded(weights: Sequence[float], length: int) -> list[float]:
    return [1.0, *weights, *[1.0] * (length - 1 - len(weights))]


def _split(tokens: list[tuple[Token, float]], room: int, text: str, style: Style) -> list[list[tuple[Token, float]]]:
    """Tokens in groups of at most ``room``, ended where the style ends them."""
    groups, left = [], tokens
    while len(left) > room:
        end = _break(left, room, text, style)
        groups.append(left[:end])
        left = left[end:]
    return [*groups, left]


def _break(tokens: list[tuple[Token, float]], room: int, text: str, style: Style) -> int:
    """How many tokens go into a full chunk."""
    if style == "a1111":
        spoken = [text[token.start : token.end] for token, _ in tokens[: room + 1]]
        commas = [place for place in range(room) if spoken[place] == ","]
        near = commas and spoken[room] != "," and room - commas[-1] <= _COMMA_REACH
        return commas[-1] + 1 if near else room
    if style == "comfyui":
        start = end = room
        while start > 0 and _go_together(tokens, start, text):
            start -= 1
        while end < len(tokens) and _go_together(tokens, end, text):
            end += 1
        return start if start > 0 and end - start < _LONG_WORD else room
    return room


def _go_together(tokens: list[tuple[Token, float]], place: int, text: str) -> bool:
    """Whether nothing is between a token and the one before it, in a part of one weight."""
    (before, weight), (token, own) = tokens[place - 1 : place + 1]
    return weight == own and not text[before.end : token.start]
