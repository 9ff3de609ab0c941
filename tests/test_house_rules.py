"""The package keeps its own rules of names: no two files of one name, and no public name with two meanings."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import gobelin

PACKAGE = Path(gobelin.__file__).parent
FILES = [file for file in PACKAGE.rglob("*.py") if file.name not in ("__init__.py", "__main__.py")]
COMMAND = "run"  # every file of cli/ has one


def defined(file: Path) -> Iterator[str]:
    """The public names that a file defines at its top level."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        else:
            continue
        yield from (name for name in names if not name.startswith("_") and name != COMMAND)


def test_no_two_files_have_one_name():
    by_name = defaultdict(list)
    for file in FILES:
        by_name[file.stem].append(file.relative_to(PACKAGE).as_posix())
    assert {name: files for name, files in by_name.items() if len(files) > 1} == {}


def test_no_public_name_has_two_meanings():
    homes = defaultdict(set)
    for file in FILES:
        for name in defined(file):
            homes[name].add(file.relative_to(PACKAGE).as_posix())
    assert {name: sorted(files) for name, files in homes.items() if len(files) > 1} == {}


def test_docstrings_lead_with_a_term_or_a_verb():
    questions = ("What ", "Where ", "Whether ", "How ", "Which ")
    found = []
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            if documented and (text := ast.get_docstring(node)) and text.startswith(questions):
                found.append(f"{file.relative_to(PACKAGE).as_posix()}: {text.splitlines()[0]}")
    assert found == []
