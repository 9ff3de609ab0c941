"""The loop that every stage with gradients runs in.

Nothing random outlives a step: which samples a step takes and what noise it draws follow from (seed, stage, step)
alone, so that a resumed run is the run that was interrupted.
"""

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast, runtime_checkable
from zlib import crc32

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Generator, Tensor, nn
from torch.optim.swa_utils import AveragedModel

from gobelin.errors import TrainingError
from gobelin.formats.files import replacing
from gobelin.training import checkpoints, distributed, muon
from gobelin.training.config import OptimConfig

Module = TypeVar("Module", bound=nn.Module)


@runtime_checkable
class Stage(Protocol[Module]):
    """What the loop trains: a module, and a loss over samples that it names by their indices."""

    name: str
    optim: OptimConfig
    module: Module
    samples: int
    """How many samples an epoch has."""
    rates: dict[str, float]
    """Fractions of the learning rate, by the beginning of a parameter's name."""

    def loss(self, indices: Tensor, generator: Generator) -> dict[str, Tensor]:
        """Scalars by name; ``loss`` is the one to descend. All randomness comes from ``generator`` (CPU).

        A stage that several processes share draws for the whole batch, then goes on with its own part of it.
        """
        ...

    def picture(self, module: Module, step: int) -> Image.Image | None:
        """What to look at: the module, its weights averaged up to ``step``, at work. None where nothing is to see."""
        ...


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where a run is written, and what all stages share."""

    folder: Path
    seed: int
    device: torch.device
    save_every: int
    picture_every: int
    console: Console

    def checkpoints(self, stage: Stage) -> Path:
        return self.folder / "checkpoints" / stage.name

    def log(self, stage: str, values: dict[str, float]) -> None:
        """Append a line to ``metrics.jsonl``; the first process's is all there is."""
        if not distributed.is_first():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": stage, **values}) + "\n")


def fit(stage: Stage[Module], run: Run) -> Module:
    """Train a stage to its last step, from its newest checkpoint if it has one; returns the averaged module.

    Every process comes here with the same weights, and the gradients of all are averaged: they stay the same.
    SIGINT and SIGTERM end it after the step under way, with a checkpoint. Raises :class:`TrainingError` where the
    loss is not a number: the last checkpoint stands.
    """
    optim = stage.optim
    module = stage.module.train().to(run.device)
    if run.device.type == "cuda":
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizers = make_optimizers(module, optim, stage.rates)
    average = AveragedModel(module, multi_avg_fn=_averager(optim.ema))
    start = _restore(stage, run, module, average, optimizers)
    recent: list[dict[str, Tensor]] = []
    seen_at, seen = time.perf_counter(), start

    def save(step: int) -> None:
        states = {
            "module": module.state_dict(),
            "average": average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        }
        checkpoints.save(run.checkpoints(stage), step, states)

    with _progress(run.console, stage.name, start, optim.steps) as advance, _stop_requested() as stop:
        for step in range(start, optim.steps):
            for group in chain.from_iterable(optimizer.param_groups for optimizer in optimizers):
                group["lr"] = group["rate"] * learning_rate(optim, step)
            generator = Generator().manual_seed(mix(run.seed, stage.name, step))
            indices = batch_indices(run.seed, stage.name, step, optim.batch_size, stage.samples)
            with torch.autocast(run.device.type, torch.bfloat16, enabled=optim.precision == "bfloat16"):
                losses = stage.loss(indices, generator)
            module.zero_grad(set_to_none=True)
            losses["loss"].backward()
            losses = {name: value.detach().float() for name, value in losses.items()}
            stopping = torch.tensor(float(stop()), device=run.device)
            gradients = (parameter.grad for parameter in module.parameters() if parameter.grad is not None)
            distributed.average_([*gradients, *losses.values(), stopping])
            norm = nn.utils.clip_grad_norm_(module.parameters(), optim.clip_norm)
            if not (losses["loss"].isfinite() and norm.isfinite()):
                raise TrainingError(
                    f"stage {stage.name}, step {step}, samples {indices[:4].tolist()}…: the loss is "
                    f"{losses['loss'].item()} and its gradient's norm {norm.item()}; the last checkpoint stands, "
                    "start again in another folder with a lower learning rate"
                )
            for optimizer in optimizers:
                optimizer.step()
            average.update_parameters(module)

            done = step + 1
            recent.append({**losses, "grad_norm": norm})
            if done % 50 == 0 or done == optim.steps:
                now = time.perf_counter()
                means = {name: torch.stack([r[name] for r in recent]).mean().item() for name in recent[0]}
                speed = (done - seen) * optim.batch_size / (now - seen_at)
                run.log(
                    stage.name,
                    {"step": done, "lr": learning_rate(optim, step), "samples_per_s": speed, **means},
                )
                advance(done, means["loss"], speed)
                recent, seen_at, seen = [], now, done
            last, first = done == optim.steps, distributed.is_first()
            if first and (done % run.save_every == 0 or last or stopping):
                save(done)
            if stopping:
                distributed.told(done)  # what is started by torchrun is ended by it: not before the checkpoint stands
                raise KeyboardInterrupt
            if first and (done % run.picture_every == 0 or last):
                _keep_picture(stage, run, cast(Module, average.module), done)
    return cast(Module, average.module.eval())


def learning_rate(optim: OptimConfig, step: int) -> float:
    """Linear warm-up, the full rate, then half a cosine to the final one at the last step."""
    if step < optim.warmup_steps:
        return optim.learning_rate * (step + 1) / optim.warmup_steps
    fall = max(optim.warmup_steps, round(optim.hold * optim.steps))
    progress = (step - fall) / max(1, optim.steps - 1 - fall)
    cosine = (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2
    return optim.learning_rate * (optim.final_learning_rate + (1 - optim.final_learning_rate) * cosine)


def batch_indices(seed: int, stage: str, step: int, batch_size: int, samples: int) -> Tensor:
    """The samples of a step: consecutive places in an endless line of shuffled epochs."""
    places = torch.arange(step * batch_size, (step + 1) * batch_size)
    epochs = places // samples
    parts = []
    for epoch in epochs.unique().tolist():
        order = torch.randperm(samples, generator=Generator().manual_seed(mix(seed, f"{stage}/order", epoch)))
        parts.append(order[places[epochs == epoch] % samples])
    return torch.cat(parts)


def mix(seed: int, purpose: str, number: int) -> int:
    """A seed of its own for every purpose and number."""
    return crc32(f"{seed}/{purpose}/{number}".encode()) | seed << 32 & 0x7FFF_FFFF_FFFF_FFFF


def make_optimizers(
    module: nn.Module, optim: OptimConfig, rates: dict[str, float] | None = None
) -> list[torch.optim.Optimizer]:
    """AdamW; and Muon for what it takes, where the configuration asks for it.

    Matrices and kernels decay; biases, norms and scalars do not. ``rates`` scales the learning rate of the parameters
    whose names begin with a key.
    """
    hidden = muon.takes(module) if optim.optimizer == "muon" else set()
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        decay = optim.weight_decay if parameter.ndim >= 2 else 0.0
        rate = next((rate for prefix, rate in (rates or {}).items() if name.startswith(prefix)), 1.0)
        groups.setdefault((name in hidden, decay, rate), []).append(parameter)

    def chosen(by_muon: bool) -> list[dict[str, Any]]:
        return [
            {"params": parameters, "weight_decay": decay, "rate": rate}
            for (taken, decay, rate), parameters in groups.items()
            if taken == by_muon
        ]

    rest = torch.optim.AdamW(chosen(False), lr=optim.learning_rate, betas=optim.betas, fused=True)
    return [muon.Muon(chosen(True), lr=optim.learning_rate), rest] if hidden else [rest]


def _averager(decay: float) -> Callable[[Any, Any, Tensor | int], None]:
    """An exponential moving average that moves faster while it is young."""

    def update(averages: Any, currents: Any, count: Tensor | int) -> None:
        step = float(count)
        torch._foreach_lerp_(averages, currents, 1 - min(decay, (1 + step) / (10 + step)))  # type: ignore[attr-defined]

    return update


def _restore(
    stage: Stage, run: Run, module: nn.Module, average: AveragedModel, optimizers: list[torch.optim.Optimizer]
) -> int:
    """Continue from the newest checkpoint; returns the step it stands at, 0 where there is none."""
    saved = checkpoints.load(run.checkpoints(stage))
    if saved is None:
        return 0
    module.load_state_dict(saved["module"])
    average.load_state_dict(saved["average"])
    for optimizer, values in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(values)
    return saved["step"]


def _keep_picture(stage: Stage[Module], run: Run, module: Module, step: int) -> None:
    module.eval()
    with torch.no_grad():
        picture = stage.picture(module, step)
    if picture is not None:
        folder = run.folder / "samples"
        with replacing(folder / f"{stage.name}-{step:06d}.png") as temporary:
            picture.save(temporary, format="PNG")


@contextmanager
def _progress(console: Console, name: str, start: int, steps: int) -> Iterator:
    """A bar on a terminal; elsewhere two lines, at the start and at the end."""
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    begun = time.perf_counter()
    note = ""
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=steps, completed=start, note="")

        def advance(done: int, loss: float, speed: float) -> None:
            nonlocal note
            note = f"loss {loss:.4f}, {speed:.0f} samples/s"
            progress.update(task, completed=done, note=note)

        yield advance
    if not console.is_terminal:
        console.print(f"{name}: {steps} steps in {time.perf_counter() - begun:.0f} s; {note}")


@contextmanager
def _stop_requested() -> Iterator:
    """A function that says whether SIGINT or SIGTERM has come; a second one ends a lone program as usual."""
    requested = False

    def handle(number: int, frame: object) -> None:
        nonlocal requested
        requested = True
        if not distributed.launched():  # torchrun may pass on a signal that has come already
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: requested
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
