"""Emoji scores: whether concept and style of a painted picture are its caption's, and whether it is a copy.

The captions are of pictures that a model was trained on, and of held-out pairs: a concept and a style that it knows
apart. A judge that has seen true pictures alone tells what is painted; beside its verdicts stand those on true pictures
that it never saw, on true ones as the model's autoencoder passes them on, and on the painted ones with captions dealt
out anew.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from gobelin.data.emoji_set import EmojiSet
from gobelin.evaluate.emoji_judge import EmojiJudge, Recognition, untouched
from gobelin.evaluate.intervals import Mean, Share
from gobelin.evaluate.measurement_report import Report, ReportTable, as_json, mean_cell, share_cell
from gobelin.images import images_to_tensor, tensor_to_levels
from gobelin.vae import VAE

PARTS = {"held_in": "held in", "held_out": "held out"}
_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class Nearness:
    """Cosines of pictures to true ones, by the judge's encoder.

    ``to_training`` is the cosine to the training picture that is nearest, ``to_true`` that to the true picture of the
    caption. ``nearer_to_true`` is the share of those nearer to the latter than to any training picture of another pair;
    ``same_concept`` the share whose nearest training picture of another pair is one of the same concept.
    """

    to_training: Mean
    to_true: Mean
    nearer_to_true: Share
    same_concept: Share


@dataclass(frozen=True, kw_only=True)
class EmojiSplit:
    """Scores of the captions of one split; ``shuffled`` are the same pictures with each other's captions.

    ``passed_on`` are the true pictures of the captions after the autoencoder. ``by_style`` has the share of right
    concepts by the style asked for.
    """

    painted: Recognition
    shuffled: Recognition
    passed_on: Recognition
    nearness: Nearness
    true_nearness: Nearness
    by_style: dict[str, Share]


@dataclass(frozen=True, kw_only=True)
class EmojiScores:
    """Scores of a model by split; ``judge`` is the judge's own on true pictures that it was not trained on."""

    model: str
    concepts: int
    styles: tuple[str, ...]
    settings: dict[str, Any]
    judge: Recognition
    splits: dict[str, EmojiSplit]

    def to_json(self) -> dict[str, Any]:
        """Convert to dicts, lists, strings and numbers."""
        return as_json(self)


def choose_captions(pictures: EmojiSet, limit: int, seed: int = 0) -> dict[str, Int[np.ndarray, " chosen"]]:
    """Choose up to ``limit`` pictures of each split at random, whose first captions are to be painted."""
    rng = np.random.default_rng(seed)
    return {
        split: np.sort(rng.permutation(np.flatnonzero(pictures.is_held_out == held_out))[:limit])
        for split, held_out in (("held_in", False), ("held_out", True))
    }


def measure_emoji(
    name: str,
    pictures: EmojiSet,
    judge: EmojiJudge,
    vae: VAE,
    painted: dict[str, tuple[Int[np.ndarray, " chosen"], UInt8[np.ndarray, "chosen size size 3"]]],
    settings: dict[str, Any],
) -> EmojiScores:
    """Measure painted pictures: by split, the rows of the captions, and what was painted from each."""
    kept = untouched(pictures)
    features = judge.encode(pictures.images)
    return EmojiScores(
        model=name,
        concepts=len(pictures.concept_names),
        styles=tuple(pictures.styles),
        settings=settings,
        judge=Recognition.of(judge.recognise(pictures.images[kept]), pictures.concept[kept], pictures.style[kept]),
        splits={
            split: _measure_split(pictures, judge, vae, rows, images, features)
            for split, (rows, images) in painted.items()
        },
    )


def _measure_split(
    pictures: EmojiSet,
    judge: EmojiJudge,
    vae: VAE,
    rows: Int[np.ndarray, " chosen"],
    images: UInt8[np.ndarray, "chosen size size 3"],
    features: Float[Tensor, "images features"],
) -> EmojiSplit:
    concept, style = pictures.concept[rows], pictures.style[rows]
    scores = judge.recognise(images)
    right = (scores[0].argmax(dim=1).numpy() == concept).tolist()
    # Captions half a list away, as neighbours are of one concept; no random number decides.
    others = np.roll(rows, len(rows) // 2)
    true = pictures.images[rows]
    return EmojiSplit(
        painted=Recognition.of(scores, concept, style),
        shuffled=Recognition.of(scores, pictures.concept[others], pictures.style[others]),
        passed_on=Recognition.of(judge.recognise(_passed_on(vae, true)), concept, style),
        nearness=_nearness(pictures, judge.encode(images), rows, features),
        true_nearness=_nearness(pictures, features[torch.from_numpy(rows)], rows, features),
        by_style={
            word: Share.of([one for one, given in zip(right, style.tolist(), strict=True) if given == number])
            for number, word in enumerate(pictures.styles)
        },
    )


def _nearness(
    pictures: EmojiSet,
    encoded: Float[Tensor, "chosen features"],
    rows: Int[np.ndarray, " chosen"],
    features: Float[Tensor, "images features"],
) -> Nearness:
    cosines = (encoded @ features.T).numpy()
    own = cosines[np.arange(len(rows)), rows]
    cosines[:, pictures.is_held_out] = -np.inf
    any_training = cosines.max(axis=1)
    cosines[np.arange(len(rows)), rows] = -np.inf
    nearest = cosines.argmax(axis=1)
    return Nearness(
        to_training=Mean.of([[value] for value in any_training.tolist()]),
        to_true=Mean.of([[value] for value in own.tolist()]),
        nearer_to_true=Share.of((own > cosines.max(axis=1)).tolist()),
        same_concept=Share.of((pictures.concept[nearest] == pictures.concept[rows]).tolist()),
    )


@torch.inference_mode()
def _passed_on(vae: VAE, images: UInt8[np.ndarray, "images size size 3"]) -> UInt8[np.ndarray, "images size size 3"]:
    """Encode and decode pictures: what a U-Net without fault would show of them."""
    passed = []
    for start in range(0, len(images), _AT_ONCE):
        batch = images_to_tensor(images[start : start + _AT_ONCE]).to(vae.device, vae.dtype)
        passed.append(tensor_to_levels(vae.decode(vae.encode(batch).mode())))
    return np.concatenate(passed)


def emoji_report(content: dict[str, Any]) -> Report:
    """Build the report of scores from their JSON."""
    splits = {PARTS[name]: split for name, split in content["splits"].items()}
    settings = ", ".join(f"{name} {value}" for name, value in content["settings"].items() if value is not None)
    return Report(
        title=f"Emoji of {content['model']}",
        description=f"{content['concepts']:,} concepts in the styles {', '.join(content['styles'])}: {settings}.",
        tables=[
            _recognition_table(content, splits),
            _style_table(content, splits),
            _nearness_table(splits),
        ],
    )


def _recognition_table(content: dict[str, Any], splits: dict[str, dict[str, Any]]) -> ReportTable:
    rows = [("true, never seen by the judge", "", *_cells(content["judge"]))]
    bold = set()
    for title, split in splits.items():
        bold.add(len(rows))
        rows.append(("painted", title, *_cells(split["painted"])))
        rows.append(("captions shuffled", title, *_cells(split["shuffled"])))
        rows.append(("true, through the VAE", title, *_cells(split["passed_on"])))
    return ReportTable(
        title="Recognised by the judge",
        columns=("pictures", "captions", "concept right", "among five", "style right", "images"),
        rows=rows,
        bold=frozenset(bold),
        note=(
            "Held out: a concept and a style that training never showed together. Through the VAE: what a perfect "
            "U-Net would reach. Intervals are of 95 % (Wilson's)."
        ),
    )


def _cells(recognition: dict[str, Any]) -> Sequence[str]:
    shares = [recognition[name] for name in ("top1", "top5", "style")]
    return [*map(share_cell, shares), f"{shares[0]['n']:,}"]


def _style_table(content: dict[str, Any], splits: dict[str, dict[str, Any]]) -> ReportTable:
    rows = [
        (title, *(share_cell(split["by_style"][style]) for style in content["styles"]))
        for title, split in splits.items()
    ]
    return ReportTable(
        title="Concept right, by the style asked for", columns=("captions", *content["styles"]), rows=rows
    )


def _nearness_table(splits: dict[str, dict[str, Any]]) -> ReportTable:
    rows = []
    for title, split in splits.items():
        for what, key in (("painted", "nearness"), ("true", "true_nearness")):
            near = split[key]
            rows.append(
                (
                    what,
                    title,
                    mean_cell(near["to_training"]),
                    mean_cell(near["to_true"]),
                    share_cell(near["nearer_to_true"]),
                    share_cell(near["same_concept"]),
                )
            )
    return ReportTable(
        title="Copied or composed?",
        columns=(
            "pictures",
            "captions",
            "cosine to the nearest training picture",
            "to its own true picture",
            "nearer to its own than to any other",
            "the nearest other is of its concept",
        ),
        rows=rows,
        note=(
            "By an encoder that learned to find a picture among all others when it is moved, turned and blurred. A "
            "held-out picture's own true picture was in no training: one that is copied is nearer to another, one that "
            "is composed may be nearer to its own."
        ),
    )
