"""Masks of words in files: PNGs of black and white, and the JSON of COCO's object detection."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gobelin.look.heatmaps import HeatMaps
from gobelin.words import Word


def word_masks(heatmaps: HeatMaps, words: Sequence[Word], threshold: float) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """List the words with their masks [H, W], True where a word's map is above the ``threshold`` of its range."""
    for word in words:
        heatmap = heatmaps[word]
        yield heatmap.label, heatmap.mask(threshold).numpy()


def mask_image(mask: NDArray[np.bool_]) -> Image.Image:
    """Draw a mask white on black."""
    return Image.fromarray(mask).convert("L")


def coco_annotations(heatmaps: HeatMaps, words: Sequence[Word], threshold: float, file: str | Path) -> dict[str, Any]:
    """Annotate an image in COCO's format: a category for each word, and its mask as a run-length code.

    Words that light up nothing have no annotation. A ``score``, as results of detectors have, is the mean of the map
    over its mask.
    """
    categories: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for word, (label, mask) in zip(words, word_masks(heatmaps, words, threshold), strict=True):
        known = next((one for one in categories if one["name"] == label), None)
        if known is None:
            known = {"id": len(categories) + 1, "name": label, "supercategory": "word"}
            categories.append(known)
        if mask.any():
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 1,
                    "category_id": known["id"],
                    **_annotation(mask),
                    "score": round(float(heatmaps[word].raw.numpy()[mask].mean()), 6),
                }
            )
    height, width = heatmaps.image.height, heatmaps.image.width
    image = {"id": 1, "file_name": str(file), "height": height, "width": width, "caption": heatmaps.words.text}
    return {"images": [image], "categories": categories, "annotations": annotations}


def _annotation(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Describe a mask that is not empty: its run-length code, its area and its box, [left, top, width, height]."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
    return {
        "segmentation": {"size": list(mask.shape), "counts": _run_lengths(mask)},
        "area": int(mask.sum()),
        "bbox": [int(side) for side in box],
        "iscrowd": 0,
    }


def _run_lengths(mask: NDArray[np.bool_]) -> list[int]:
    """Count runs of 0 and 1 in turn, 0 first, down the columns, as COCO's API does."""
    flat = mask.T.ravel()
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    lengths = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return [0, *lengths] if flat[0] else lengths
