from dataclasses import replace

import numpy as np
import pytest

from gobelin.scenes import (
    NANO,
    Prompt,
    Sample,
    Scene,
    SceneObject,
    Verdict,
    World,
    grade,
    judge,
    render,
    sample,
)

CIRCLE = SceneObject(shape="circle", colour="red", x=16, y=32, radius=10)
SQUARE = SceneObject(shape="square", colour="blue", x=47, y=30, radius=10)


def verdict(prompt: Prompt, *objects: SceneObject) -> Verdict:
    return judge(prompt, grade(render(Scene(objects=objects, background="paper"))[0], NANO))


def prompt(*objects: tuple[str | None, str | None], relation: str | None = None) -> Prompt:
    return Prompt(text="", task="", objects=objects, relation=relation)


def prompt_of(made: Sample) -> Prompt:
    objects = tuple((thing.shape, thing.colour) for thing in made.scene.objects)
    return prompt(*objects, relation=made.scene.relation)


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
def test_verdicts(asked, correct, colour, shape, exact):
    expected = Verdict(correct=correct, colour=colour, shape=shape, exact=exact)
    assert verdict(asked, CIRCLE, SQUARE) == expected


def test_nothing_is_wrong_for_every_prompt():
    nothing = Verdict(correct=False, colour=False, shape=False, exact=False)
    assert verdict(prompt(("circle", "red"))) == nothing


def test_true_prompts_score_and_shuffled_ones_are_at_chance(world: World):
    made = [sample(31, index, world) for index in range(300)]
    seen = [grade(one.image, world) for one in made]
    asked = [prompt_of(one) for one in made]
    assert np.mean([judge(*both).exact for both in zip(asked, seen, strict=True)]) >= 0.995
    shuffled = [asked[at] for at in np.random.default_rng(0).permutation(len(asked))]
    assert np.mean([judge(*both).exact for both in zip(shuffled, seen, strict=True)]) < 0.06


def test_swapped_attributes_and_relations_score_nothing(world: World):
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    swapped = turned = 0
    for index in range(200):
        made = sample(32, index, world)
        asked, seen = prompt_of(made), grade(made.image, world)
        if len(asked.objects) == 2:
            (shape, colour), (other_shape, other_colour) = asked.objects
            if shape != other_shape and colour != other_colour:
                objects = ((shape, other_colour), (other_shape, colour))
                assert not judge(replace(asked, objects=objects, relation=None), seen).correct
                swapped += 1
        if asked.relation:
            assert not judge(replace(asked, relation=opposite[asked.relation]), seen).correct
            turned += 1
    assert min(swapped, turned) > 30
