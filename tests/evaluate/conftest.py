"""Painters that are right, or wrong in one way: true renders of what a prompt asks for."""

from dataclasses import replace

import pytest
from PIL import Image

from gobelin import scenes

RADIUS = 9
CORNERS = ((13, 13), (51, 51), (51, 13), (13, 51), (32, 32))
PLACES = {
    "left of": ((14, 32), (50, 32)),
    "right of": ((50, 32), (14, 32)),
    "above": ((32, 14), (32, 50)),
    "below": ((32, 50), (32, 14)),
    None: CORNERS,
}


@pytest.fixture(scope="session")
def portrait():
    """Renders what a prompt asks for; (shape, colour) in ``more`` are painted too."""

    def render(prompt: scenes.Prompt, world: scenes.World, *more: tuple[str | None, str | None]) -> Image.Image:
        places = [*PLACES[prompt.relation], *(place for place in CORNERS if prompt.relation)]
        things = tuple(
            scenes.SceneObject(
                shape=shape or world.shapes[0], colour=colour or world.colours[at], x=x, y=y, radius=RADIUS
            )
            for at, ((shape, colour), (x, y)) in enumerate(zip([*prompt.objects, *more], places, strict=False))
        )
        scene = scenes.Scene(objects=things, background=world.backgrounds[0], relation=prompt.relation, size=64)
        return Image.fromarray(scenes.render(scene)[0])

    return render


@pytest.fixture(scope="session")
def painters(portrait):
    """Functions from a prompt and its world to a picture, by what is wrong with them."""

    def one_too_many(prompt, world):
        if len(prompt.objects) == 5:  # no room for a sixth
            return portrait(replace(prompt, objects=prompt.objects[:4]), world)
        return portrait(prompt, world, prompt.objects[0])

    return {
        "perfect": portrait,
        "swapping": lambda prompt, world: portrait(scenes.swapped(prompt) or prompt, world),
        "one too many": one_too_many,
        "blank": lambda prompt, world: portrait(replace(prompt, objects=()), world),
    }
