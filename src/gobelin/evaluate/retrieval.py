"""Whether the text encoder tells a caption from one that is wrong in a single word: choosing among hard negatives."""

from collections import Counter
from dataclasses import dataclass

import torch

from gobelin.clip import ImageEncoder, TextEncoder
from gobelin.data import CaptionedImage, SceneDataset
from gobelin.evaluate.intervals import Share
from gobelin.scenes import World
from gobelin.scenes.captions import NOUNS, NUMBERS, WORDINGS, pluralised
from gobelin.scenes.colours import COLOURS
from gobelin.tokenizer import Tokenizer

BATCH = 50

_NOUNS = {noun for nouns in NOUNS.values() for noun in nouns}
_KINDS = {
    "number": {word for number, name in NUMBERS.items() for word in (str(number), name)},
    "colour": set(COLOURS),
    "shape": {word for noun in _NOUNS for form in (noun, pluralised(noun)) for word in form.split()},
    "relation": {word for pairs in WORDINGS.values() for pair in pairs for form in pair for word in form.split()},
}
OTHER = "texture, size or background"


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """How often an image is nearer to its caption than to every hard negative of it.

    ``chance`` is what guessing scores. ``by_kind`` is the share of negatives, by what is wrong about them, that the
    caption beats.
    """

    correct: Share
    chance: float
    by_kind: dict[str, Share]


@torch.no_grad()
def retrieval(
    text_encoder: TextEncoder, image_encoder: ImageEncoder, tokenizer: Tokenizer, world: World, count: int = 1000
) -> Retrieval:
    """Let the encoders choose the caption of each of ``count`` held-in scenes of the "dev" split."""
    pairs = SceneDataset(world=world, count=count, split="dev")
    correct: list[bool] = []
    chances: list[float] = []
    beaten: dict[str, list[bool]] = {}
    for start in range(0, count, BATCH):
        batch = [pairs[index] for index in range(start, min(start + BATCH, count))]
        for pair, margins in zip(batch, _margins(text_encoder, image_encoder, tokenizer, batch), strict=True):
            correct.append(all(margin > 0 for margin in margins))
            chances.append(1 / (1 + len(margins)))
            for negative, margin in zip(pair.negatives, margins, strict=True):
                beaten.setdefault(kind_of(pair.caption, negative), []).append(margin > 0)
    return Retrieval(
        correct=Share.of(correct),
        chance=sum(chances) / len(chances),
        by_kind={kind: Share.of(outcomes) for kind, outcomes in sorted(beaten.items())},
    )


def kind_of(caption: str, negative: str) -> str:
    """What is wrong about a hard negative of a caption: the "order" of its words, or one of another kind."""
    changed = set(Counter(_words(caption)) - Counter(_words(negative)))
    if not changed:
        return "order"
    return next((kind for kind, words in _KINDS.items() if changed & words), OTHER)


def _words(caption: str) -> list[str]:
    """The words of a caption; which article a noun takes is no difference."""
    return ["a" if word == "an" else word for word in caption.replace(",", "").split()]


def _margins(
    text_encoder: TextEncoder, image_encoder: ImageEncoder, tokenizer: Tokenizer, batch: list[CaptionedImage]
) -> list[list[float]]:
    """By how much each image's caption is more similar to it than each of its negatives."""
    texts = [text for pair in batch for text in (pair.caption, *pair.negatives)]
    token_ids = tokenizer(texts).to(text_encoder.device)
    pooled = text_encoder.pooled(token_ids, text_encoder(token_ids))
    projected = image_encoder.project_text(pooled.to(image_encoder.dtype))
    pixels = torch.stack([torch.from_numpy(pair.image) for pair in batch]).permute(0, 3, 1, 2)
    embedded = image_encoder((pixels / 127.5 - 1).to(image_encoder.device, image_encoder.dtype))
    similarity = image_encoder.similarity(embedded, projected)
    margins, at = [], 0
    for row, pair in enumerate(batch):
        found = similarity[row, at : at + 1 + len(pair.negatives)]
        margins.append((found[0] - found[1:]).tolist())
        at += 1 + len(pair.negatives)
    return margins
