"""``gobelin train``: train a model on captioned images or scenes, from scratch or from a model."""

import argparse
import dataclasses
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import tomli_w
import tyro
from rich.console import Console
from tyro.conf import Positional

from gobelin.cli.options import parse
from gobelin.errors import UsageError
from gobelin.formats.files import read_json
from gobelin.training import TRAINING_PRESETS, FineTuneConfig, TrainConfig, distributed, find_preset
from gobelin.training.config import RunConfig
from gobelin.training.recipes.claim import config_file
from gobelin.training.train_model import train

_SCRATCH = ("nano", "tiny")
_HELP = f"""Train a model: from scratch (tokenizer, text encoder, VAE, U-Net), or from a model.

Every setting of a preset can be changed, in a TOML file or as --section.key VALUE; `--preset NAME --help` lists them,
`--print-config` prints the resulting configuration.

Presets from scratch: {", ".join(_SCRATCH)}; from a model (--model): {
    ", ".join(name for name in TRAINING_PRESETS if name not in _SCRATCH)
}.

Some examples:
  gobelin train --preset nano --out runs/mine
  gobelin train --preset nano --out runs/mine --resume
  gobelin train --data.path my-images --out runs/mine --unet.optim.steps 8000
  gobelin train mine.toml --out runs/mine --stage vae
  gobelin train --preset lora --data.path my-images --out runs/style
  torchrun --nproc-per-node 2 -m gobelin train --preset nano --out runs/mine
"""


@dataclass(frozen=True, kw_only=True)
class Train:
    config_file: Positional[Path | None] = None
    """A TOML file with sections as in --print-config; it goes before all options."""
    preset: str = "nano"
    """The preset to start from."""
    out: Path | None = None
    """The folder to write; its `training` subfolder keeps metrics, samples, checkpoints and a report."""
    resume: bool = False
    """Continue the run in --out."""
    stage: str | None = None
    """Train this stage alone: tokenizer, text_encoder, vae or unet."""
    print_config: bool = False
    """Print the whole configuration and exit."""


@dataclass(frozen=True, kw_only=True)
class TrainFromScratch(Train):
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    """The run's configuration."""


@dataclass(frozen=True, kw_only=True)
class TrainFromModel(Train):
    config: Annotated[FineTuneConfig, tyro.conf.arg(name="")]
    """The run's configuration."""


TrainFromScratch.__doc__ = TrainFromModel.__doc__ = _HELP


def run(arguments: Sequence[str]) -> None:
    """Run ``gobelin train``."""
    defaults = _defaults(arguments)
    options: Any = parse(type(defaults), "train", arguments, default=defaults)
    if options.config_file is not None and str(options.config_file) != arguments[0]:
        raise UsageError(f"{options.config_file} comes too late: the configuration file goes before all options")
    if options.print_config:
        print(config_to_toml(options.config), end="")
        return
    if options.out is None:
        raise UsageError("no folder to write to: say --out DIR")
    console = Console(stderr=True)
    folder = train(options.config, options.out, resume=options.resume, stage=options.stage, console=console)
    if distributed.is_main_process():
        print(folder)


def config_to_toml(config: RunConfig) -> str:
    """Write a configuration as TOML; fields that are None are left out, as TOML has no such value."""
    return tomli_w.dumps(_without_none(dataclasses.asdict(config)))


def _defaults(arguments: Sequence[str]) -> TrainFromScratch | TrainFromModel:
    """Make the options' defaults: a preset overridden by the TOML file, or the configuration of the resumed run."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--preset", default=Train.preset)
    finder.add_argument("--out", type=Path)
    finder.add_argument("--resume", action="store_true")
    try:
        known, _ = finder.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise UsageError(f"{error}; the presets are {', '.join(TRAINING_PRESETS)}") from error
    config = find_preset(known.preset)
    file = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if known.resume and known.out is not None and (recorded := config_file(known.out)).exists():
        values, source = read_json(recorded), str(recorded)
        # A run says by its sections which kind it is, so that --resume needs no preset.
        config = find_preset("finetune" if "method" in values else "nano")
        config = _override(config, values, source)
    elif file is not None:
        config = _override(config, _read_toml(Path(file)), file)
    if isinstance(config, FineTuneConfig):
        return TrainFromModel(preset=known.preset, config=config)
    return TrainFromScratch(preset=known.preset, config=config)


def _read_toml(file: Path) -> dict[str, Any]:
    """Read a TOML file; :class:`UsageError` if it is missing or not TOML."""
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"the configuration {file} cannot be read: {error}") from error


def _override(config: Any, values: dict[str, Any], source: str) -> Any:
    """Replace fields of a frozen configuration; an unknown key or a value out of range is a :class:`UsageError`."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    changes = {}
    for name, value in values.items():
        if name not in fields:
            near = get_close_matches(name, fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the choices are {', '.join(fields)}"
            raise UsageError(f"{source}: unknown key {name!r}: {hint}")
        if dataclasses.is_dataclass(fields[name]):
            if not isinstance(value, dict):
                raise UsageError(f"{source}: {name} is {value!r}, expected a table [{name}]")
            value = _override(fields[name], value, f"{source}, {name}")
        elif isinstance(fields[name], float) and type(value) is int:
            value = float(value)
        elif isinstance(fields[name], tuple) and isinstance(value, list):
            value = tuple(value)
        elif fields[name] is not None and type(value) is not type(fields[name]):
            raise UsageError(
                f"{source}: {name} is {value!r}, expected a {type(fields[name]).__name__} like {fields[name]!r}"
            )
        changes[name] = value
    try:
        return dataclasses.replace(config, **changes)
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from error


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    """Leave out entries that are None, at every depth."""
    return {
        name: _without_none(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if value is not None
    }
