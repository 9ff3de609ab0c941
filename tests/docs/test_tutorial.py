"""The tutorial's commands print what stands below them, and the notebook runs from its first cell to its last."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

from gobelin.cli.main import main

ROOT = Path(__file__).parents[2]
CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
QUICK = ("--steps", "2")  # of painting: what is printed does not depend on them


def commands(section: str) -> list[tuple[list[str], list[str]]]:
    """Each command of a part of the tutorial, in order, with the lines that it prints where they are shown."""
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    before, after = text.split("\n## Train\n")
    found = []
    for block in CONSOLE.findall(after if section == "Train" else before):
        for one in re.split(r"^(?:\$ )?gobelin ", block, flags=re.MULTILINE)[1:]:
            typed, *printed = one.splitlines()
            found.append((shlex.split(typed), printed))
    return found


def test_commands_print_what_the_tutorial_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Paint, paint again, look, edit: the same files, by the same names."""
    monkeypatch.chdir(tmp_path)
    shown = commands("before Train")
    assert [typed[0] for typed, _ in shown] == ["generate", "generate", "look", "edit"]
    for typed, printed in shown:
        main([*typed, *(() if "--steps" in typed else QUICK)])
        assert capsys.readouterr().out.splitlines() == printed
        assert all(Path(line).is_file() for line in printed)


@pytest.mark.slow
def test_shortened_training_of_the_tutorial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Train and paint as the tutorial's first two commands of training do."""
    monkeypatch.chdir(tmp_path)
    (train, _), (generate, _), *_ = commands("Train")
    main(train)
    said = capsys.readouterr().out
    assert all(f"{stage}: " in said for stage in ("tokenizer", "text_encoder", "vae", "unet"))
    main(generate)
    assert len([line for line in capsys.readouterr().out.splitlines() if Path(line).is_file()]) == 2


@pytest.mark.slow
def test_notebook_runs() -> None:
    """Every cell of the notebook runs, and shows as many outputs as it was committed with."""
    nbformat = pytest.importorskip("nbformat")
    path = ROOT / "docs" / "notebooks" / "gobelin.ipynb"
    executed = runpy.run_path(str(ROOT / "scripts" / "site" / "notebook.py"))["executed"](path)
    kept = nbformat.read(path, as_version=4)
    for now, before in zip(executed.cells, kept.cells, strict=True):
        assert len(now.get("outputs", [])) == len(before.get("outputs", []))
