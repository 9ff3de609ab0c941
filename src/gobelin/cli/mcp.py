"""``gobelin mcp``: painting and looking as tools of the Model Context Protocol, over standard input and output."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from gobelin.cli.options import Positional, parse
from gobelin.cli.painting_options import PipelineOptions
from gobelin.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Mcp(PipelineOptions):
    """Offer painting, looking and evaluating as tools of the Model Context Protocol (MCP).

    A program that uses language models starts it and speaks with it over standard input and output: nothing listens on
    a network, and no file is opened or written. Needs pip install 'gobelin[mcp]'.

    Some examples:
      gobelin mcp
      gobelin mcp path/to/a/diffusers/folder --device cuda
    """

    model: Positional[str | None] = None
    """Diffusers folder, .safetensors or .ckpt file, Hub name, or a model that comes with Gobelin: tiny, the one without
    it, or emoji."""


def run(arguments: Sequence[str]) -> None:
    """Run the command."""
    options = parse(Mcp, "mcp", arguments)
    if options.lora_dir is not None:
        raise UsageError("tools take no LoRAs from prompts: load them by --lora, without --lora-dir")
    if find_spec("mcp") is None:
        raise UsageError("mcp is not installed: pip install 'gobelin[mcp]'")
    from gobelin.cli.mcp_tools import (
        make_tools,  # PyTorch is imported after the options are read: help and mistakes are quick
    )
    from gobelin.cli.open_and_paint import open_pipeline

    make_tools(open_pipeline(options)).run("stdio")
