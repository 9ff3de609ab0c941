"""Retrieval: choose an image's caption among hard negatives by the similarity of CLIP's encoders."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gobelin.clip import ImageEncoder, TextEncoder
from gobelin.data import CaptionedImage, SceneDataset
from gobelin.evaluate.intervals import Share
from gobelin.evaluate.measurement_report import ReportTable, share_cell
from gobelin.images import images_to_tensor
from gobelin.scenes import World
from gobelin.scenes.captions import NOUN_WORDS, NUMBERS, WORDINGS
from gobelin.scenes.colours import COLOURS
from gobelin.tokenizer import Tokenizer

_BATCH_SIZE = 50

_KINDS = {
    "number": {word for number, name in NUMBERS.items() for word in (str(number), name)},
    "colour": set(COLOURS),
    "shape": NOUN_WORDS,
    "relation": {word for pairs in WORDINGS.values() for pair in pairs for form in pair for word in form.split()},
}
_OTHER = "texture, size or background"


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Retrieval scores.

    ``correct`` is the share of images that are nearer to their caption than to every hard negative of it, and
    ``chance`` the same for guessing. ``by_kind`` is the share of negatives that the caption beats, by kind of mistake.
    """

    correct: Share
    chance: float
    by_kind: dict[str, Share]


@torch.no_grad()
def measure_retrieval(
    text_encoder: TextEncoder, image_encoder: ImageEncoder, tokenizer: Tokenizer, world: World, count: int = 1000
) -> Retrieval:
    """Choose the caption of each of ``count`` held-in scenes of the "dev" split among its hard negatives."""
    pairs = SceneDataset(world=world, count=count, split="dev")
    correct: list[bool] = []
    chances: list[float] = []
    beaten: dict[str, list[bool]] = {}
    for start in range(0, count, _BATCH_SIZE):
        batch = [pairs[index] for index in range(start, min(start + _BATCH_SIZE, count))]
        for pair, margins in zip(batch, _margins(text_encoder, image_encoder, tokenizer, batch), strict=True):
            correct.append(all(margin > 0 for margin in margins))
            chances.append(1 / (1 + len(margins)))
            for negative, margin in zip(pair.negatives, margins, strict=True):
                beaten.setdefault(negative_kind(pair.caption, negative), []).append(margin > 0)
    return Retrieval(
        correct=Share.of(correct),
        chance=sum(chances) / len(chances),
        by_kind={kind: Share.of(outcomes) for kind, outcomes in sorted(beaten.items())},
    )


def retrieval_tables(content: dict[str, Any] | None) -> list[ReportTable]:
    """Lay out a :class:`Retrieval` from JSON; no table for None."""
    if content is None:
        return []
    correct, by_kind = content["correct"], content["by_kind"]
    rows = [("all", share_cell(correct), f"{content['chance']:.3f}", f"{correct['n']:,} images")]
    rows += [(kind, share_cell(share), "0.500", f"{share['n']:,} captions") for kind, share in by_kind.items()]
    return [
        ReportTable(
            title="Retrieval: an image's caption against hard negatives",
            columns=("negatives", "caption wins", "chance", "of"),
            rows=rows,
            bold=frozenset([0]),
            note="All: against every hard negative of an image at once. The others: against one, by the mistake in it.",
        )
    ]


def negative_kind(caption: str, negative: str) -> str:
    """Name the mistake in a hard negative of a caption: the "order" of its words, or a word of a kind."""
    changed = set(Counter(_words(caption)) - Counter(_words(negative)))
    if not changed:
        return "order"
    return next((kind for kind, words in _KINDS.items() if changed & words), _OTHER)


def _words(caption: str) -> list[str]:
    """Split a caption into words, "an" as "a", so that a noun's article makes no difference."""
    return ["a" if word == "an" else word for word in caption.replace(",", "").split()]


def _margins(
    text_encoder: TextEncoder, image_encoder: ImageEncoder, tokenizer: Tokenizer, batch: list[CaptionedImage]
) -> list[list[float]]:
    """Compute how much more similar each image is to its caption than to each of its negatives."""
    texts = [text for pair in batch for text in (pair.caption, *pair.negatives)]
    token_ids = tokenizer(texts).to(text_encoder.device)
    pooled = text_encoder.pooled(token_ids, text_encoder(token_ids))
    projected = image_encoder.project_text(pooled.to(image_encoder.dtype))
    images = images_to_tensor(np.stack([pair.image for pair in batch]))
    embedded = image_encoder(images.to(image_encoder.device, image_encoder.dtype))
    similarity = image_encoder.similarity(embedded, projected)
    margins, at = [], 0
    for row, pair in enumerate(batch):
        found = similarity[row, at : at + 1 + len(pair.negatives)]
        margins.append((found[0] - found[1:]).tolist())
        at += 1 + len(pair.negatives)
    return margins
