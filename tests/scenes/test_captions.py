import re
from collections import Counter

import numpy as np
import pytest

from gobelin.scenes.captions import TEMPLATES, TEST_TEMPLATES, Mention, Phrasing, phrase
from gobelin.scenes.world import CATEGORIES

CIRCLE = Mention(index=0, shape="circle", colour="red", article="a", noun=0)
SQUARE = Mention(index=1, shape="square", colour="orange", article="a", noun=0)


def test_every_category_has_templates_of_its_own():
    assert set(TEMPLATES) == set(TEST_TEMPLATES) == set(CATEGORIES)
    for category in CATEGORIES:
        assert len(set(TEMPLATES[category])) >= 12
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
        objects, relation = read(phrasing.text)
        assert (objects, relation) == (phrasing.wanted, phrasing.relation)
        assert (relation == "above") == (objects[0] == ("circle", "red"))
        inverted += relation == "below"
    assert 10 < inverted < 50


def test_underspecified_captions_leave_out_one_thing():
    rng = np.random.default_rng(0)
    left_out, parts = [], Counter()
    for _ in range(400):
        said = phrase(rng, [("circle", "red"), ("square", "blue")], None, "{a} and {b}", 0.2).wanted
        left_out.append(sum(part is None for pair in said for part in pair))
        parts.update(part for pair in said for part in pair)
    assert all(0.9 * 400 < parts[part] < 400 for part in ("circle", "red", "square", "blue"))
    assert set(left_out) == {0, 1}
    assert 0.14 < np.mean(left_out) < 0.26


def test_articles_vary():
    rng = np.random.default_rng(0)
    texts = {phrase(rng, [("circle", "red")], None, "{a}").text for _ in range(300)}
    assert {"a red circle", "the red circle", "one red circle", "red circle", "a red disc"} <= texts
    assert all(re.fullmatch(r"((a|the|one) )?red (circle|disc)", text) for text in texts)
