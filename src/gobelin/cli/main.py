"""``gobelin COMMAND``: finds the command, runs it, and turns errors into one sentence and an exit status."""

import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

from gobelin import __version__
from gobelin.errors import GobelinError, UsageError

COMMANDS = {
    "generate": "paint pictures from prompts",
    "look": "see which word painted which pixel",
    "edit": "change words of a prompt, keep its picture",
    "train": "train a model from nothing, or go on with a run",
    "evaluate": "measure how faithfully a model paints what it is told",
    "verify": "look through a model: keys, shapes, numbers, schedule",
    "convert": "write a model as a diffusers folder, or as a single file",
    "show": "print a model's module tree and its shapes through attn1 and attn2",
    "data": "make scenes, or check a folder of captioned images",
}

HELP = """usage: gobelin COMMAND [OPTIONS]

Train, run and look inside text-conditioned latent diffusion.

commands:
{commands}

  gobelin COMMAND --help   options and examples
  gobelin --version
  --debug                  anywhere: show the traceback of an error

examples:
  gobelin generate "a red circle to the left of a blue square" --seed 3
  gobelin look "a red circle to the left of a blue square" --seed 3
  gobelin show sd15
  gobelin train --preset nano --out runs/mine
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; leaves with 0, 1 (failed), 2 (wrong usage) or 130 (interrupted)."""
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
    except BrokenPipeError:  # whoever read the output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # the disk, the file system: nothing this program did wrong
        if debug:
            raise
        print(f"gobelin: {error}", file=sys.stderr)
        sys.exit(1)


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = "\n".join(f"  {name:<{width}}  {what}" for name, what in COMMANDS.items())
        print(HELP.format(commands=lines), end="")
        return
    if arguments[0] == "--version":
        print(f"gobelin {__version__}")
        return
    command, *rest = arguments
    if command not in COMMANDS:
        raise UsageError(f"unknown command {command!r}: the choices are {', '.join(COMMANDS)}")
    import_module(f"gobelin.cli.{command}").run(rest)


def _show_warning(message: Warning | str, category: type[Warning], *where: object, **more: object) -> None:
    """Our own warnings are for the user: one sentence, no place in the code."""
    if issubclass(category, UserWarning):
        print(f"gobelin: {message}", file=sys.stderr)
