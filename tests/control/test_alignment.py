"""Which words of a changed prompt stand for which."""

import pytest

from gobelin.control.alignment import alignment
from gobelin.tokenizer import Tokenizer


def test_changed_words_stand_in_the_place_of_those_before_them(tokenizer: Tokenizer) -> None:
    source, target = tokenizer.words("a red ring of blue"), tokenizer.words("a zebra ring of a blue")
    mapping = alignment(source, target)
    assert len(target.tokens("zebra")) > 1
    for before, now in (("ring", "ring"), ("of", "of"), ("blue", "blue"), ("red", "zebra")):
        block = mapping[list(source.tokens(before))][:, list(target.tokens(now))]
        assert block.sum().item() == pytest.approx(len(source.tokens(before)))
    assert mapping[:, target.tokens(("a", 1))].eq(0).all()
    assert mapping[0, 0] == 1
    assert mapping[source.end, target.end] == 1
    assert mapping.shape == (20, 20)
