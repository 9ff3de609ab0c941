from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from gobelin.scenes import (
    NANO,
    Prompt,
    Sample,
    Scene,
    SceneObject,
    Score,
    World,
    grade,
    prompts,
    render,
    score,
    swapped,
)

CIRCLE = SceneObject(shape="circle", colour="red", x=16, y=32, radius=10)
SQUARE = SceneObject(shape="square", colour="blue", x=47, y=30, radius=10)


def scored(prompt: Prompt, *objects: SceneObject) -> Score:
    return score(prompt, grade(render(Scene(objects=objects, background="paper"))[0], NANO))


def prompt(*objects: tuple[str | None, ...], relation: str | None = None, count: int | None = None) -> Prompt:
    return Prompt(text="", task="", objects=objects, relation=relation, count=count)


def prompt_of(made: Sample) -> Prompt:
    objects = tuple((thing.shape, thing.colour) for thing in made.scene.objects)
    return prompt(*objects, relation=made.scene.relation, count=len(objects) if made.category == "count" else None)


@pytest.mark.parametrize(
    ("asked", "correct", "colour", "shape", "exact"),
    [
        (prompt(("circle", "red")), True, True, True, False),
        (prompt(("circle", "red"), ("square", "blue")), True, True, True, True),
        (prompt(("circle", None), (None, "blue")), True, True, True, True),
        (prompt(("circle", "blue"), ("square", "red")), False, True, True, False),
        (prompt(("circle", "red"), ("circle", "red")), False, False, False, False),
        (prompt(("circle", "green")), False, False, True, False),
        (prompt(("ring", "red")), False, True, False, False),
        (prompt(("circle", "red"), ("square", "blue"), relation="left of"), True, True, True, True),
        (prompt(("square", "blue"), ("circle", "red"), relation="right of"), True, True, True, True),
        (prompt(("circle", "red"), ("square", "blue"), relation="right of"), False, True, True, False),
        (prompt(("circle", "red"), ("square", "blue"), relation="above"), False, True, True, False),
    ],
)
def test_scores(asked, correct, colour, shape, exact):
    expected = Score(correct=correct, colour=colour, shape=shape, exact=exact)
    assert scored(asked, CIRCLE, SQUARE) == expected


@pytest.mark.parametrize(
    ("asked", "count", "correct", "exact"),
    [
        ((None, "red"), 3, True, True),
        (("circle", "red"), 2, True, False),
        (("circle", None), 2, True, False),
        (("circle", "red"), 3, False, False),
        ((None, "red"), 2, False, False),  # there are three
        (("ring", "red"), 2, False, False),
    ],
)
def test_a_number_is_right_when_just_so_many_are_there(asked, count, correct, exact):
    things = (CIRCLE, replace(CIRCLE, x=47, y=20, radius=8), replace(SQUARE, y=48, radius=8, colour="red"))
    found = scored(prompt(*[asked] * count, count=count), *things)
    assert (found.correct, found.exact) == (correct, exact)


def test_nothing_is_wrong_for_every_prompt():
    nothing = Score(correct=False, colour=False, shape=False, exact=False)
    assert scored(prompt(("circle", "red"))) == nothing


def test_true_prompts_score_and_shuffled_ones_are_at_chance(world: World, drawn):
    made = drawn(world, "train", 150)
    seen = [grade(one.image, world) for one in made]
    asked = [prompt_of(one) for one in made]
    assert np.mean([score(*both).exact for both in zip(asked, seen, strict=True)]) >= 0.995
    shuffled = [asked[at] for at in np.random.default_rng(0).permutation(len(asked))]
    assert np.mean([score(*both).exact for both in zip(shuffled, seen, strict=True)]) < 0.06


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (prompt(("circle", "red")), None),
        (prompt(("circle", None), ("square", None)), None),
        (prompt(("circle", "red"), ("circle", "blue")), None),
        (prompt(("circle", "red"), ("square", "blue")), prompt(("circle", "blue"), ("square", "red"))),
        (
            prompt(("circle", "red"), ("square", "red"), relation="above"),
            prompt(("circle", "red"), ("square", "red"), relation="below"),
        ),
        (prompt(*[("circle", "red")] * 2, count=2), prompt(*[("circle", "red")] * 3, count=3)),
        (prompt(*[("circle", "red")] * 4, count=4), prompt(*[("circle", "red")] * 3, count=3)),
        (prompt(*[("circle", "red")] * 5, count=5), prompt(*[("circle", "red")] * 4, count=4)),
        (prompt(("circle", "red", "solid", None)), prompt(("circle", "red", "striped", None))),
        (prompt(("circle", "red", "dotted", "small")), prompt(("circle", "red", "solid", "small"))),
        (prompt(("circle", "red", None, "small")), prompt(("circle", "red", None, "large"))),
        (
            prompt(("star", "red"), ("ring", "red"), relation="inside"),
            prompt(("star", "red"), ("ring", "red"), relation="around"),
        ),
        (
            prompt(("star", "red", "dotted", "small"), ("ring", "blue")),
            prompt(("star", "blue", "dotted", "small"), ("ring", "red")),
        ),
    ],
)
def test_swapped(asked, expected):
    assert swapped(asked) == expected


def test_what_is_right_is_wrong_when_swapped(world: World, drawn):
    kinds = Counter()
    for made in drawn(world, "train", 150):
        asked, seen = prompt_of(made), grade(made.image, world)
        other = swapped(asked)
        if other:
            assert score(asked, seen).correct
            assert not score(other, seen).correct
            kinds[made.category] += 1
    assert set(kinds) == set(world.categories) - {"single"}
    assert min(kinds.values()) > 15


def test_swapping_back_gives_the_prompt():
    for task in ("position", "attribute_binding"):
        for asked in prompts(NANO, task, "dev", 20):
            other = swapped(asked)
            assert other is not None
            assert other != asked
            assert swapped(other) == asked
