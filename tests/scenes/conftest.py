import re
from collections.abc import Callable

import pytest

from gobelin.scenes import WORLDS, Sample, World, sample
from gobelin.scenes.captions import NOUNS, NUMBERS, WORDINGS, pluralised
from gobelin.scenes.colours import BACKGROUNDS, COLOURS
from gobelin.scenes.textures import TEXTURES

SHAPE_OF = {noun: shape for shape, nouns in NOUNS.items() for noun in nouns}
LOOKS = rf"(?:(small|large) )?(?:({'|'.join(TEXTURES)}) )?(?:({'|'.join(COLOURS)}) )?"
NOUN = re.compile(rf"\b{LOOKS}({'|'.join(SHAPE_OF)})\b")
PLACE = re.compile(
    r" (at the (left|right|top|bottom)|near the (top|bottom)|on the (left|right) side|in the \w+ half)\b"
)
GROUND = re.compile(rf" ?\b(?:on|against) a ({'|'.join(BACKGROUNDS)}) background ?")
NUMBER_OF = {word: number for number, word in NUMBERS.items()} | {str(number): number for number in NUMBERS}
SHAPE_OF_MANY = {pluralised(noun): shape for noun, shape in SHAPE_OF.items()}
NOUNS_COUNTED = re.compile(rf"\b({'|'.join(NUMBER_OF)}) {LOOKS}({'|'.join(SHAPE_OF_MANY)})(?: and nothing else)?$")
# (wording, relation, after both objects?), the longest first: "on the left of" has "on the left" in it.
RELATION_WORDINGS = sorted(
    (
        (wording, relation, side)
        for relation, wordings in WORDINGS.items()
        for pair in wordings
        for wording, side in zip(pair, (False, True), strict=True)
    ),
    key=lambda row: -len(row[0]),
)

Reading = tuple[tuple[tuple[str | None, ...], ...], str | None, int | None]


def wanted(size: str | None, texture: str | None, colour: str | None, shape: str | None) -> tuple[str | None, ...]:
    """As ``Phrasing.wanted`` has it."""
    return (shape, colour, texture, size) if texture or size else (shape, colour)


@pytest.fixture(params=list(WORLDS))
def world(request: pytest.FixtureRequest) -> World:
    return WORLDS[request.param]


@pytest.fixture(scope="session")
def drawn() -> Callable[[World, str, int], list[Sample]]:
    """Draws so many samples of a world's split, and remembers them."""
    remembered: dict[tuple[str, str], list[Sample]] = {}

    def drawn(world: World, split: str, count: int) -> list[Sample]:
        samples = remembered.setdefault((world.name, split), [])
        samples += [sample(11, index, world, split) for index in range(len(samples), count)]
        return samples[:count]

    return drawn


@pytest.fixture(scope="session")
def read() -> Callable[[str], Reading]:
    """Reads a caption by its words: the looks of the objects, relation of the first to the second, number."""

    def read(caption: str) -> Reading:
        text = PLACE.sub("", GROUND.sub("", caption.replace(",", "")))
        if counted := NOUNS_COUNTED.search(text):
            count = NUMBER_OF[counted[1]]
            return (wanted(*counted.groups()[1:4], SHAPE_OF_MANY[counted[5]]),) * count, None, count
        nouns = list(NOUN.finditer(text))
        objects = tuple(wanted(noun[1], noun[2], noun[3], SHAPE_OF[noun[4]]) for noun in nouns)
        for wording, relation, side in RELATION_WORDINGS:
            found = re.search(rf"\b{wording}\b", text)
            if found:
                turned = side or found.start() < nouns[0].start()
                return (objects[::-1] if turned else objects), relation, None
        return objects, None, None

    return read
