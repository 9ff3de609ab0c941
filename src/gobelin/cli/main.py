"""``gobelin COMMAND``: find the command, run it, and turn an error into one sentence and an exit status."""

import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from gobelin import __version__
from gobelin.errors import GobelinError, UsageError, is_out_of_memory

COMMANDS = {
    "generate": "paint images from prompts",
    "look": "see which word painted which pixel",
    "edit": "change words of a prompt, and keep its image",
    "train": "train a model from scratch or from a model, or resume a run",
    "report": "write a page that tells how a training run went",
    "evaluate": "score how faithfully a model follows its prompts",
    "bench": "measure speed and memory beside other programs",
    "verify": "audit a model: keys, shapes, numbers, noise schedule",
    "convert": "convert a model to a diffusers folder, or to a single file",
    "page": "write a page that paints in the browser, without a server",
    "show": "print a model's modules, and the tensor shapes in its attention",
    "serve": "open the page and the HTTP API",
    "mcp": "offer painting and looking as tools to language models (MCP)",
    "data": "write a dataset of scenes, or check a folder of captioned images",
}

_FILES = {"page": "static_page"}

HELP = """usage: gobelin COMMAND [OPTIONS]

Train, run and look inside text-conditioned latent diffusion.

commands:
{commands}

  gobelin COMMAND --help   options and examples
  gobelin --version
  --debug                  with any command: show the traceback of an error

examples:
  gobelin generate "a red circle to the left of a blue square" --seed 3
  gobelin look "a red circle to the left of a blue square" --seed 3
  gobelin show sd15
  gobelin train --preset nano --out runs/mine
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with status 0, 1 (failed), 2 (wrong usage) or 130 (interrupted)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    warnings.showwarning = _show_warning
    try:
        _dispatch(arguments)
    except GobelinError as error:
        if debug:
            raise
        print(f"gobelin: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        if debug:
            raise
        print("gobelin: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of the output, such as head, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if debug or not is_out_of_memory(error):
            raise
        print(
            "gobelin: out of memory: give a smaller size, count or batch, or --tile for large images", file=sys.stderr
        )
        sys.exit(1)
    except OSError as error:  # the disk or the file system
        if debug:
            raise
        said = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error
        print(f"gobelin: {said}", file=sys.stderr)
        sys.exit(1)


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
        print(HELP.format(commands=lines), end="")
        return
    if arguments[0] == "--version":
        print(f"gobelin {__version__}")
        return
    command, *rest = arguments
    if command not in COMMANDS:
        from difflib import get_close_matches  # imported where it is needed: the help has to be quick

        near = get_close_matches(command, COMMANDS, 1, 0.7)
        hint = f"did you mean {near[0]!r}?" if near else f"the choices are {', '.join(COMMANDS)}"
        raise UsageError(f"unknown command {command!r}: {hint}")
    command_module(command).run(rest)


def command_module(command: str) -> ModuleType:
    """Import the module of a command: the file of its name, unless another package has one of that name."""
    return import_module(f"gobelin.cli.{_FILES.get(command, command)}")


def _show_warning(message: Warning | str, category: type[Warning], *where: object, **more: object) -> None:
    """Print a warning of Gobelin's own as one sentence, without its place in the code."""
    if issubclass(category, UserWarning):
        print(f"gobelin: {message}", file=sys.stderr)
