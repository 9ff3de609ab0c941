"""Execute the notebook in place: ``python scripts/site/notebook.py docs/notebooks/gobelin.ipynb``.

Times and machine paths are left out of what is written, so that a second run changes nothing but numbers that differ.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient


def main() -> None:
    """Execute, and write back."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebook", type=Path)
    path = parser.parse_args().notebook
    path.write_text(nbformat.writes(executed(path)) + "\n", encoding="utf-8")


def executed(path: Path) -> nbformat.NotebookNode:
    """Run every cell in a folder of its own; the first error ends it."""
    notebook = nbformat.read(path, as_version=4)
    with TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": folder}}).execute()
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        cell["metadata"] = {}
        for output in cell.get("outputs", ()):
            output.get("data", {}).pop("image/jpeg", None)  # Pillow shows every image twice
    notebook["metadata"] = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return notebook


if __name__ == "__main__":
    main()
