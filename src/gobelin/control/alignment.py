"""Word alignment: which words of a changed prompt stand for which words of the prompt before."""

from collections import Counter
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gobelin.words import Word, Words, WordSpan

LayoutChange = Literal["number", "place"]


def alignment(source: Words, target: Words) -> Float[Tensor, "length length"]:
    """Align tokens: how much of the attention to each token of ``source`` a token of ``target`` takes over.

    Nothing, where its word is new. Equal words in order are each other's; as many changed words in a row as there were
    are each other's in turn, and share out evenly what they get where they have more or fewer tokens; punctuation goes
    with the word before it. BOS, EOS and padding are each other's, chunk by chunk; where one prompt has more chunks,
    the other's last chunk stands for all of them, and theirs share out what it had.
    """
    mapping = torch.zeros(source.length, target.length)
    before, after = source.chunks(), target.chunks()
    longest = range(max(len(before), len(after)))
    pairs = [(min(number, len(before) - 1), min(number, len(after) - 1)) for number in longest]
    shared = Counter(first for first, _ in pairs)
    for first, second in pairs:
        then, now = before[first], after[second]
        mapping[then[0], now[0]] = 1 / shared[first]
        tails = [
            [place for place in chunk if words.kinds[place] in ("eos", "padding")]
            for words, chunk in ((source, then), (target, now))
        ]
        for offset, place in enumerate(tails[1]):
            mapping[tails[0][min(offset, len(tails[0]) - 1)], place] = 1 / shared[first]
    for one, other in counterparts(source, target):
        if len(one.tokens) == len(other.tokens):
            mapping[one.tokens, other.tokens] = 1
        else:
            for token in other.tokens:
                mapping[one.tokens, token] = 1 / len(other.tokens)
        for mark, its in zip(_marks_after(source, one), _marks_after(target, other), strict=False):
            mapping[mark, its] = 1
    return mapping


def counterparts(source: Words, target: Words) -> Iterator[tuple[WordSpan, WordSpan]]:
    """Pair the words of two prompts: equal ones in order, and as many changed ones in a row."""
    spoken = [[span.word.lower() for span in words.spans] for words in (source, target)]
    for kind, i, j, k, n in SequenceMatcher(None, *spoken, autojunk=False).get_opcodes():
        if kind == "equal" or (kind == "replace" and j - i == n - k):
            yield from zip(source.spans[i:j], target.spans[k:n], strict=True)


def changed_words(source: Words, target: Words) -> tuple[list[WordSpan], list[WordSpan]]:
    """List the words that one of two prompts has and the other has not, as (of source, of target)."""
    same = [(one, other) for one, other in counterparts(source, target) if one.word.lower() == other.word.lower()]
    kept = [{one for one, _ in same}, {other for _, other in same}]
    old, new = (
        [span for span in words.spans if span not in spans] for words, spans in zip((source, target), kept, strict=True)
    )
    return old, new


def layout_change(source: Words, target: Words) -> LayoutChange | None:
    """Find what moves between two prompts: how many things there are ("number") or where they are ("place").

    The words that changed tell, in English; None where no such word did.
    """
    changed = {span.word.lower().strip(".,;:!?") for spans in changed_words(source, target) for span in spans}
    if changed & _PLACES:
        return "place"
    return "number" if any(word in _NUMBERS or word.isdigit() for word in changed) else None


def tokens_of_words(source: Words, target: Words, words: Sequence[Word]) -> tuple[list[int], list[int]]:
    """Find the tokens of words that one or both of two prompts have, as (in source, in target).

    Raises :class:`UsageError` for a word that neither has.
    """
    for word in words:
        if not source.has(word):
            target.find(word)  # which says what words there are
    source_tokens, target_tokens = (
        [token for word in words if prompt.has(word) for token in prompt.tokens(word)] for prompt in (source, target)
    )
    return source_tokens, target_tokens


def _marks_after(words: Words, span: WordSpan) -> list[int]:
    """List the tokens between a word and the next: punctuation."""
    taken = {token for other in words.spans for token in other.tokens}
    marks: list[int] = []
    place = span.tokens[-1] + 1
    while place < words.length and words.kinds[place] == "text" and place not in taken:
        marks.append(place)
        place += 1
    return marks


_NUMBER_WORDS = "no one two three four five six seven eight nine ten eleven twelve dozen several many few single pair"
_PLACE_WORDS = (
    "left right above below over under beneath behind between beside next near top bottom upper lower higher middle "
    "centre center corner inside outside around"
)
_NUMBERS, _PLACES = frozenset(_NUMBER_WORDS.split()), frozenset(_PLACE_WORDS.split())
