"""``gobelin train``: captioned images in, a model folder out."""

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
from tyro.conf import Positional

from gobelin.cli.options import parse
from gobelin.errors import UsageError
from gobelin.formats.files import read_json
from gobelin.training import PRESETS, TrainConfig, distributed, find_preset
from gobelin.training.recipes.from_scratch import STAGES, config_file, train

HELP = f"""Train a model from nothing: tokenizer, text encoder, VAE, U-Net.

Every number of a preset can be changed, in a TOML file or as --section.key VALUE; `--preset NAME --help` lists
them, `--print-config` prints what would be used.

Presets: {", ".join(PRESETS)}. Stages: {", ".join(STAGES)}.

Some examples:
  gobelin train --preset nano --out runs/mine
  gobelin train --preset nano --out runs/mine --resume
  gobelin train --data.path my-pictures --out runs/mine --unet.optim.steps 8000
  gobelin train mine.toml --out runs/mine --stage vae
"""


@dataclass(frozen=True, kw_only=True)
class Train:
    config_file: Positional[Path | None] = None
    """A TOML file with sections as in --print-config; it stands before all options."""
    preset: str = "nano"
    """Where to start from."""
    out: Path | None = None
    """The model folder to write; its `training` subfolder keeps metrics, samples and checkpoints."""
    resume: bool = False
    """Go on with the run in --out."""
    stage: str | None = None
    """Only this stage."""
    print_config: bool = False
    """Print the whole configuration, and stop."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    """The run's numbers."""


Train.__doc__ = HELP


def run(arguments: Sequence[str]) -> None:
    """The command."""
    options = parse(Train, "train", arguments, default=starting_point(arguments))
    if options.config_file is not None and str(options.config_file) != arguments[0]:
        raise UsageError(f"{options.config_file} comes too late: the configuration file stands before all options")
    if options.stage is not None and options.stage not in STAGES:
        raise UsageError(f"unknown stage {options.stage!r}: the choices are {', '.join(STAGES)}")
    if options.print_config:
        print(tomli_w.dumps(without_none(dataclasses.asdict(options.config))), end="")
        return
    if options.out is None:
        raise UsageError("no folder to write to: say --out DIR")
    folder = train(options.config, options.out, resume=options.resume, stage=options.stage)
    if distributed.is_first():
        print(folder)


def starting_point(arguments: Sequence[str]) -> Train:
    """What the options override: the preset's numbers, then the file's; or those of the run that is resumed."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--preset", default=Train.preset)
    finder.add_argument("--out", type=Path)
    finder.add_argument("--resume", action="store_true")
    try:
        known, _ = finder.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise UsageError(f"{error}; the presets are {', '.join(PRESETS)}") from error
    config = find_preset(known.preset)
    if known.resume and known.out is not None and (recorded := config_file(known.out)).exists():
        return Train(preset=known.preset, config=override(config, read_json(recorded), str(recorded)))
    file = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if file is not None:
        config = override(config, read_toml(Path(file)), file)
    return Train(preset=known.preset, config=config)


def read_toml(file: Path) -> dict[str, Any]:
    """The tables of a TOML file; :class:`UsageError` where it is missing or not TOML."""
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"the configuration {file} cannot be read: {error}") from error


def override(config: Any, values: dict[str, Any], source: str) -> Any:
    """A frozen configuration with some fields replaced; an unknown key is an error that names the nearest one."""
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
            value = override(fields[name], value, source)
        elif isinstance(fields[name], float) and type(value) is int:
            value = float(value)
        elif isinstance(fields[name], tuple) and isinstance(value, list):
            value = tuple(value)
        elif fields[name] is not None and type(value) is not type(fields[name]):
            raise UsageError(
                f"{source}: {name} is {value!r}, expected a {type(fields[name]).__name__} like {fields[name]!r}"
            )
        changes[name] = value
    return dataclasses.replace(config, **changes)


def without_none(values: dict[str, Any]) -> dict[str, Any]:
    """The same without what is None, which TOML cannot say."""
    return {
        name: without_none(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if value is not None
    }
