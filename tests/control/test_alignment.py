"""Word alignment: which words of a changed prompt stand for which, chunk by chunk."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gobelin.control.alignment import alignment, layout_change
from gobelin.settings import EditSettings
from gobelin.tokenizer import Tokenizer
from gobelin.words import Words

TEXTS = st.lists(st.sampled_from(["a", "red", "ring", "zebra", "of,", "blue!", "(ring)"]), max_size=60).map(" ".join)


def chunked(tokenizer: Tokenizer, prompt: str) -> Words:
    tokens = tokenizer.tokens(prompt)
    room = tokenizer.max_length - 2
    return tokenizer.words_of(prompt, [tokens[at : at + room] for at in range(0, max(1, len(tokens)), room)])


def test_changed_words_stand_in_the_place_of_those_before_them(tokenizer: Tokenizer) -> None:
    source, target = tokenizer.words("a red ring of blue"), tokenizer.words("a zebra ring of a blue")
    mapping = alignment(source, target)
    assert len(target.tokens("zebra")) > 1
    for before, now in (("ring", "ring"), ("of", "of"), ("blue", "blue"), ("red", "zebra")):
        block = mapping[list(source.tokens(before))][:, list(target.tokens(now))]
        assert block.sum().item() == pytest.approx(len(source.tokens(before)))
    assert mapping[:, target.tokens(("a", 1))].eq(0).all()
    assert mapping[0, 0] == 1
    assert mapping[source.part("eos"), target.part("eos")] == 1
    assert mapping.shape == (20, 20)


def test_the_same_prompt_is_itself(tokenizer: Tokenizer) -> None:
    for text in ("a red, ring of blue!", "a red ring " * 15, ""):
        words = chunked(tokenizer, text)
        assert torch.equal(alignment(words, words), torch.eye(words.length))


@given(first=TEXTS, second=TEXTS, longer=st.integers(0, 40))
def test_any_two_prompts_are_aligned_within_what_they_have(
    tokenizer: Tokenizer, first: str, second: str, longer: int
) -> None:
    source, target = (chunked(tokenizer, text) for text in (first, second))
    length = max(source.length, target.length) + longer
    source, target = source.at_length(length), target.at_length(length)
    mapping = alignment(source, target)
    assert mapping.shape == (length, length)
    assert mapping.min() >= 0
    assert mapping[list(source.part("masked"))].eq(0).all(), "what is masked is nobody's"
    assert mapping[:, list(target.part("masked"))].eq(0).all()
    begins = mapping[list(source.part("bos"))]
    assert torch.allclose(begins.sum(dim=1), torch.ones(())), "what a BOS had is given once, to however many chunks"
    assert begins[:, list(target.part("bos"))].sum(dim=0).gt(0).all()
    assert mapping[:, [*target.part("eos"), *target.part("padding")]].sum(dim=0).gt(0).all()
    if len(source.chunks()) == len(target.chunks()):
        assert mapping[:, list(target.part("eos"))].sum(dim=0).eq(1).all()
    taken = mapping[:, list(target.part("text"))]
    assert taken[[*source.part("bos"), *source.part("eos"), *source.part("padding")]].eq(0).all()


@pytest.mark.parametrize(
    ("before", "after", "moves"),
    [
        ("a red circle", "a blue circle", None),
        ("a red circle", "a red ring and a star", None),
        ("two red circles", "three red circles", "number"),
        ("2 circles", "3 circles", "number"),
        ("a circle", "four circles", "number"),
        ("a star to the left of a ring", "a star to the right of a ring", "place"),
        ("a star above a ring", "a star below a ring", "place"),
        ("two stars at the left", "three stars at the Right,", "place"),
        ("three circles", "three squares", None),
        ("", "a circle", None),
    ],
)
def test_numbers_and_places_move_things_and_looks_do_not(
    tokenizer: Tokenizer, before: str, after: str, moves: str | None
) -> None:
    assert layout_change(tokenizer.words(before), tokenizer.words(after)) == moves


def test_what_is_said_of_an_edit_stays_and_the_rest_is_filled_in() -> None:
    plain = EditSettings().filled_for_edit(None)
    assert (plain.cross_replace, plain.self_replace, plain.edit_guidance, plain.local_blend) == (0.8, 0.6, 2.0, None)
    place = EditSettings(self_replace=0.5, local_blend=["ring"]).filled_for_edit("place")
    assert (place.cross_replace, place.self_replace, place.edit_guidance, place.local_blend) == (
        0.15,
        0.5,
        1.0,
        ["ring"],
    )
    assert EditSettings(cross_replace=0.0, edit_guidance=0.0).filled_for_edit("number").cross_replace == 0.0
