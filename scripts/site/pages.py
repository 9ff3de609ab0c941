"""Write the site's generated pages: ``python scripts/site/pages.py docs/reference``.

The API reference has a page for each module or package that the navigation in ``zensical.toml`` names; the command line
is read from the option classes of its commands; the notebook is shown as it was executed. The index of
``docs/decisions.md`` is brought up to date beside.
"""

import argparse
import base64
import inspect
import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import griffe

import gobelin
import gobelin.cli.options
from gobelin.cli.main import COMMANDS, command_module
from gobelin.cli.options import CommandOption

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "notebooks" / "gobelin.ipynb"
DECISIONS = ROOT / "docs" / "decisions.md"
SITE = ROOT / "zensical.toml"
FOLDER = "reference/"
NO_API = ("__main__", "cli", "models")  # faces and weights
OTHER_PAGES = ("gobelin", "command-line", "notebook")
_LISTS_OF_ACTIONS = ("_ACTIONS", "_MEASUREMENTS")  # of commands that have several


def main() -> None:
    """Write every generated page into a folder, and the index of the decisions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    write_pages(parser.parse_args().folder)
    _write_if_changed(DECISIONS, with_index(DECISIONS.read_text(encoding="utf-8")))


def with_index(text: str) -> str:
    """Put a list of a page's headings, linked, in the place of the one that it has."""
    lines = []
    for title in re.findall(r"^## (.+)$", text, re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")  # as GitHub and the site name headings
        lines.append(f"- [{title}](#{slug})")
    index = "\n".join(["<!-- index -->", "", *lines, "", "<!-- /index -->"])
    return re.sub(r"<!-- index -->.*?<!-- /index -->", lambda _: index, text, flags=re.DOTALL)


def write_pages(folder: Path) -> None:
    """Write the pages; raises where the navigation lacks a module, or names one that is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    named, there = set(_api_pages_named()), set(_modules())
    if missing := sorted(there - named):
        raise SystemExit(f"{SITE.name} has no page for {', '.join(missing)}: add {FOLDER}NAME.md to its nav")
    if surplus := sorted(named - there):
        raise SystemExit(f"{SITE.name} names {', '.join(surplus)}, which gobelin does not have")
    pages = {
        "gobelin": _names_page(),
        "command-line": _command_line_page(),
        "notebook": _notebook_page(NOTEBOOK, folder),
        **{name: _api_page(name) for name in sorted(there)},
    }
    for name, text in pages.items():
        _write_if_changed(folder / f"{name}.md", text)
    for stale in set(folder.glob("*.md")) - {folder / f"{name}.md" for name in pages}:
        stale.unlink()


def _write_if_changed(file: Path, text: str) -> None:
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")


def _api_pages_named() -> Iterator[str]:
    """List the modules that the navigation names."""

    def files(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for part in entry.values() if isinstance(entry, dict) else entry:
                yield from files(part)

    for file in files(tomllib.loads(SITE.read_text(encoding="utf-8"))["project"]["nav"]):
        if file.startswith(FOLDER) and (name := file[len(FOLDER) : -len(".md")]) not in OTHER_PAGES:
            yield name


def _modules() -> list[str]:
    """List the public modules and packages by their names."""
    return [name for name in _package().modules if not name.startswith("_") and name not in NO_API]


def _api_page(name: str) -> str:
    """Write a module's page: itself, and of a package every module, each name where it is defined."""
    module = _package()[name]
    parts = [f"# gobelin.{name} {{ #gobelin.{name} }}\n", _directive(module.path, heading=False)]
    if module.exports:
        links = ", ".join(_link_to(f"{name}.{exported}", str(exported)) for exported in module.exports)
        parts.insert(1, f"Import from `gobelin.{name}`: {links}.\n")
    return "\n".join([*parts, *(_directive(path) for path in _below(module))])


def _below(package: griffe.Object | griffe.Alias) -> Iterator[str]:
    """List the public modules of a package, and of packages in it, by their paths."""
    for name, module in sorted(package.modules.items()):
        if not module.is_alias and not name.startswith("_"):
            yield module.path
            yield from _below(module)


def _directive(path: str, heading: bool = True) -> str:
    hidden = "    options:\n      show_root_heading: false\n      show_root_toc_entry: false\n"
    return f"::: {path}\n" + ("" if heading else hidden)


@cache
def _package() -> griffe.Object:
    """Read the package without importing it."""
    package = griffe.load("gobelin", search_paths=[ROOT / "src"])
    assert isinstance(package, griffe.Object)
    return package


def _link_to(path: str, shown: str) -> str:
    """Link to the place where what is imported under ``path`` is defined."""
    found = _package()[path]
    return f"[`{shown}`][{found.final_target.path if isinstance(found, griffe.Alias) else found.path}]"


def _names_page() -> str:
    """Write the page of what ``gobelin`` itself has: a line for each name."""
    rows = []
    for name in sorted(gobelin.__all__, key=str.lower):
        said = (inspect.getdoc(getattr(gobelin, name)) or "").split("\n\n")[0].replace("\n", " ")
        said = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", said).replace("``", "`").replace("|", "\\|")
        rows.append(f"| {_link_to(name, name)} | {said} |")
    table = "\n".join(["| name | |", "|---|---|", *rows])
    doc = inspect.getdoc(gobelin) or ""
    return f"# gobelin {{ #gobelin }}\n\n{doc.replace('``', '`')}\n\n{table}\n"


class _Captured(Exception):
    """A command's class and its options, on their way to the help."""

    def __init__(self, cls: type, command: str, options: Sequence[CommandOption]):
        self.cls, self.options = cls, options


def _capture(cls: type, command: str, options: Sequence[CommandOption]) -> None:
    raise _Captured(cls, command, options)


def _command_line_page() -> str:
    """Write the reference of the command line from the very classes that read it."""
    parts = [
        "# Command line\n",
        "Every command prints this with `--help`. Anywhere, `--debug` shows an error's traceback. A mistake is one "
        "sentence on standard error, and the exit status 2; what fails otherwise leaves with 1, an interruption with "
        "130.\n",
    ]
    for command in COMMANDS:
        parts.append(f"## gobelin {command} {{ #{command} }}\n")
        for words, captured in _commands(command):
            if len(words) > 1:
                parts.append(f"### gobelin {' '.join(words)} {{ #{'-'.join(words)} }}\n")
            parts.append(_command(words, captured))
    return "\n".join(parts)


def _commands(command: str) -> Iterator[tuple[Sequence[str], _Captured]]:
    """Find a command's option class, or those of its actions."""
    module = command_module(command)
    actions = [[name] for listed in _LISTS_OF_ACTIONS for name in getattr(module, listed, ())] or [[]]
    for action in actions:
        try:
            with mock.patch.object(gobelin.cli.options, "print_help", _capture):
                module.run([*action, "--help"])
        except _Captured as captured:
            yield [command, *action], captured


def _command(words: Sequence[str], captured: _Captured) -> str:
    description, _, examples = (inspect.getdoc(captured.cls) or "").partition("Some examples:")
    parts = [f"{description.strip()}\n"]
    if examples.strip():
        lines = "\n".join(line.strip() for line in examples.strip().splitlines())
        parts.append(f"```console\n{lines}\n```\n")
    # Positional arguments stand first, and what all commands share, the model's options, last.
    options = sorted(captured.options, key=lambda option: (not option.positional, option.group == "model"))
    return "\n".join([*parts, "| option | |", "|---|---|", *map(_row, options), ""])


def _row(option: CommandOption) -> str:
    """Write an option as a row of a table: its name with what it takes, and its help with its default."""
    takes = option.metavar.strip("{}").replace(",", ", ")
    name = f"*{option.name}*" if option.positional else f"`{option.name}`"
    shown = name if option.positional or option.kind is bool else f"{name} *{takes}*"
    hint = option.hinted.strip("()")
    hint = f"Default: `{hint.removeprefix('default: ')}`" if hint.startswith("default: ") else hint.capitalize()
    return f"| {_cell(shown)} | {_cell(f'{option.text} {hint}.' if hint else option.text)} |"


def _cell(text: str) -> str:
    return text.replace("|", "&#124;").replace("[", "&#91;").replace("<", "&lt;")


def _notebook_page(notebook: Path, folder: Path) -> str:
    """Show an executed notebook as Markdown, its images as files beside it."""
    parts = []
    for number, cell in enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(f"{source}\n")
            continue
        parts.append(f"```python\n{source}\n```\n")
        parts += [
            _output(output, folder / f"notebook-{number}-{place}.png") for place, output in enumerate(cell["outputs"])
        ]
    return "\n".join(parts)


def _output(output: dict[str, Any], image: Path) -> str:
    if output["output_type"] == "stream":
        return f"```text\n{''.join(output['text']).rstrip()}\n```\n"
    data = output["data"]
    if "image/png" in data:
        image.write_bytes(base64.b64decode(data["image/png"]))
        return f"![]({image.name})\n"
    if "text/html" in data:
        return "<div>" + "".join(data["text/html"]).replace("\n\n", "\n") + "</div>\n"
    return f"```text\n{''.join(data['text/plain'])}\n```\n"


if __name__ == "__main__":
    main()
