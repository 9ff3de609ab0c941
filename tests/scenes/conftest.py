import re
from collections.abc import Callable

import pytest

from gobelin.scenes import WORLDS, World
from gobelin.scenes.captions import NOUNS, WORDINGS
from gobelin.scenes.colours import COLOURS

SHAPE_OF = {noun: shape for shape, nouns in NOUNS.items() for noun in nouns}
NOUN = re.compile(rf"\b(?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPE_OF)})\b")
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

Reading = tuple[tuple[tuple[str | None, str | None], ...], str | None]


@pytest.fixture(params=list(WORLDS))
def world(request: pytest.FixtureRequest) -> World:
    return WORLDS[request.param]


@pytest.fixture(scope="session")
def read() -> Callable[[str], Reading]:
    """Reads a caption by its words: (shape, colour) of the objects, relation of the first to the second."""

    def read(caption: str) -> Reading:
        text = caption.replace(",", "")
        nouns = list(NOUN.finditer(text))
        objects = tuple((SHAPE_OF[noun[2]], noun[1]) for noun in nouns)
        for wording, relation, side in RELATION_WORDINGS:
            found = re.search(rf"\b{wording}\b", text)
            if found:
                turned = side or found.start() < nouns[0].start()
                return (objects[::-1] if turned else objects), relation
        return objects, None

    return read
