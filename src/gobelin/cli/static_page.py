"""``gobelin page``: a page that paints in the browser, as a folder of files for any host."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gobelin.cli.options import parse
from gobelin.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class PageOptions:
    """Write a folder of files that paints in the browser of whoever opens it: any host of files serves it.

    Some examples:
      gobelin page --out page && python -m http.server --directory page
      gobelin page --out page --model runs/mine
      gobelin page --out page --runtime onnxruntime-web-1.30.0.tgz
    """

    out: Path
    """Folder to write, which is not there yet, or empty."""
    model: str | None = None
    """Folder of a model that Gobelin trained from scratch, or a model that comes with it: tiny, the one without it, or
    emoji."""
    runtime: Path | None = None
    """Folder or .tgz of npm's package onnxruntime-web, of the version that the page is made for; without it, npm gets
    it, once."""


def run(arguments: Sequence[str]) -> None:
    """Run ``gobelin page``."""
    options = parse(PageOptions, "page", arguments)
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise UsageError(f"{options.out} exists already: choose another name")
    import torch  # PyTorch is imported after the options are read: help and mistakes are quick

    from gobelin.checkpoint import open_model
    from gobelin.checkpoint.onnx_files import require_onnx
    from gobelin.checkpoint.shipped import shipped_model
    from gobelin.static_page import find_runtime, write_page

    require_onnx()
    runtime = find_runtime(options.runtime)
    model = open_model(options.model or shipped_model(), torch.device("cpu"), torch.float32)
    size = write_page(model, options.out, runtime)
    print(f"{options.out} ({size / 1e6:.1f} MB): python -m http.server --directory {options.out}")
