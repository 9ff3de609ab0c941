import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from gobelin.scenes.captions import (
    GROUNDS,
    TEMPLATES,
    TEST_TEMPLATES,
    Mention,
    Phrasing,
    phrase,
    pluralised,
    world_words,
)
from gobelin.scenes.sampling import sample
from gobelin.scenes.world import CATEGORIES, WORLDS

CIRCLE = Mention(things=(0,), shape="circle", colour="red", article="a", noun=0)
SQUARE = Mention(things=(1,), shape="square", colour="orange", article="a", noun=0)


def test_every_category_has_templates_of_its_own():
    assert set(TEMPLATES) == set(TEST_TEMPLATES) == set(CATEGORIES)
    for category in CATEGORIES:
        assert len(set(TEMPLATES[category])) >= 12
        assert len(set(TEST_TEMPLATES[category])) >= 3
        assert not set(TEMPLATES[category]) & set(TEST_TEMPLATES[category])


@pytest.mark.parametrize(
    ("template", "wording", "expected"),
    [
        ("{a} {rel} {b}", 0, "a red circle left of an orange square"),
        ("{rel} {b} is {a}", 1, "to the left of an orange square is a red circle"),
        ("{b}, and {a} {side}", 2, "an orange square, and a red circle on its left"),
    ],
)
def test_wording(template, wording, expected):
    phrasing = Phrasing(template=template, mentions=(CIRCLE, SQUARE), relation="left of", wording=wording)
    assert phrasing.text == expected


def test_words_know_their_objects():
    phrasing = Phrasing(template="{rel} {b}, {a}", mentions=(CIRCLE, SQUARE), relation="left of", wording=1)
    assert phrasing.words() == (
        ("to", (0, 1)), ("the", ()), ("left", (0, 1)), ("of", (0, 1)),
        ("an", ()), ("orange", (1,)), ("square,", (1,)), ("a", ()), ("red", (0,)), ("circle", (0,)),
    )  # fmt: skip


@pytest.mark.parametrize("template", TEMPLATES["relation"] + TEST_TEMPLATES["relation"])
def test_a_relation_reads_back_from_every_template(template, read):
    rng = np.random.default_rng(0)
    inverted = 0
    for _ in range(60):
        phrasing = phrase(rng, [("circle", "red"), ("square", "blue")], "above", template)
        objects, relation, count = read(phrasing.text)
        assert (objects, relation, count) == (phrasing.wanted, phrasing.relation, None)
        assert (relation == "above") == (objects[0] == ("circle", "red"))
        inverted += relation == "below"
    assert 10 < inverted < 50


@pytest.mark.parametrize("template", TEMPLATES["count"] + TEST_TEMPLATES["count"])
def test_a_number_reads_back_from_every_template(template, read):
    rng = np.random.default_rng(0)
    digits = 0
    for _ in range(200):
        count = int(rng.integers(2, 6))
        phrasing = phrase(rng, [("cross", "red")], None, template, count=count)
        assert read(phrasing.text) == ((("cross", "red"),) * count, None, count)
        assert phrasing.wanted == (("cross", "red"),) * count
        digits += str(count) in phrasing.text
    assert 25 < digits < 80


def test_a_number_its_colour_and_its_noun_speak_of_all_that_are_counted():
    plus = Mention(things=(0, 1, 2), shape="cross", colour="red", article="the", noun=1)
    phrasing = Phrasing(template="exactly {n} {as}, no more", mentions=(plus,), count=3)
    everything = (0, 1, 2)
    assert phrasing.words() == (
        ("exactly", ()), ("three", everything), ("red", everything), ("plus", everything), ("signs,", everything),
        ("no", ()), ("more", ()),
    )  # fmt: skip


def test_size_texture_and_colour_come_in_this_order():
    circle = Mention(things=(0,), shape="circle", colour="red", article="a", noun=0, texture="striped", size="small")
    plain = "{scene} on a {ground} background"
    phrasing = Phrasing(template="{a}, {b}", mentions=(circle, SQUARE), background="slate", ground=plain)
    assert phrasing.text == "a small striped red circle, an orange square on a slate background"
    assert phrasing.wanted == (("circle", "red", "striped", "small"), ("square", "orange"))
    assert dict(phrasing.words())["small"] == dict(phrasing.words())["striped"] == (0,)
    assert dict(phrasing.words())["slate"] == dict(phrasing.words())["background"] == ()


@pytest.mark.parametrize("ground", GROUNDS)
@pytest.mark.parametrize("category", CATEGORIES)
def test_every_way_to_name_the_background_reads_back(ground, category, read):
    rng = np.random.default_rng(0)
    looks = [("circle", "red", "striped", "small"), ("square", "blue", None, "large")]
    for template in TEMPLATES[category] + TEST_TEMPLATES[category]:
        phrasing = phrase(
            rng,
            looks if "{b}" in template else looks[:1],
            {"relation": "above", "inside": "inside"}.get(category),
            template,
            count=3 if category == "count" else None,
            background="slate",
        )
        phrasing = replace(phrasing, ground=ground)
        assert read(phrasing.text) == (phrasing.wanted, phrasing.relation, phrasing.count)
        assert "a slate background" in phrasing.text


def test_plurals():
    nouns = ("circle", "box", "rhombus", "cross", "plus sign", "thing")
    assert [pluralised(noun) for noun in nouns] == [
        "circles", "boxes", "rhombuses", "crosses", "plus signs", "things",
    ]  # fmt: skip


def test_underspecified_captions_leave_out_one_thing():
    rng = np.random.default_rng(0)
    left_out, parts = [], Counter()
    for _ in range(400):
        said = phrase(rng, [("circle", "red"), ("square", "blue")], None, "{a} and {b}", underspecified=0.2).wanted
        left_out.append(sum(part is None for pair in said for part in pair))
        parts.update(part for pair in said for part in pair)
    assert all(0.9 * 400 < parts[part] < 400 for part in ("circle", "red", "square", "blue"))
    assert set(left_out) == {0, 1}
    assert 0.14 < np.mean(left_out) < 0.26


def test_some_captions_name_no_colour_at_all():
    rng = np.random.default_rng(0)
    named = Counter()
    for _ in range(600):
        said = phrase(
            rng, [("circle", "red"), ("square", "blue")], None, "{a} and {b}", underspecified=0.4, colourless=0.5
        )
        named[sum(colour is not None for _, colour in said.wanted)] += 1
        assert [shape for shape, _ in said.wanted].count(None) <= named[1] + named[2]
    assert 0.15 < named[0] / 600 < 0.25
    assert 0.06 < named[1] / 600 < 0.14


def test_articles_vary():
    rng = np.random.default_rng(0)
    texts = {phrase(rng, [("circle", "red")], None, "{a}").text for _ in range(300)}
    assert {"a red circle", "the red circle", "one red circle", "red circle", "a red disc"} <= texts
    assert all(re.fullmatch(r"((a|the|one) )?red (circle|disc)", text) for text in texts)


@pytest.mark.parametrize("world", WORLDS)
def test_words_of_a_world_are_those_of_its_captions(world):
    """Every word of some hundred captions is listed, and most of what is listed comes up in them."""
    listed = set(world_words(WORLDS[world]))
    captions = [sample(0, index, WORLDS[world], split).caption for split in ("train", "test") for index in range(200)]
    spoken = {word for caption in captions for word in re.findall(r"[a-z0-9]+", caption)}
    assert spoken <= listed
    assert len(spoken) > 0.7 * len(listed), sorted(listed - spoken)
