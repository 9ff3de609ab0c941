"""Validation: what a field takes in words, and one sentence for whatever does not fit."""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import pytest
import torch
from annotated_types import Ge, Gt, Interval, Le, MinLen
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import sentence_of

from gobelin.errors import UsageError
from gobelin.validation import described, nearest, refuse_unknown, shown, validate_fields, validated


@dataclass(frozen=True, kw_only=True)
class Recipe:
    eggs: Annotated[int, Interval(ge=0, le=12)] = 3
    grams: float = 0.5
    name: str | None = None
    oven: bool = False
    shape: Literal["round", "square"] = "round"
    steps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        validate_fields(self)


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int, "a whole number"),
        (float, "a number"),
        (str | None, "text"),
        (bool, "True or False"),
        (Literal["a", "b"], "one of 'a', 'b'"),
        (Annotated[int, Interval(ge=1, le=9)], "a whole number from 1 to 9"),
        (Annotated[float, Ge(0)], "a number of 0 or more"),
        (Annotated[float, Gt(0)], "a number above 0"),
        (Annotated[int, Le(5)] | None, "a whole number of 5 at most"),
        (Annotated[int, "the number of eggs"], "the number of eggs"),
        (tuple[int, ...], "several, each a whole number"),
        (tuple[float, float], "2 values, each a number"),
        (int | str, "a whole number or text"),
        (Annotated[str, MinLen(1)], "text of 1 or more"),
    ],
)
def test_annotations_are_said_in_words(hint, words: str) -> None:
    assert described(hint) == words


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eggs": "3"}, "eggs is '3': give a whole number from 0 to 12"),
        ({"eggs": 3.0}, "eggs is 3.0: give a whole number from 0 to 12"),
        ({"eggs": True}, "eggs is True: give a whole number from 0 to 12"),
        ({"eggs": 13}, "eggs is 13: give a whole number from 0 to 12"),
        ({"grams": float("nan")}, "grams is nan: give a number"),
        ({"grams": float("inf")}, "grams is inf: give a number"),
        ({"grams": "much"}, "grams is 'much': give a number"),
        ({"name": 3}, "name is 3: give text"),
        ({"oven": 1}, "oven is 1: give True or False"),
        ({"shape": "flat"}, "shape is 'flat': give one of 'round', 'square'"),
        ({"steps": (1, "2")}, "steps is (1, '2'): give several, each a whole number"),
        ({"name": torch.zeros(3)}, "name is a Tensor: give text"),
        ({"name": np.zeros(3)}, "name is a ndarray: give text"),
        ({"eggs": None}, "eggs is None: give a whole number from 0 to 12"),
    ],
)
def test_what_does_not_fit_is_said_in_one_sentence(options: dict, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        Recipe(**options)
    assert str(raised.value) == message


def test_numpys_numbers_and_whole_ones_become_pythons() -> None:
    recipe = Recipe(eggs=np.int64(4), grams=np.float32(0.25), oven=np.bool_(True))
    assert (recipe.eggs, recipe.grams, recipe.oven) == (4, 0.25, True)
    assert all(type(value) in (int, float, bool) for value in (recipe.eggs, recipe.grams, recipe.oven))
    assert type(Recipe(grams=2).grams) is float


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(),
    st.lists(st.integers() | st.text(), max_size=40),
    st.dictionaries(st.text(), st.integers()),
    st.sampled_from([object(), int, len, ..., np.zeros(3), torch.ones(2, 2), np.float64(2), np.int8(3), 1j, {1}]),
)


@given(name=st.sampled_from(["eggs", "grams", "name", "oven", "shape", "steps"]), value=ANYTHING)
def test_any_value_fits_or_is_a_sentence(name: str, value: object) -> None:
    said = sentence_of(lambda: Recipe(**{name: value}))
    if said is not None:
        assert said.startswith(f"{name} is ")
        assert ": give " in said
        assert len(said) < 200


@given(ANYTHING)
def test_values_are_shown_in_a_short_line(value: object) -> None:
    assert "\n" not in shown(value)
    assert len(shown(value)) <= 80


def test_the_nearest_name_is_found() -> None:
    names = ["steps", "guidance", "seed", "height", "width", "negative_prompt"]
    for wrong, right in (("step", "steps"), ("guidance_scale", "guidance"), ("negativ_prompt", "negative_prompt")):
        assert nearest(wrong, names) == f"did you mean {right!r}?"
    assert nearest("zzz", names) == f"the choices are {', '.join(names)}"
    refuse_unknown(["steps"], names)
    with pytest.raises(UsageError, match="unknown sampler 'stpes': did you mean 'steps'"):
        refuse_unknown(["seed", "stpes"], names, what="sampler")


def test_a_single_value_is_validated_under_any_name() -> None:
    assert validated("x", 2, float) == 2.0
    with pytest.raises(UsageError, match="the start of a trace is 'x': give a number"):
        validated("the start of a trace", "x", float)
