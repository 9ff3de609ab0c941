"""Options of a dataclass: what is read, and what its help shows."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Interval
from hypothesis import given
from hypothesis import strategies as st

from gobelin.cli.options import Positional, parse
from gobelin.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Inner:
    """A section of a configuration."""

    rate: Annotated[float, Interval(ge=0, le=1)] = 0.5
    """Rate."""
    shift: bool = True
    """Shift."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Betas."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command."""

    texts: Positional[tuple[str, ...]] = ()
    """Texts."""
    count: int | None = None
    """Count."""
    kind: Literal["a", "b"] = "a"
    """Kind."""
    file: Path | None = None
    """File."""
    words: tuple[str, ...] = ()
    """Words."""
    flag: bool = False
    """Flag."""
    inner: Inner


def read(*arguments: str) -> Command:
    return parse(Command, "command", arguments, default=Command(inner=Inner()))


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        ("", {}),
        ("x y", {"texts": ("x", "y")}),
        ("x --count 3 y", {"texts": ("x", "y"), "count": 3}),
        ("--count=-3", {"count": -3}),
        ("--count -3 x", {"texts": ("x",), "count": -3}),
        ("--kind b --file a/b.png --flag", {"kind": "b", "file": Path("a/b.png"), "flag": True}),
        ("x --words y z", {"texts": ("x",), "words": ("y", "z")}),
        ("--words -1 - -.5", {"words": ("-1", "-", "-.5")}),
        ("--words=--flag", {"words": ("--flag",)}),
        ("--flag -- --count -h", {"flag": True, "texts": ("--count", "-h")}),
        ("--inner.rate 1", {"inner": Inner(rate=1.0)}),
        ("--inner.no-shift --inner.betas 0.1 .2", {"inner": Inner(shift=False, betas=(0.1, 0.2))}),
    ],
)
def test_options_are_read(arguments: str, changed: dict[str, Any]) -> None:
    default: dict[str, Any] = {"inner": Inner()}
    assert read(*arguments.split()) == Command(**(default | changed))


@given(st.lists(st.text("ax-=1. ") | st.sampled_from(["--", "--count", "--inner.rate", "--words"]), max_size=6))
def test_any_arguments_are_read_or_refused(arguments: list[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        return
    with contextlib.suppress(UsageError):
        assert isinstance(read(*arguments), Command)


def test_the_help_shows_what_options_take(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as leaving:
        read("--help")
    assert not leaving.value.code
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for line in (
        "--count INT Count.",
        "--kind {a,b} Kind. (default: a)",
        "--file PATH File.",
        "--words TEXT … Words.",
        "--flag Flag.",
        "--inner.rate FLOAT Rate. (default: 0.5)",
        "--inner.no-shift Shift.",
        "--inner.betas FLOAT FLOAT Betas. (default: 0.9 0.99)",
    ):
        assert line in shown
    assert "inner options" in shown
    assert "None" not in shown
