"""Sheets hold every word's map in its place, whatever the picture's size."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.look.conftest import holds

from gobelin.attention import AttentionSite
from gobelin.look.contact_sheet import SHEET_MARGIN
from gobelin.look.heatmaps import HeatMaps
from gobelin.look.word_sheets import GRID_SIDE, WORD_SIDE, comparison_sheet, grid_sheet, save_animation, word_sheet
from gobelin.tokenizer import Tokenizer
from gobelin.words import list_words

SITE = AttentionSite(name="up.attn2", kind="cross", downscale=1, heads=1)


def heatmaps(prompt: str, size: tuple[int, int] = (4, 6)) -> HeatMaps:
    words = Tokenizer.train([prompt], vocab_size=530, max_length=40).words(prompt)
    maps = {SITE: torch.rand(2, 1, size[0] * size[1], 40).softmax(dim=-1)}
    picture = Image.effect_noise((4 * size[1], 4 * size[0]), 80).convert("RGB")
    return HeatMaps(words=words, maps=maps, latent_size=size, image=picture)


@pytest.mark.parametrize("size", [(4, 6), (6, 4), (4, 4)], ids=["wide", "tall", "square"])
@pytest.mark.parametrize("prompt", ["ring", "a red ring and a blue ring over a star"])
def test_a_sheet_has_the_picture_and_every_word(prompt: str, size: tuple[int, int]) -> None:
    maps = heatmaps(prompt, size)
    sheet = word_sheet(maps, range(len(maps.words)))
    for number in range(len(maps.words)):
        assert holds(sheet, maps[number].overlay(WORD_SIDE))
    scale = WORD_SIDE / max(maps.image.size)
    assert holds(sheet, maps.image.resize([round(side * scale) for side in maps.image.size], Image.Resampling.LANCZOS))
    edge = np.asarray(sheet)[:, -SHEET_MARGIN // 2 :]
    assert (edge == edge[0, 0]).all(), "nothing is cut off at the right"


def test_words_beside_and_those_of_a_negative_prompt_have_rows() -> None:
    maps = heatmaps("a red ring")
    also = replace(maps, words=list_words(["dog", "a star"], [1, 2]))
    negative = heatmaps("blue square")
    sheet = word_sheet(replace(maps, also_traced=also, negative_traced=negative), [0, "bos"])
    for shown in (maps[0], maps.part("bos"), also["dog"], also["a star"], negative["blue"], negative["square"]):
        assert holds(sheet, shown.overlay(WORD_SIDE))
    assert sheet.height > word_sheet(replace(maps, also_traced=also), [0]).height > word_sheet(maps, [0]).height


def test_a_grid_has_a_row_a_word_and_a_column_a_step() -> None:
    maps = heatmaps("a red ring")
    rows = [(span.word, [maps.select(steps=[step])[n] for step in range(2)]) for n, span in enumerate(maps.words.spans)]
    sheet = grid_sheet("a red ring", rows)
    for _, columns in rows:
        for heatmap in columns:
            assert holds(sheet, heatmap.overlay(GRID_SIDE))


def test_an_animation_has_its_frames(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (30, 20), colour) for colour in ("red", "green", "blue")]
    save_animation(tmp_path / "steps.webp", frames)
    with Image.open(tmp_path / "steps.webp") as animation:
        assert (animation.n_frames, animation.size) == (3, (30, 20))


def test_pictures_stand_side_by_side() -> None:
    pictures = [("before", Image.new("RGB", (64, 64), "red")), ("after " * 30, Image.new("RGB", (64, 64), "blue"))]
    sheet = comparison_sheet(pictures)
    assert all(holds(sheet, picture.resize((WORD_SIDE, WORD_SIDE))) for _, picture in pictures)
