import re
from collections.abc import Callable

import pytest

from gobelin.scenes import WORLDS, World
from gobelin.scenes.captions import NOUNS, NUMBERS, WORDINGS, pluralised
from gobelin.scenes.colours import COLOURS

SHAPE_OF = {noun: shape for shape, nouns in NOUNS.items() for noun in nouns}
NOUN = re.compile(rf"\b(?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPE_OF)})\b")
NUMBER_OF = {word: number for number, word in NUMBERS.items()} | {str(number): number for number in NUMBERS}
SHAPE_OF_MANY = {pluralised(noun): shape for noun, shape in SHAPE_OF.items()}
NOUNS_COUNTED = re.compile(
    rf"\b({'|'.join(NUMBER_OF)}) (?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPE_OF_MANY)})(?: and nothing else)?$"
)
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

Reading = tuple[tuple[tuple[str | None, str | None], ...], str | None, int | None]


@pytest.fixture(params=list(WORLDS))
def world(request: pytest.FixtureRequest) -> World:
    return WORLDS[request.param]


@pytest.fixture(scope="session")
def read() -> Callable[[str], Reading]:
    """Reads a caption by its words: (shape, colour) of the objects, relation of the first to the second, number."""

    def read(caption: str) -> Reading:
        text = caption.replace(",", "")
        if counted := NOUNS_COUNTED.search(text):
            count = NUMBER_OF[counted[1]]
            return ((SHAPE_OF_MANY[counted[3]], counted[2]),) * count, None, count
        nouns = list(NOUN.finditer(text))
        objects = tuple((SHAPE_OF[noun[2]], noun[1]) for noun in nouns)
        for wording, relation, side in RELATION_WORDINGS:
            found = re.search(rf"\b{wording}\b", text)
            if found:
                turned = side or found.start() < nouns[0].start()
                return (objects[::-1] if turned else objects), relation, None
        return objects, None, None

    return read
