"""Masks of words as PNGs and in COCO's JSON, read back by COCO's own API."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.look.conftest import SITE

from gobelin.look.heatmaps import HeatMaps
from gobelin.look.mask_files import coco_annotations, mask_image, word_masks
from gobelin.text_conditioning import chunk_prompt
from gobelin.tokenizer import Tokenizer

PROMPT = "a red ring of blue"


@pytest.fixture
def heatmaps(tokenizer: Tokenizer) -> HeatMaps:
    words = chunk_prompt(tokenizer, PROMPT).words
    maps = {SITE: torch.softmax(4 * torch.randn(1, 1, 5 * 7, words.length), dim=-1)}
    return HeatMaps(words=words, maps=maps, latent_size=(5, 7), image=Image.new("RGB", (28, 20)))


@pytest.mark.parametrize("threshold", [0.0, 0.4, 0.9])
def test_coco_reads_the_masks_back(heatmaps: HeatMaps, tmp_path: Path, threshold: float) -> None:
    from pycocotools.coco import COCO

    words = ["ring", "red", "blue"]
    content = coco_annotations(heatmaps, words, threshold, "image.png")
    (tmp_path / "coco.json").write_text(json.dumps(content))
    coco = COCO(tmp_path / "coco.json")
    assert [one["name"] for one in coco.loadCats(coco.getCatIds())] == words
    for number, (_, mask) in enumerate(word_masks(heatmaps, words, threshold)):
        (annotation,) = coco.loadAnns(coco.getAnnIds(catIds=[number + 1]))
        assert np.array_equal(coco.annToMask(annotation).astype(bool), mask)
        assert annotation["area"] == mask.sum()
        left, top, width, height = annotation["bbox"]
        assert mask[top : top + height, left : left + width].sum() == mask.sum()
        assert mask[:, left].any()
        assert mask[top].any()
        assert 0 <= annotation["score"] <= 1
    (image,) = coco.loadImgs(coco.getImgIds())
    assert (image["width"], image["height"], image["caption"]) == (28, 20, PROMPT)


def test_words_that_light_up_nothing_have_no_annotation(heatmaps: HeatMaps) -> None:
    even = {SITE: torch.full_like(heatmaps.maps[SITE], 1 / heatmaps.words.length)}
    flat = HeatMaps(words=heatmaps.words, maps=even, latent_size=(5, 7), image=heatmaps.image)
    content = coco_annotations(flat, ["red", "ring"], 0.4, "image.png")
    assert content["annotations"] == []
    assert [one["name"] for one in content["categories"]] == ["red", "ring"]


def test_a_mask_is_white_on_black() -> None:
    drawn = np.asarray(mask_image(np.array([[True, False], [False, False]])))
    assert drawn.tolist() == [[255, 0], [0, 0]]
