"""Command-line options: the fields of dataclasses, their help drawn by tyro, and every mistake in one sentence.

tyro's own parser tells of a mistake in a box of several lines, so arguments are taken apart here: a mistake gets the
same sentence in every command.
"""

import contextlib
import dataclasses
import inspect
import math
import re
import shutil
import textwrap
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, dataclass
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin

from gobelin.errors import UsageError
from gobelin.formats.files import write_json
from gobelin.settings import Settings
from gobelin.validation import OnCommandLine, described, field_docs, field_hints, validated

Options = TypeVar("Options")
_Value = TypeVar("_Value")
_POSITIONAL = object()
Positional = Annotated[_Value, _POSITIONAL]
"""A field that is given without its name, as a command's prompt is."""
_METAVARS = {int: "INT", float: "FLOAT", Path: "PATH", "path": "PATH", "words": "WORD …", "weights": "WORD=NUMBER …"}
_DESCRIBED = {"words": "words", "weights": "WORD=NUMBER, as in red=2"}
_WIDEST = 100  # columns of a paragraph of help: longer lines are hard to read


@dataclass(frozen=True)
class SettingsOf:
    """Mark a field as the settings that are given as options: a dict, ready for ``settings(**dict)``."""

    settings: type[Settings]


@dataclass(frozen=True)
class Named:
    """Mark a field with its name on the command line; a section's fields have no prefix where that is empty."""

    name: str


@dataclass(frozen=True, kw_only=True)
class CommandOption:
    """An option: its place in the options' class, its name as typed, and what it takes."""

    path: tuple[str, ...]
    name: str
    positional: bool
    hint: Any
    kind: Any
    default: Any
    text: str
    group: str

    @property
    def arity(self) -> tuple[int, float]:
        """The fewest and the most values."""
        if self.kind is bool:
            return 0, 0
        each = get_args(self.kind) if get_origin(self.kind) is tuple else (self.kind,)
        if each[-1] in (..., "words", "weights"):
            return 1, float("inf")
        return len(each), len(each)

    @property
    def metavar(self) -> str:
        """The value as the help writes it."""
        if get_origin(self.kind) is Literal:
            return "{" + ",".join(map(str, get_args(self.kind))) + "}"
        if get_origin(self.kind) is tuple:
            each = _METAVARS.get(get_args(self.kind)[0], "TEXT")
            return f"{each} …" if self.arity[1] > self.arity[0] else " ".join([each] * self.arity[0])
        return _METAVARS.get(self.kind, "TEXT")

    @property
    def takes(self) -> str:
        """Describe what to give, in words; empty for text and paths, where only the help says it."""
        if self.metavar.split()[0] not in ("TEXT", "PATH"):
            return _DESCRIBED.get(self.kind) or described(self.hint)
        first = self.text.split(". ")[0].rstrip(".")
        return f"{self.metavar} ({first[:1].lower() + first[1:] if first.split(' ')[0].istitle() else first})"

    @property
    def hinted(self) -> str:
        """The end of the option's help: its default, where it has one that says something."""
        if self.default is MISSING:
            return "(required)"
        if self.default in (None, (), ""):
            return ""
        shown = " ".join(map(str, self.default)) if isinstance(self.default, tuple) else self.default
        return "" if self.kind is bool else f"(default: {shown})"


def parse(options: type[Options], command: str, arguments: Sequence[str], default: Options | None = None) -> Options:
    """Read a command's options into its dataclass; the texts below its fields are the help.

    Raises :class:`UsageError` in one sentence for an option that is unknown (with the nearest one), repeated, missing,
    without its value or with one that does not fit, and for an argument too many.
    """
    known = list(_options_of(options, default))
    if {"-h", "--help"} & set(takewhile("--".__ne__, arguments)):
        print_help(options, command, known)
    changes: dict[str, Any] = {}
    for option, texts in list(_take_apart(arguments, known, command)):
        inner = changes
        for part in option.path[:-1]:
            inner = inner.setdefault(part, {})
        inner[option.path[-1]] = _value(option, texts)
    return _built(options, default, changes)


def write_report(file: Path | None, report: Any) -> None:
    """Write a report where ``--json FILE`` asks for one."""
    if file is not None:
        write_json(file, report)


def _options_of(
    cls: type, default: Any, path: tuple[str, ...] = (), prefix: tuple[str, ...] = ()
) -> Iterator[CommandOption]:
    """List the options that a dataclass's fields are: a class's own before those that it inherits."""
    docs, hints = field_docs(cls), field_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for base in cls.__mro__:
        for name in inspect.get_annotations(base):
            field = fields.pop(name, None)
            if field is None:
                continue
            said = getattr(hints[name], "__metadata__", ())
            settings = [one.settings for one in said if isinstance(one, SettingsOf)]
            value = field.default if default is None else getattr(default, name)
            renamed = [one.name for one in said if isinstance(one, Named)]
            shown = renamed[0] if renamed else name.replace("_", "-")
            if settings:
                yield from _options_of(settings[0], None, (*path, name), prefix)
            elif dataclasses.is_dataclass(value):
                yield from _options_of(type(value), value, (*path, name), (*prefix, *filter(None, [shown])))
            else:
                kinds = [one.kind for one in said if isinstance(one, OnCommandLine)]
                kind = kinds[0] if kinds else _plain(hints[name])
                positional = _POSITIONAL in said
                if kind is bool and value is True:
                    shown = f"no-{shown}"
                if kind is not None:
                    yield CommandOption(
                        path=(*path, name),
                        name=shown.upper() if positional else "--" + ".".join((*prefix, shown)),
                        positional=positional,
                        hint=kind if kinds else hints[name],
                        kind=kind,
                        default=value,
                        text=docs.get(name, ""),
                        group=".".join(prefix) or _group(base),
                    )


def _group(cls: type) -> str:
    """The heading of a class's options in the help: "model" of ModelOptions, none of a command's own class."""
    if cls.__name__.endswith("Settings"):
        return cls.__name__.removesuffix("Settings").lower() or "image"
    return vars(cls).get("group", "")


def _plain(hint: Any) -> Any:
    """Take the type of an annotation: without ``Annotated``, and without None beside it."""
    if get_origin(hint) is Annotated:
        return _plain(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return _plain(next(one for one in get_args(hint) if one is not NoneType))
    return hint


def _take_apart(
    arguments: Sequence[str], known: Sequence[CommandOption], command: str
) -> Iterator[tuple[CommandOption, Sequence[str]]]:
    """Take arguments apart: each option that is given, and its texts. Raises :class:`UsageError` as :func:`parse`."""
    by_name = {option.name: option for option in known if not option.positional}
    given: dict[str, list[str]] = {}
    loose: list[str] = []
    rest = deque(arguments)
    while rest:
        argument = rest.popleft()
        if argument == "--":
            loose += rest
            break
        if not _is_option(argument):
            loose.append(argument)
            continue
        name, equals, value = argument.partition("=")
        if name not in by_name:
            raise UsageError(f"unknown option {name}: {_nearest_option(name, by_name, command)}")
        if name in given:
            raise UsageError(f"{name} is given twice: give it once")
        fewest, most = by_name[name].arity
        values = [value] if equals else []
        while not equals and len(values) < most and rest and not _is_option(rest[0]):
            values.append(rest.popleft())
        if len(values) > most:
            raise UsageError(f"{name} takes no value: leave out {value!r}")
        if len(values) < fewest:
            has = f"{' '.join(values)} alone" if values else "no value"
            raise UsageError(f"{name} has {has}: give {by_name[name].takes}")
        given[name] = values
        yield by_name[name], values
    for option in known:
        if option.positional and loose:
            count = len(loose) if option.arity[1] > 1 else 1
            given[option.name], loose = loose[:count], loose[count:]
            yield option, given[option.name]
    if loose:
        raise UsageError(
            f"{loose[0]!r} is one argument too many: put several words in quotes, or see gobelin {command} --help"
        )
    for option in known:
        if option.default is MISSING and option.name not in given:
            raise UsageError(f"{option.name} is missing: give {option.takes}")


def _is_option(argument: str) -> bool:
    """Tell an option from a value: a dash alone and negative numbers are values."""
    return len(argument) > 1 and argument.startswith("-") and not re.match(r"-\.?\d|-inf|-nan", argument)


def _nearest_option(name: str, known: Iterable[str], command: str) -> str:
    """End a sentence about an unknown option: those of which it is a part, or the one that is spelt most like it."""
    plain = name.lstrip("-").replace("_", "-")
    names = [one.removeprefix("--") for one in known]
    near = (
        [one for one in names if one.split(".")[-1] == plain]
        or [one for one in names if plain in re.split(r"[.-]", one)][:3]
        or get_close_matches(plain, names, 1, 0.7)
    )
    return f"did you mean {' or '.join(f'--{one}' for one in near)}?" if near else f"see gobelin {command} --help"


def print_help(options: type, command: str, known: Sequence[CommandOption]) -> None:
    """Print a command's help: what its class says, and its options as tyro draws them."""
    import tyro  # which nothing else needs

    print(_wrapped(inspect.getdoc(options) or ""), end="\n\n")
    groups: dict[str, list[tuple[str, Any, Any]]] = {"": []}
    for index, option in enumerate(known):
        flag = option.kind is bool
        shown = tyro.conf.arg(
            name=option.name.lstrip("-"),
            metavar=option.name if option.positional else None if flag else option.metavar,
            help=option.text,
            help_behavior_hint=option.hinted,
        )
        hint = Annotated[bool if flag else str | None, shown]
        hint = tyro.conf.Positional[hint] if option.positional else hint
        groups.setdefault(option.group, []).append((f"option{index}", hint, False if flag else None))
    fields = groups.pop("")
    for index, (title, inner) in enumerate(groups.items()):
        group = _made(inner)
        hint = tyro.conf.OmitArgPrefixes[Annotated[group, tyro.conf.arg(name=title, help="")]]
        fields.append((f"group{index}", hint, group()))
    tyro.cli(
        _made(fields),
        prog=f"gobelin {command}",
        description="",
        args=["--help"],
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
    )


def _made(fields: list[tuple[str, Any, Any]]) -> type:
    made = dataclasses.make_dataclass("Shown", fields, frozen=True, kw_only=True)
    made.__doc__ = ""
    return made


def _wrapped(text: str) -> str:
    """Wrap paragraphs to the terminal's width; indented lines are examples and stay."""
    width = min(_WIDEST, shutil.get_terminal_size().columns)
    paragraphs = text.split("\n\n")
    return "\n\n".join(one if "\n  " in one else textwrap.fill(" ".join(one.split()), width) for one in paragraphs)


def _value(option: CommandOption, texts: Sequence[str]) -> Any:
    """Convert the texts of an option; raises :class:`UsageError` where they do not fit."""
    kind = option.kind
    if kind is bool:
        return not option.default
    if kind == "weights":
        return dict(_word_weight(option.name, text) for text in texts)
    if kind in ("words", "path"):
        return tuple(texts) if kind == "words" else texts[0]
    if get_origin(kind) is tuple:
        value: Any = tuple(_converted(get_args(kind)[0], text) for text in texts)
    else:
        value = _converted(kind, texts[0])
    return validated(option.name, value, option.hint)


def _converted(kind: Any, text: str) -> Any:
    """Convert a text to a number or a path, where it is one."""
    if kind in (int, float, Path):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _word_weight(name: str, text: str) -> tuple[str, float]:
    word, _, number = text.rpartition("=")
    weight = _converted(float, number)
    if not isinstance(weight, float) or not math.isfinite(weight):
        raise UsageError(f"{name} has {text!r}: give {_DESCRIBED['weights']}")
    return word, weight


def _built(cls: type[Options], default: Options | None, changes: dict[str, Any]) -> Options:
    """Make the options' dataclass, and those within it, of a default and what changes."""
    inner = {
        name: _built(type(before), before, value)
        if dataclasses.is_dataclass(before := getattr(default, name, None))
        else value
        for name, value in changes.items()
    }
    return cls(**inner) if default is None else dataclasses.replace(cast(Any, default), **inner)
