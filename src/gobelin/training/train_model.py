"""The call that trains: a configuration from scratch or from a model, into a folder."""

from pathlib import Path
from typing import Any

from rich.console import Console

from gobelin.errors import UsageError
from gobelin.pipeline import find_device
from gobelin.training import distributed
from gobelin.training.config import TrainConfig
from gobelin.training.fine_tune_config import FineTuneConfig
from gobelin.training.presets import refuse_without_effect
from gobelin.training.recipes.fine_tune import FineTune
from gobelin.training.recipes.from_scratch import FromScratch
from gobelin.training.recipes.recipe import Recipe


def train(
    config: TrainConfig | FineTuneConfig,
    out: str | Path,
    *,
    resume: bool = False,
    stage: str | None = None,
    console: Console | None = None,
) -> Path:
    """Train a model from scratch, or from a model, into the folder ``out``; returns the folder.

    ::

        import gobelin

        config = gobelin.training.find_preset("nano")  # about 13 minutes on two CPU cores
        folder = gobelin.train(config, "runs/mine")
        gobelin.Pipeline.from_pretrained(folder)("a red circle").save("out")

    A :class:`FineTuneConfig` (``find_preset("lora")`` and its like) starts from a model and writes what it trains: a
    whole model, an adapter, or a new word.

    ``resume`` continues the run in ``out``, with the same configuration and data; finished stages are kept. What
    changes no weight may be other: when it saves and samples, the device and the number of processes, the place of the
    data, what is recommended; and a stage may be longer while its learning rate holds. ``stage`` trains one stage
    alone. ``console`` shows progress; by default that is standard error if it is a terminal, and nothing is printed
    otherwise (``out/training`` has metrics.jsonl and report.html). SIGINT (Ctrl-C) and SIGTERM save a checkpoint and
    raise KeyboardInterrupt. Torch's global random generator is seeded.

    Under ``torchrun`` the processes share the batches of VAE and U-Net; the text encoder's loss compares all images of
    a batch, so that each computes it whole.

    Raises, before anything is written:

    - :class:`UsageError` for an unknown stage, world or device, a ``config`` that is none, or one with a setting that
      would have no effect;
    - :class:`DataError` for a data folder that is missing or has too few usable images;
    - :class:`ModelError` for a model that cannot be opened;
    - :class:`TrainingError` if ``out`` holds a run and ``resume`` is off, holds files but no run, or a run with another
      configuration or other data; if another process trains there; if there is nothing to resume; or if the processes
      cannot share a batch evenly.

    Raises, later, :class:`TrainingError` if a stage that ``stage`` builds on is missing, if the loss is not finite, or
    if a checkpoint cannot be written or read.
    """
    if not isinstance(config, TrainConfig | FineTuneConfig):
        raise UsageError(f"config is {config!r}: give a TrainConfig, such as gobelin.training.find_preset('nano')")
    refuse_without_effect(config)
    with distributed.init_process_group(find_device(config.device)):
        if not distributed.is_main_process():
            console = Console(quiet=True)
        elif console is None:
            console = Console(stderr=True)
            console.quiet = not console.is_terminal
        kind: Any = FromScratch if isinstance(config, TrainConfig) else FineTune
        recipe: Recipe[Any] = kind(config, Path(out), resume, console)
        if stage is not None and stage not in recipe.stages():
            raise UsageError(f"unknown stage {stage!r}: the choices are {', '.join(recipe.stages())}")
        return recipe.run(stage)
