"""Write ``docs/compatibility.md``: ``python -m scripts.site.compatibility``, which opens every kind of file once.

The kinds are those of ``tests/checkpoint/file_kinds.py``, which the tests hold.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tests.checkpoint.file_kinds import (
    FOREIGN_FILES,
    FOREIGN_TENSORS,
    KINDS,
    PRECISIONS,
    Files,
    Kind,
    copy_tokenizer,
    dtypes_of,
    rounded,
)
from tests.checkpoint.refused_kinds import CHANGES, CONTRADICTIONS
from tests.oracles import differences, original_weights, small_pipeline

from gobelin.errors import ModelError
from gobelin.pipeline import Pipeline
from gobelin.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]

HEADER = """# Which files open

This page is made by `scripts/site/compatibility.py` from the kinds that `tests/checkpoint/test_compatibility.py` holds:
files of a small model of Stable Diffusion 1.x's kind with random weights, under the names and in the layouts that the
program in the last column writes.

## Models that open

Each cell is the largest difference of any network's output from diffusers' with the same weights, in millionths of the
largest number. Precisions are those in which the file is stored (the last two are float8); all compute in float32.

"""
REFUSED = """
## Files that are refused

Each with the sentence that says what it is. Nothing of them is loaded.

"""
INSIDE = """
## Models that are refused for what is in them

Whole models whose images would be others than their maker's: a tensor too many or too few, or two places that
contradict each other.

"""


def main() -> None:
    """Open every kind in every precision, and write the page."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        words = Path(name) / "words"
        Tokenizer.train(["a red circle left of a blue square"], vocab_size=560, max_length=16).save_pretrained(words)

        def make_oracle(in_channels: int = 4) -> Any:
            return small_pipeline(words, in_channels)

        columns = " | ".join(name.removeprefix("float8_") for name in PRECISIONS)
        rows = [f"| kind | {columns} | source |", f"|---|{'---|' * len(PRECISIONS)}---|"]
        for kind_name, kind in KINDS.items():
            cells = {dtype: _difference(kind, dtype, words, make_oracle) for dtype in dtypes_of(kind)}
            listed = " | ".join(f"{cells[dtype] * 1e6:.1f}" if dtype in cells else "–" for dtype in PRECISIONS)
            rows.append(f"| {kind_name} | {listed} | {kind.source} |")
            print(rows[-1])
        refused = ["| kind | sentence |", "|---|---|"]
        file = Path(name) / "FILE.safetensors"
        for kind_name, (content, _) in FOREIGN_FILES.items():
            file.write_bytes(content)
            refused.append(f"| {kind_name} | {_sentence(file)} |")
        for kind_name, (tensor, _) in FOREIGN_TENSORS.items():
            save_file({tensor: torch.ones(2)}, file)
            refused.append(f"| {kind_name} | {_sentence(file)} |")
        inside = ["| what is in it, or beside it | sentence |", "|---|---|"]
        weights = original_weights(make_oracle())
        for change_name, (change, _) in CHANGES.items():
            save_file(change(dict(weights)), file)
            inside.append(f"| {change_name} | {_sentence(file, words)} |")
        for change_name, (metadata, configuration, _) in CONTRADICTIONS.items():
            save_file(weights | {"v_pred": torch.zeros(0)}, file, metadata)
            file.with_suffix(".yaml").unlink(missing_ok=True)
            if configuration is not None:
                file.with_suffix(".yaml").write_text(configuration)
            inside.append(f"| {change_name} | {_sentence(file, words)} |")
    page = HEADER + "\n".join(rows) + "\n" + REFUSED + "\n".join(refused) + "\n" + INSIDE + "\n".join(inside) + "\n"
    (ROOT / "docs" / "compatibility.md").write_text(page, encoding="utf-8")


def _difference(kind: Kind, dtype: str, words: Path, make_oracle: Callable[..., Any]) -> float:
    """Open a kind in a precision; returns the largest difference of any network from the oracle's."""
    with tempfile.TemporaryDirectory() as name:
        files = Files(oracle=make_oracle(kind.channels), make_oracle=make_oracle, words=words, folder=Path(name))
        copy_tokenizer(files)
        path = kind.write(files, PRECISIONS[dtype])
        options: dict[str, Any] = {
            key: files.folder / "vae.safetensors" if key == "vae" else one for key, one in kind.options.items()
        }
        pipe = Pipeline.from_pretrained(path, "cpu", **options)
        oracle = rounded(files.oracle, make_oracle, PRECISIONS[dtype], kind.scaled)
        return max(differences(pipe, oracle).values())


def _sentence(file: Path, tokenizer: Path | None = None) -> str:
    """Open what is refused; returns the sentence, with the file's name alone."""
    try:
        Pipeline.from_pretrained(file, "cpu", allow_pickle=True, tokenizer=tokenizer)
    except ModelError as error:
        said = str(error).replace(str(file), "`FILE`").replace(str(file.with_suffix(".yaml")), "`FILE.yaml`")
        return said.replace("|", "\\|")
    raise AssertionError(f"{file} opened")


if __name__ == "__main__":
    main()
