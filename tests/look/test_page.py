"""The word map's data, and its HTML, out of which no prompt can break."""

import base64
import html
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from gobelin.attention import AttentionSite
from gobelin.look.heatmaps import HeatMaps
from gobelin.look.page import word_map_data, word_map_element, word_map_page
from gobelin.tokenizer import Tokenizer
from gobelin.words import list_words

SITE = AttentionSite(name="up.attn2", kind="cross", downscale=1, heads=1)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["a red ring"], vocab_size=530, max_length=40)


def heatmaps(tokenizer: Tokenizer, prompt: str, steps: int = 1, size: tuple[int, int] = (3, 5)) -> HeatMaps:
    maps = {SITE: torch.rand(steps, 1, size[0] * size[1], 40).softmax(dim=-1)}
    picture = Image.new("RGB", (4 * size[1], 4 * size[0]))
    return HeatMaps(words=tokenizer.words(prompt), maps=maps, latent_size=size, image=picture)


def shares(data: dict) -> np.ndarray:
    """[steps, words, rows, columns], as the page reads them."""
    levels = np.frombuffer(base64.b64decode(data["shares"]), np.uint8)
    levels = levels.reshape(data["steps"], len(data["words"]), data["rows"], data["columns"])
    return levels / 255 * np.array(data["tops"])[:, None, None]


def test_it_packs_each_words_share_of_each_patch(tokenizer: Tokenizer) -> None:
    maps = heatmaps(tokenizer, "a red, ring!")
    data = word_map_data(maps)
    assert data["text"] == [("a", 0), (" ", None), ("red", 1), (", ", None), ("ring", 2), ("!", None)]
    assert (data["rows"], data["columns"], data["steps"]) == (3, 5, 1)
    for number, span in enumerate(maps.words.spans):
        expected = maps.maps[SITE][0, 0][:, list(span.tokens)].sum(dim=-1).reshape(3, 5)
        assert np.abs(shares(data)[0, number] - expected.numpy()).max() <= expected.max() / 255
    assert len(base64.b64decode(data["colours"])) == 3 * 256


def test_a_slider_begins_with_the_mean_of_the_steps(tokenizer: Tokenizer) -> None:
    maps = heatmaps(tokenizer, "a red ring", steps=4)
    found = shares(word_map_data(maps))
    assert found.shape == (5, 3, 3, 5)
    assert np.abs(found[1:].mean(axis=0) - found[0]).max() < 0.01


def test_large_grids_are_made_smaller(tokenizer: Tokenizer) -> None:
    data = word_map_data(heatmaps(tokenizer, "a ring", size=(96, 128)))
    assert (data["rows"], data["columns"]) == (48, 64)


def test_words_beside_of_the_negative_prompt_and_of_no_word_follow_the_prompts(tokenizer: Tokenizer) -> None:
    maps = heatmaps(tokenizer, "a red ring", steps=2)
    also = replace(maps, words=list_words(["dog", "</script>"], [2, 1]))
    maps = replace(maps, also_traced=also, negative_traced=heatmaps(tokenizer, "red <b>", steps=2))
    data = word_map_data(maps, parts=["bos", "padding"])
    assert data["words"] == ["a", "red", "ring", "dog", "</script>", "red", "b", "bos", "padding"]
    assert data["ranked"] == 5
    assert [text for text, number in data["text"] if number is not None] == data["words"]
    assert [number for _, number in data["text"] if number is not None] == list(range(9))
    found = shares(data)[0]
    assert found.shape[0] == 9
    bos = maps.maps[SITE].mean(dim=(0, 1))[:, 0].reshape(3, 5)
    assert np.abs(found[7] - bos.numpy()).max() < 0.01
    dog = also.maps[SITE].mean(dim=(0, 1))[:, :2].sum(dim=-1).reshape(3, 5)
    assert np.abs(found[3] - dog.numpy()).max() < 0.01
    inside = re.findall(r"<script[^>]*>(.*?)</script", word_map_element(maps), re.DOTALL | re.I)[0]
    assert "<" not in inside


PROMPTS = [
    "</script><b>",
    "</SCRIPT ><b>",
    "a<!--<script>b-->",
    "]]> a </word-map> b",
    'say "$data" $title {title} \\u003c \\',
    "a & b &lt;i> <i>",
    "'quoted' \u2028 lines\u2029",
    "עיגול אדום, דאירה",
    "a 🟥 and 👩\u200d🎨 café",
    "!!!",
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_no_prompt_breaks_out_of_its_script(tokenizer: Tokenizer, prompt: str) -> None:
    maps = heatmaps(tokenizer, prompt)
    data, definition = re.findall(r"<script[^>]*>(.*?)</script", element := word_map_element(maps), re.DOTALL | re.I)
    assert "<" not in data
    assert "".join(piece for piece, _ in json.loads(data)["text"]) == prompt
    assert 'customElements.define("word-map"' in definition
    assert "<!--" not in definition
    assert element.count("<word-map>") == 1
    page = word_map_page(maps)
    assert element in page
    title = re.findall("<title>(.*?)</title>", page, re.DOTALL)
    assert [html.unescape(text) for text in title] == [prompt]


def test_it_needs_no_network(tokenizer: Tokenizer) -> None:
    text = word_map_page(heatmaps(tokenizer, "a red ring"))
    assert not re.search(r"https?:|src=\"(?!data:)|@import|url\(|import\s*\(|\bfetch\b", text)
