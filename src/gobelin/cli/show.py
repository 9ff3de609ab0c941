"""``gobelin show``: the module tree of a U-Net, and the shapes at every attention in it."""

from collections.abc import Sequence
from dataclasses import dataclass

from gobelin.cli.options import Positional, parse


@dataclass(frozen=True, kw_only=True)
class Show:
    """Print the module tree of a U-Net, and the shapes at every attention in it.

    In attn1 patches look at patches, in attn2 at words. No weights are needed or read.

    Some examples:
      gobelin show
      gobelin show sd15 --height 512 --width 768
      gobelin show path/to/a/diffusers/folder
    """

    model: Positional[str] = ""
    """A diffusers folder, or a preset: nano, tiny, small, sd15; by default the model that comes with Gobelin."""
    height: int | None = None
    """The image's height in pixels; by default the model's own."""
    width: int | None = None
    """The image's width in pixels; by default the model's own."""
    no_tree: bool = False
    """Leave out the module tree."""


def run(arguments: Sequence[str]) -> None:
    """Run the command."""
    options = parse(Show, "show", arguments)
    from gobelin.cli.show_shapes import (
        show_shapes,  # PyTorch is imported after the options are read: help and mistakes are quick
    )

    show_shapes(options)
