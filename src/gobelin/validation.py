"""Validation of dataclasses: every type, range and name that a person can write, checked in one place.

Fields say what they take by their annotation: ``steps: Annotated[int, Interval(ge=1, le=1000)]`` (``annotated_types``),
``Literal`` for choices. pydantic decides what fits; the sentences are ours.
"""

import ast
import dataclasses
import inspect
import math
import textwrap
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

import annotated_types as at
import numpy as np
from pydantic import ConfigDict, InstanceOf, TypeAdapter, ValidationError

from gobelin.errors import UsageError

Count = Annotated[int, at.Ge(1)]
WholeNumber = Annotated[int, at.Ge(0)]
PositiveNumber = Annotated[float, at.Gt(0)]
NonNegativeNumber = Annotated[float, at.Ge(0)]
Fraction = Annotated[float, at.Interval(ge=0, le=1), "a fraction from 0 to 1"]
"""Of the way from noise to image, of an image's width, of a maximum."""
FractionBelowOne = Annotated[float, at.Interval(ge=0, lt=1), "a fraction from 0 to less than 1"]

_STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "True or False", NoneType: "None"}


@dataclass(frozen=True)
class OnCommandLine:
    """Mark what an option takes on the command line: a type; None keeps it out of there."""

    kind: Any


def validate_fields(instance: Any, but: Collection[str] = ()) -> None:
    """Check every field of a dataclass instance, ``but`` some, against its annotation, for use in ``__post_init__``.

    NumPy scalars become Python's, and a whole number becomes a float where one is expected. Raises
    :class:`UsageError` for the first field that does not fit: its name, what it is, what to give.
    """
    for name, hint in field_hints(type(instance)).items():
        if name in but:
            continue
        value = getattr(instance, name)
        fitting = validated(name, value, hint)
        if fitting is not value:
            object.__setattr__(instance, name, fitting)


def validated(name: str, value: Any, hint: Any) -> Any:
    """The value as ``hint`` has it; raises :class:`UsageError` that calls it ``name`` where it does not fit."""
    if isinstance(value, np.generic):
        value = value.item()
    try:
        return _adapter(hint).validate_python(value)
    except ValidationError:
        raise UsageError(f"{name} is {shown(value)}: give {described(hint)}") from None


def refuse_unknown(given: Iterable[str], known: Iterable[str], what: str = "option") -> None:
    """Raise :class:`UsageError` for the first name that is not known, with the nearest one that is."""
    known = list(known)
    for name in given:
        if name not in known:
            raise UsageError(f"unknown {what} {name!r}: {nearest(name, known)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the one that was probably meant, or all choices."""
    known = list(known)
    # "guidance_scale" and "num_inference_steps" hold the name itself; 0.7 keeps "edit" from meaning "height"
    near = [one for one in known if one in str(name).split("_")] or get_close_matches(str(name), known, 1, 0.7)
    return f"did you mean {near[0]!r}?" if near else f"the choices are {', '.join(known)}"


def described(hint: Any) -> str:
    """Describe what an annotation takes, in words that follow "give": "a whole number from 1 to 1000, or None"."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        said = [one for one in inner[1:] if isinstance(one, str)]
        return said[0] if said else " ".join([described(inner[0]), *_range(inner[1:])])
    if origin is Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(described(one) for one in inner if one is not NoneType))
    if origin is tuple:
        each = described(inner[0])
        return f"several, each {each}" if inner[-1] is Ellipsis else f"{len(inner)} values, each {each}"
    return _WORDS.get(hint) or f"a {getattr(hint, '__name__', hint)}"


@cache
def field_hints(cls: type) -> Mapping[str, Any]:
    """The annotations of a dataclass's fields, by name, with what ``Annotated`` adds to them.

    Names in quotes within an annotation are left alone: they are of types that cannot be imported everywhere.
    """
    hints: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        hints |= inspect.get_annotations(base, eval_str=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    if dataclasses.is_dataclass(hint):  # it has checked itself
        return TypeAdapter(InstanceOf[hint])  # pyright: ignore[reportInvalidTypeForm]
    return TypeAdapter(hint, config=_STRICT)


def _range(metadata: Iterable[Any]) -> list[str]:
    low = high = above = below = None
    for one in metadata:
        low, above = getattr(one, "ge", low), getattr(one, "gt", above)
        high, below = getattr(one, "le", high), getattr(one, "lt", below)
        if isinstance(one, at.MinLen):
            return [f"of {one.min_length} or more"]
    if low is not None and high is not None:
        return [f"from {low} to {high}"]
    parts = [(low, "of {} or more"), (above, "above {}"), (high, "of {} at most"), (below, "below {}")]
    said = [sentence.format(bound) for bound, sentence in parts if bound is not None]
    return [" and ".join(said)] if said else []


def shown(value: Any) -> str:
    """Show a value in a sentence: short, on one line, and never the numbers of a tensor."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, int) and abs(value) > 10**80:
        return "a number of very many digits"  # Python refuses to write some
    plain = value is None or isinstance(value, bool | int | float | str | list | tuple | dict)
    text = repr(value) if plain else f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}…"


def field_docs(cls: Any) -> Mapping[str, str]:
    """Read the text below each field of a dataclass, by name, in one line each."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            docs |= _own_docs(cast(type, base))
    return docs


@cache
def _own_docs(cls: type) -> Mapping[str, str]:
    """Read the texts below the fields that a class adds to those of its bases."""
    docs: dict[str, str] = {}
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(node, ast.ClassDef)
    for field, text in zip(node.body, node.body[1:], strict=False):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=said)):
                docs[name] = " ".join(str(said).split())
            case _:
                pass
    return docs
