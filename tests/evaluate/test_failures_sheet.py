"""The failures sheet: what is wrong is framed and said."""

import numpy as np
import pytest

from gobelin import scenes
from gobelin.evaluate.failures_sheet import FAILURES_COLUMNS, describe_seen, failures_sheet
from gobelin.evaluate.image_list import requested_images
from gobelin.evaluate.scored_images import score_images
from gobelin.look.contact_sheet import RED

WORLD = scenes.CORE
ASKED = requested_images(WORLD, limit=12, count=1)
RED_PIXEL = tuple(int(RED[at : at + 2], 16) for at in (1, 3, 5))


@pytest.fixture(scope="module")
def exhibits(painters):
    return {
        name: score_images(ASKED, (painters[name](each.prompt, WORLD) for each in ASKED), WORLD)
        for name in ("perfect", "swapping")
    }


def test_a_sheet_frames_what_is_wrong_and_shows_more_of_it(exhibits):
    def framed(sheet):
        return bool((np.asarray(sheet) == RED_PIXEL).all(axis=-1).any())

    right = failures_sheet(exhibits["perfect"])
    assert not framed(right)
    wrong = failures_sheet(exhibits["swapping"], title="mine")
    assert framed(wrong)
    assert wrong.width == right.width
    assert wrong.height > right.height + 7 * 132, "seven tasks have a row of failures more"
    assert FAILURES_COLUMNS < 12, "or there would be no failures left for a second row"


def test_what_was_seen_is_said_in_few_words(portrait):
    def said(asked, painted):
        prompt = scenes.Prompt(text="…", task="x", **asked)
        return describe_seen(prompt, scenes.grade(portrait(scenes.Prompt(text="…", task="x", **painted), WORLD), WORLD))

    circle, ring = ("circle", "red"), ("ring", "blue")
    assert said({"objects": (circle,)}, {"objects": ()}) == "nothing"
    assert said({"objects": (circle,)}, {"objects": (ring, ring)}) == "2 blue rings"
    assert said({"objects": (circle, ring)}, {"objects": (circle,)}) == "red circle"
    wrong = said({"objects": (circle, ring), "relation": "above"}, {"objects": (circle, ring), "relation": "left of"})
    assert wrong == "red circle left of blue ring"
    missing = said({"objects": (circle, ring), "relation": "above"}, {"objects": (circle, circle)})
    assert missing == "2 red circles"
