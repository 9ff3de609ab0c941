"""Which words of a changed prompt stand for which of the prompt before."""

from collections.abc import Iterator
from difflib import SequenceMatcher

import torch
from jaxtyping import Float
from torch import Tensor

from gobelin.tokenizer import Words, WordSpan


def alignment(source: Words, target: Words) -> Float[Tensor, "length length"]:
    """What each token of ``target`` takes over from the tokens of ``source``; nothing, where its word is new.

    Equal words in order are each other's; as many changed words in a row as there were are each other's in turn,
    and share out evenly what they get where they have more or fewer tokens; punctuation goes with the word before it.
    BOS, EOS and padding are each other's.
    """
    mapping = torch.zeros(source.length, target.length)
    mapping[0, 0] = 1
    after = min(source.length - source.end, target.length - target.end)
    for offset in range(after):
        mapping[source.end + offset, target.end + offset] = 1
    for position in range(target.end + after, target.length):
        mapping[source.length - 1, position] = 1
    for before, now in counterparts(source, target):
        if len(before.tokens) == len(now.tokens):
            mapping[before.tokens, now.tokens] = 1
        else:
            for token in now.tokens:
                mapping[before.tokens, token] = 1 / len(now.tokens)
        for one, other in zip(_marks_after(source, before), _marks_after(target, now), strict=False):
            mapping[one, other] = 1
    return mapping


def counterparts(source: Words, target: Words) -> Iterator[tuple[WordSpan, WordSpan]]:
    """The words of two prompts that stand for each other: equal ones in order, and as many changed ones in a row."""
    spoken = [[span.word.lower() for span in words.spans] for words in (source, target)]
    for kind, i, j, k, n in SequenceMatcher(None, *spoken, autojunk=False).get_opcodes():
        if kind == "equal" or (kind == "replace" and j - i == n - k):
            yield from zip(source.spans[i:j], target.spans[k:n], strict=True)


def _marks_after(words: Words, span: WordSpan) -> list[int]:
    """The tokens between a word and the next: punctuation."""
    later = [token for other in words.spans for token in other.tokens if token > span.tokens[-1]]
    return list(range(span.tokens[-1] + 1, min(later, default=words.end)))
