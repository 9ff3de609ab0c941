"""The site builds without a warning: every page, anchor and name of the API that is linked is there."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

import gobelin

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The site, built once for all processes of a run."""
    if worker_id == "master":
        return _build(tmp_path_factory.mktemp("site") / "whole")
    folder = tmp_path_factory.getbasetemp().parent / "site"
    with FileLock(f"{folder}.lock"):
        return folder if (folder / "site").is_dir() else _build(folder)


def _build(folder: Path) -> Path:
    """A copy of what the site is made of, with the pages that `make docs` writes, built strictly."""
    folder.mkdir()
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=shutil.ignore_patterns("reference"))
    shutil.copy(ROOT / "zensical.toml", folder)
    for name in ("src", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    for command in (["scripts/site/pages.py", "docs/reference"], ["-m", "zensical", "build", "--strict"]):
        done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)[-4000:]
    return folder


def test_every_public_name_has_its_place(built: Path) -> None:
    """What `gobelin` exports is in the reference, each name once."""
    pages = [page.read_text(encoding="utf-8") for page in (built / "site" / "reference").glob("*.html")]
    homes = re.findall(r'href="([^"#]*#gobelin[\w.]*)"', (built / "site" / "reference" / "gobelin.html").read_text())
    assert len(gobelin.__all__) <= len(homes)
    for name in (
        "gobelin.pipeline.Pipeline",
        "gobelin.settings.Settings",
        "gobelin.control.attention_control.reweight",
    ):
        assert sum(f'id="{name}"' in page for page in pages) == 1


def test_no_role_is_left_as_it_was_written(built: Path) -> None:
    """Docstrings' reST roles have become links, in every page."""
    for page in (built / "site" / "reference").glob("*.html"):
        assert not re.search(r":(class|func|meth|attr|data|mod):", page.read_text(encoding="utf-8")), page.name


def test_methods_show_their_settings(built: Path) -> None:
    """What a decorator gives a method stands in its signature."""
    page = re.sub(r"<[^>]+>", "", (built / "site" / "reference" / "pipeline.html").read_text(encoding="utf-8"))
    assert re.search(r"__call__\(\s*prompt: Prompts?, \*\*settings: Settings", page)


def test_command_line_names_every_option(built: Path) -> None:
    """The reference of the command line has each setting as an option."""
    page = (built / "docs" / "reference" / "command-line.md").read_text(encoding="utf-8")
    for option in ("--negative-prompt", "--seed", "--init-image", "--self-replace", "--unet.optim.steps"):
        assert f"`{option}`" in page


def test_index_of_decisions_is_whole(built: Path) -> None:
    """Writing the index anew changes nothing; `make docs` brings it up to date."""
    assert (built / "docs" / "decisions.md").read_text() == (ROOT / "docs" / "decisions.md").read_text()


def test_nothing_is_fetched_from_elsewhere(built: Path) -> None:
    """Pages load scripts, styles, fonts and images from the site alone."""
    for page in (built / "site").rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"<(script|img|iframe)[^>]* src=\"https?:", text), page.name
        assert not re.search(r"<link[^>]* rel=\"(stylesheet|preload|preconnect)\"[^>]* href=\"https?:", text), page.name


def test_citation_names_this_version() -> None:
    """CITATION.cff is of the version that is here."""
    assert f"version: {gobelin.__version__}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_names_are_imported_when_they_are_used() -> None:
    """`import gobelin` alone imports neither PyTorch nor anything of it."""
    loaded = "import gobelin, sys; print('torch' in sys.modules, len(gobelin.__all__))"
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", str(len(gobelin.__all__))]


@pytest.mark.parametrize("name", gobelin.__all__)
def test_every_exported_name_is_there(name: str) -> None:
    """Each name of `__all__` can be taken from `gobelin`."""
    assert getattr(gobelin, name) is not None
