"""What the commands share: reading options into a dataclass, and writing reports."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from gobelin.formats.files import write_json

Options = TypeVar("Options")


def parse(options: type[Options], command: str, arguments: Sequence[str], default: Options | None = None) -> Options:
    """Read a command's options; their dataclass' docstrings are its help. Leaves with 2 where they are wrong."""
    prog, style = f"gobelin {command}", (tyro.conf.FlagCreatePairsOff,)
    if default is None:
        return tyro.cli(options, prog=prog, args=list(arguments), config=style)
    return tyro.cli(options, prog=prog, args=list(arguments), config=style, default=default)


def write_report(file: Path | None, report: Any) -> None:
    """Write a report where ``--json FILE`` asks for one."""
    if file is not None:
        write_json(file, report)
