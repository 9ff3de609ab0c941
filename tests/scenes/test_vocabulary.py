"""The vocabulary of worlds against their captions."""

import pytest

from gobelin.scenes import WORLDS, sample
from gobelin.scenes.vocabulary import caption_words, vocabulary


@pytest.mark.parametrize("name", WORLDS)
def test_it_is_every_word_of_the_captions(name: str) -> None:
    world = WORLDS[name]
    words = caption_words(world)
    said = {word for index in range(300) for word in sample(0, index, world=world).caption.replace(",", "").split()}
    assert said <= words
    # Most come up in so few captions; what never does is at most a rare synonym.
    assert len(words - said) < 0.25 * len(words), words - said


@pytest.mark.parametrize("name", WORLDS)
def test_its_phrases_are_of_the_worlds_own_things(name: str) -> None:
    world = WORLDS[name]
    said = vocabulary(world)
    assert set(world.shapes) < set(said["shapes"])
    assert said["colours"] == list(world.colours)
    assert ("numbers" in said) == ("count" in world.categories)
    assert ("sizes" in said) == bool(world.sizes)
    assert all(phrases for phrases in said.values())
