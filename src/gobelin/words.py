"""The words of a prompt, and the tokens that each became."""

import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Literal, get_args

from gobelin.errors import UsageError
from gobelin.validation import validated

_BETWEEN_SEPARATORS = re.compile(r"[^\s,;|()\[\]{}<>\"“”„«»，。、；：！？（）「」]+")

_LISTED = ", "  # between words that are no text together


@dataclass(frozen=True, kw_only=True)
class WordSpan:
    """A word of a text: its characters ``text[start:end]``, and the positions of its tokens, BOS being 0."""

    word: str
    start: int
    end: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Token:
    """A token of a text: its id, and its characters ``text[start:end]``.

    ``whole`` says that these are one word, whatever is in them: one that was added.
    """

    id: int
    start: int
    end: int
    whole: bool = False

    def shifted(self, by: int) -> "Token":
        """Return the token with its characters ``by`` places further on."""
        return replace(self, start=self.start + by, end=self.end + by)


Word = str | int | tuple[str, int]
"""A word or phrase wherever it stands, one occurrence of it, or a word by its number in the prompt."""
_WORD = Annotated[Word, "text, as in 'circle', one occurrence of it, ('circle', 0), or a word's number"]

TokenKind = Literal["bos", "text", "eos", "padding", "masked"]
"""Kinds of positions in a text encoder's input; masked ones stand beyond a prompt's own chunks in a longer batch."""


@dataclass(frozen=True, kw_only=True)
class Words:
    """The words of a prompt, and the tokens that each became.

    ``kinds`` has a :data:`TokenKind` for every position of the text embeddings. A long prompt has several chunks, each
    with a BOS, EOS and padding of its own; positions are numbered through all of them.
    """

    text: str
    spans: tuple[WordSpan, ...]
    kinds: tuple[TokenKind, ...]

    def __len__(self) -> int:
        return len(self.spans)

    @property
    def length(self) -> int:
        """The number of positions."""
        return len(self.kinds)

    def at_length(self, length: int) -> "Words":
        """Return the same words in a batch of longer prompts: positions beyond their own are masked."""
        return replace(self, kinds=(*self.kinds, *("masked",) * (length - self.length)))

    def chunks(self) -> list[range]:
        """List the positions of each chunk, from its BOS on."""
        starts = self.part("bos")
        end = self.length - len(self.part("masked"))
        return [range(start, after) for start, after in zip(starts, (*starts[1:], end), strict=True)]

    def tokens(self, key: Word) -> tuple[int, ...]:
        """Find the positions of a word's tokens: ``"circle"`` and ``"red circle"`` wherever they stand,
        ``("circle", 1)`` the second of them, ``3`` the fourth word.

        Case does not matter. Raises :class:`UsageError` that lists the prompt's words.
        """
        return tuple(dict.fromkeys(token for span in self.find(key) for token in span.tokens))

    def find(self, key: Word) -> list[WordSpan]:
        """Find the words that a key of :meth:`tokens` means, in order; raises as it does."""
        there = ", ".join(dict.fromkeys(span.word for span in self.spans)) or "none"
        validated("a word", key, _WORD)
        if isinstance(key, int):
            if not -len(self) <= key < len(self):
                raise UsageError(f"there is no word number {key}: the prompt has {len(self)}, {there}")
            return [self.spans[key]]
        phrase, occurrence = (key, None) if isinstance(key, str) else key
        wanted = _parts(phrase)
        found: list[tuple[WordSpan, ...]] = []
        spoken = [_parts(span.word) for span in self.spans]
        for start in range(len(self)):
            parts, end = [], start
            while end < len(self) and len(parts) < len(wanted):
                parts, end = parts + spoken[end], end + 1
            if parts == wanted:
                found.append(self.spans[start:end])
        if not found:
            raise UsageError(f"{phrase!r} is not in the prompt, whose words are {there}")
        if occurrence is not None:
            if not -len(found) <= occurrence < len(found):
                raise UsageError(
                    f"{phrase!r} occurs {len(found)} times in the prompt: there is no number {occurrence} of it, "
                    "the first being 0"
                )
            found = [found[occurrence]]
        return [span for spans in found for span in spans]

    def has(self, key: Word) -> bool:
        """Tell whether the prompt has a word."""
        try:
            return bool(self.find(key))
        except UsageError:
            return False

    def part(self, kind: TokenKind) -> tuple[int, ...]:
        """List the positions of a kind, over all chunks; raises :class:`UsageError` for an unknown one."""
        if kind not in get_args(TokenKind):
            raise UsageError(f"unknown part {kind!r}: the choices are {', '.join(get_args(TokenKind))}")
        return tuple(position for position, there in enumerate(self.kinds) if there == kind)


def list_words(texts: Sequence[str], lengths: Sequence[int]) -> Words:
    """List words or phrases that are no text together: each is one word, of the next ``lengths`` tokens."""
    spans: list[WordSpan] = []
    start = token = 0
    for text, length in zip(texts, lengths, strict=True):
        tokens = tuple(range(token, token + length))
        spans.append(WordSpan(word=text, start=start, end=start + len(text), tokens=tokens))
        start, token = start + len(text) + len(_LISTED), token + length
    return Words(text=_LISTED.join(texts), spans=tuple(spans), kinds=("text",) * token)


def split_words(text: str, borders: Collection[int] = ()) -> Iterator[tuple[str, int, int]]:
    """Split a text into words with their (start, end): at spaces, commas and brackets, and at ``borders``.

    Punctuation around a word is not part of it; a hyphen, a dot or an apostrophe inside of one is, and so are
    combining marks.
    """
    for match in _BETWEEN_SEPARATORS.finditer(text):
        cuts = [
            match.start(),
            *(border for border in sorted(borders) if match.start() < border < match.end()),
            match.end(),
        ]
        for start, end in pairwise(cuts):
            while start < end and not is_spoken(text[start]):
                start += 1
            while end > start and not is_spoken(text[end - 1]):
                end -= 1
            if start < end:
                yield text[start:end], start, end


def _parts(phrase: str) -> list[str]:
    """List the words of a phrase in lower case; one of signs alone, as an added word may be, is itself."""
    return [text.lower() for text, _, _ in split_words(phrase)] or [phrase.strip().lower()]


def is_spoken(character: str) -> bool:
    """Tell letters, marks and numbers from punctuation and symbols; emoji count as words."""
    return unicodedata.category(character)[0] in "LMN" or unicodedata.category(character) == "So"
