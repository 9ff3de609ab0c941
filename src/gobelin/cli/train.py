"""``gobelin train``: train a model on captioned images or scenes, from scratch or from a model."""

import argparse
import dataclasses
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tomli_w

from gobelin.cli.options import Named, Positional, parse
from gobelin.errors import UsageError
from gobelin.formats.files import read_json
from gobelin.training import TRAINING_PRESETS, FineTuneConfig, TrainConfig, find_preset
from gobelin.training.config import RunConfig, config_file
from gobelin.training.presets import FROM_SCRATCH, preset_of, refuse_scenes_of_folder, refuse_without_effect
from gobelin.validation import nearest

_HELP = f"""Train a model: from scratch (tokenizer, text encoder, VAE, U-Net), or from a model.

Every setting of a preset can be changed, in a TOML file or as --section.key VALUE; `--preset NAME --help` lists them,
`--print-config` prints the resulting configuration.

Presets from scratch: {", ".join(FROM_SCRATCH)}; from a model (--model): {
    ", ".join(name for name in TRAINING_PRESETS if name not in FROM_SCRATCH)
}.

Some examples:
  gobelin train --preset nano --out runs/mine
  gobelin train --out runs/mine --resume
  gobelin train --data.path my-images --out runs/mine --unet.optim.steps 8000
  gobelin train mine.toml --out runs/mine --stage vae
  gobelin train --preset lora --data.path my-images --out runs/style
  gobelin train --preset dreambooth --model model.safetensors --data.path my-dog --prior.prompts "a dog" --out runs/dog
  torchrun --nproc-per-node 2 -m gobelin train --preset nano --out runs/mine
"""


@dataclass(frozen=True, kw_only=True)
class Train:
    config_file: Positional[Path | None] = None
    """A TOML file with sections as in --print-config; it goes before all options."""
    preset: str | None = None
    """The preset to start from; without one, nano, or the one of the method that the TOML file names."""
    out: Path | None = None
    """The folder to write; its `training` subfolder keeps metrics, samples, checkpoints and a report."""
    resume: bool = False
    """Continue the run in --out."""
    stage: str | None = None
    """Train this stage alone: tokenizer, text_encoder, vae or unet; from a model there is one stage."""
    print_config: bool = False
    """Print the whole configuration and exit."""
    config: Annotated[RunConfig, Named("")]
    """The run's configuration."""


Train.__doc__ = _HELP


def run(arguments: Sequence[str]) -> None:
    """Run ``gobelin train``."""
    options: Any = parse(Train, "train", arguments, default=_defaults(arguments))
    if options.config_file is not None and str(options.config_file) != arguments[0]:
        raise UsageError(f"{options.config_file} comes too late: the configuration file goes before all options")
    refuse_without_effect(options.config)
    if not options.resume:  # a run from before this was refused can still be gone on with
        refuse_scenes_of_folder(options.config)
    if options.print_config:
        print(config_to_toml(options.config), end="")
        return
    if options.out is None:
        raise UsageError("no folder to write to: say --out DIR")
    _refuse_missing_emoji(options.config.data.path)
    from rich.console import Console  # PyTorch is imported after the options are read: help and mistakes are quick

    from gobelin.training import distributed
    from gobelin.training.train_model import train

    console = Console(stderr=True)
    folder = train(options.config, options.out, resume=options.resume, stage=options.stage, console=console)
    if distributed.is_main_process():
        print(folder)


def _refuse_missing_emoji(path: str | None) -> None:
    """Raise :class:`UsageError` where the preset's own data set is not there, with the command that writes it."""
    own = find_preset("emoji").data.path
    if own is not None and path == own and not Path(own).exists():
        raise UsageError(
            f"the preset emoji trains on {own}, which is not here: gobelin data emoji --out {Path(own).parent} writes "
            "it, or give another folder by --data.path"
        )


def config_to_toml(config: RunConfig) -> str:
    """Write a configuration as TOML; fields that are None are left out, as TOML has no such value."""
    return tomli_w.dumps(_without_none(dataclasses.asdict(config)))


def _defaults(arguments: Sequence[str]) -> Train:
    """Make the options' defaults: a preset, or the configuration of the resumed run, overridden by the TOML file."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--preset")
    finder.add_argument("--out", type=Path)
    finder.add_argument("--resume", action="store_true")
    try:
        known, _ = finder.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise UsageError(f"{error}; the presets are {', '.join(TRAINING_PRESETS)}") from error
    file = arguments[0] if arguments and not arguments[0].startswith("-") else None
    values = {} if file is None else _read_toml(Path(file))
    if known.resume and known.out is not None and (recorded := config_file(known.out)).exists():
        config = _recorded(recorded, known.preset)
    else:
        config = find_preset(known.preset or _preset_for(values))
    return Train(preset=known.preset, config=_override(config, values, str(file)))


def _recorded(file: Path, preset: str | None) -> TrainConfig | FineTuneConfig:
    """Read the configuration of the run that is resumed; :class:`UsageError` for a ``preset`` that is of another."""
    values = read_json(file)
    own = _preset_for(values)
    if preset is not None and _kind_of(find_preset(preset)) != _kind_of(find_preset(own)):
        begun = "from scratch" if own in FROM_SCRATCH else f"from a model, by the method {values['method']}"
        raise UsageError(f"--preset is {preset}, and the run in {file.parents[1]} trains {begun}: leave out --preset")
    return _override(find_preset(own), values, str(file))


def _preset_for(values: dict[str, Any]) -> str:
    """Name the preset to start from where none is named: by the sections that only training from a model has."""
    if not set(values) & (_names(FineTuneConfig) - _names(TrainConfig)):
        return "nano"
    method = values.get("method", "full")
    name = preset_of(method) if isinstance(method, str) else ""
    return name if name in TRAINING_PRESETS else "finetune"  # whose configuration says which methods there are


def _kind_of(config: TrainConfig | FineTuneConfig) -> str:
    return config.method if isinstance(config, FineTuneConfig) else "from scratch"


def _names(config: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


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
            raise UsageError(f"{source}: unknown key {name!r}: {_hint(config, name)}")
        if dataclasses.is_dataclass(fields[name]):
            if not isinstance(value, dict):
                raise UsageError(f"{source}: {name} is {value!r}, expected a table [{name}]")
            value = _override(fields[name], value, f"{source}, {name}")
        elif isinstance(fields[name], float) and type(value) is int:
            value = float(value)
        elif isinstance(fields[name], tuple) and isinstance(value, list):
            value = tuple(value)
        changes[name] = value
    try:
        return dataclasses.replace(config, **changes)
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from error


def _hint(config: Any, name: str) -> str:
    """End the sentence about an unknown key: which presets have it, or the nearest one of this section."""
    if isinstance(config, TrainConfig) and name in _names(FineTuneConfig):
        return "training from a model has it, with a preset such as --preset finetune"
    if isinstance(config, FineTuneConfig) and name in _names(TrainConfig):
        return "training from scratch has it, with --preset nano or tiny"
    return nearest(name, _names(type(config)))


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    """Leave out entries that are None, at every depth."""
    return {
        name: _without_none(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if value is not None
    }
