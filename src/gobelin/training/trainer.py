"""The training loop that every stage with gradients shares.

No random state outlives a step: its batch and its noise follow from (seed, stage, step) alone, so that a resumed run
is the run that was interrupted.
"""

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast, runtime_checkable
from zlib import crc32

import torch
from jaxtyping import Float, Int
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Generator, Tensor, nn
from torch.optim.swa_utils import AveragedModel

from gobelin.errors import TrainingError, is_out_of_memory
from gobelin.formats.files import replacing, write_text
from gobelin.training import distributed
from gobelin.training.checkpoints import load_checkpoint, save_checkpoint
from gobelin.training.config import OptimConfig
from gobelin.training.muon import Muon, muon_parameters
from gobelin.training.precision import autocast

Module = TypeVar("Module", bound=nn.Module)

_METRICS = "metrics.jsonl"
_LOG_EVERY = 50  # steps a line of metrics.jsonl is the mean of


@runtime_checkable
class Stage(Protocol[Module]):
    """The contract of a training stage: a module, and a loss over images of its dataset, given by their indices."""

    name: str
    optim: OptimConfig
    module: Module
    dataset_size: int
    """Images in an epoch."""
    lr_ratios: dict[str, float]
    """Fractions of the learning rate, by the prefix of parameters' names."""

    def loss(self, indices: Int[Tensor, " batch"], generator: Generator) -> dict[str, Float[Tensor, ""]]:
        """Compute losses by name; ``loss`` is the one to minimise. All randomness comes from ``generator`` (CPU).

        A stage that several processes share draws for the whole batch, then computes its own shard.
        """
        ...

    def sample_grid(self, module: Module, step: int) -> Image.Image | None:
        """Draw samples of the module, its weights averaged up to ``step``, in one image; None for a stage without."""
        ...


@dataclass(frozen=True, kw_only=True)
class Run:
    """The ``training`` folder of a run, and the settings that all stages share."""

    folder: Path
    seed: int
    device: torch.device
    save_every: int
    sample_every: int
    console: Console

    def checkpoint_folder(self, stage: Stage) -> Path:
        """Name the folder of a stage's checkpoints."""
        return self.folder / "checkpoints" / stage.name

    def log(self, stage: str, values: dict[str, float]) -> None:
        """Append a line to ``metrics.jsonl``, in the main process."""
        if not distributed.is_main_process():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / _METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": stage, **values}) + "\n")

    def forget_after(self, stage: str, step: int) -> None:
        """Remove a stage's lines after ``step`` from ``metrics.jsonl``: those steps are to be trained again."""
        file = self.folder / _METRICS
        if not distributed.is_main_process() or not file.exists():
            return
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if not _is_after(line, stage, step)]
        if len(kept) < len(lines):
            write_text(file, "".join(kept))


def _is_after(line: str, stage: str, step: int) -> bool:
    """Tell whether a line of the metrics is of a later step, or was cut off while it was written."""
    try:
        found = json.loads(line)
        return found["stage"] == stage and found["step"] > step
    except (ValueError, KeyError, TypeError):
        return True


def fit(stage: Stage[Module], run: Run) -> Module:
    """Train a stage to its last step, from its newest checkpoint if it has one; returns the averaged module.

    All processes start with the same weights and average their gradients, so that their weights stay the same.
    SIGINT and SIGTERM stop training after the current step, with a checkpoint and a KeyboardInterrupt. Raises
    :class:`TrainingError` for a loss that is not finite; the last checkpoint stands.
    """
    optim = stage.optim
    module = stage.module.train().to(run.device)
    if run.device.type == "cuda":
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizers = make_optimizers(module, optim, stage.lr_ratios)
    average = AveragedModel(module, multi_avg_fn=_averager(optim.ema))
    start = _restore(stage, run, module, average, optimizers)
    recent: list[dict[str, Tensor]] = []
    logged_at, logged = time.perf_counter(), start

    def save(step: int) -> None:
        states = {
            "module": module.state_dict(),
            "average": average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        }
        save_checkpoint(run.checkpoint_folder(stage), step, states)

    with _progress(run.console, stage.name, start, optim.steps) as advance, _stop_requested() as stop:
        for step in range(start, optim.steps):
            for group in chain.from_iterable(optimizer.param_groups for optimizer in optimizers):
                group["lr"] = group["lr_ratio"] * learning_rate(optim, step)
            generator = Generator().manual_seed(derive_seed(run.seed, stage.name, step))
            indices = batch_indices(run.seed, stage.name, step, optim.batch_size, stage.dataset_size)
            module.zero_grad(set_to_none=True)
            with _memory_of(stage):
                with autocast(run.device, optim.precision):
                    losses = stage.loss(indices, generator)
                losses["loss"].backward()
            losses = {name: value.detach().float() for name, value in losses.items()}
            stopping = torch.tensor(float(stop()), device=run.device)
            gradients = (parameter.grad for parameter in module.parameters() if parameter.grad is not None)
            distributed.all_reduce_mean_([*gradients, *losses.values(), stopping])
            norm = nn.utils.clip_grad_norm_(module.parameters(), optim.clip_norm)
            if not (losses["loss"].isfinite() and norm.isfinite()):
                raise TrainingError(
                    f"stage {stage.name}, step {step}, images {indices[:4].tolist()}…: the loss is "
                    f"{losses['loss'].item()} and its gradient's norm {norm.item()}; the last checkpoint stands, "
                    "start again in another folder with a lower learning rate"
                )
            for optimizer in optimizers:
                optimizer.step()
            average.update_parameters(module)

            done = step + 1
            recent.append({**losses, "grad_norm": norm})
            if done % _LOG_EVERY == 0 or done == optim.steps:
                now = time.perf_counter()
                means = {name: torch.stack([r[name] for r in recent]).mean().item() for name in recent[0]}
                speed = (done - logged) * optim.batch_size / (now - logged_at)
                run.log(
                    stage.name,
                    {"step": done, "lr": learning_rate(optim, step), "samples_per_s": speed, **means},
                )
                advance(done, means["loss"], speed)
                recent, logged_at, logged = [], now, done
            last, main_process = done == optim.steps, distributed.is_main_process()
            if main_process and (done % run.save_every == 0 or last or stopping):
                save(done)
            if stopping:
                distributed.broadcast(
                    done
                )  # torchrun ends all processes when one ends: not before the checkpoint stands
                run.console.print(f"{stage.name}: stopped; step {done} is saved, and --resume goes on from it")
                raise KeyboardInterrupt
            if main_process and (done % run.sample_every == 0 or last):
                _save_sample_grid(stage, run, cast(Module, average.module), done)
    return cast(Module, average.module.eval())


@contextmanager
def _memory_of(stage: Stage) -> Iterator[None]:
    """Raise :class:`TrainingError` that says what to lower where a batch does not fit into memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        section = stage.name.removesuffix("_encoder")
        raise TrainingError(
            f"stage {stage.name}: a batch of {stage.optim.batch_size} images does not fit into memory: give a smaller "
            f"one, --{section}.optim.batch-size; the last checkpoint stands"
        ) from error


def learning_rate(optim: OptimConfig, step: int) -> float:
    """Learning rate schedule: linear warm-up, constant, then half a cosine down to the last step."""
    if step < optim.warmup_steps:
        return optim.learning_rate * (step + 1) / optim.warmup_steps
    fall = max(optim.warmup_steps, round(optim.hold * optim.steps))
    progress = (step - fall) / max(1, optim.steps - 1 - fall)
    cosine = (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2
    return optim.learning_rate * (optim.final_lr_ratio + (1 - optim.final_lr_ratio) * cosine)


def batch_indices(seed: int, stage: str, step: int, batch_size: int, dataset_size: int) -> Int[Tensor, " batch"]:
    """Select the images of a step: consecutive positions in an endless sequence of shuffled epochs."""
    positions = torch.arange(step * batch_size, (step + 1) * batch_size)
    epochs = positions // dataset_size
    parts = []
    for epoch in epochs.unique().tolist():
        generator = Generator().manual_seed(derive_seed(seed, f"{stage}/order", epoch))
        order = torch.randperm(dataset_size, generator=generator)
        parts.append(order[positions[epochs == epoch] % dataset_size])
    return torch.cat(parts)


def derive_seed(seed: int, purpose: str, number: int) -> int:
    """Derive an independent seed for every purpose and number from the run's seed."""
    return crc32(f"{seed}/{purpose}/{number}".encode()) | seed << 32 & 0x7FFF_FFFF_FFFF_FFFF


def make_optimizers(
    module: nn.Module, optim: OptimConfig, lr_ratios: dict[str, float] | None = None
) -> list[torch.optim.Optimizer]:
    """Make AdamW for all parameters, or Muon and AdamW if the configuration asks for Muon.

    Weight decay applies to matrices and kernels, not to biases, norms and scalars. ``lr_ratios`` scales the learning
    rate of parameters by the prefix of their names.
    """
    by_muon = muon_parameters(module) if optim.optimizer == "muon" else set()
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        decay = optim.weight_decay if parameter.ndim >= 2 else 0.0
        ratio = next((ratio for prefix, ratio in (lr_ratios or {}).items() if name.startswith(prefix)), 1.0)
        groups.setdefault((name in by_muon, decay, ratio), []).append(parameter)

    def param_groups(of_muon: bool) -> list[dict[str, Any]]:
        return [
            {"params": parameters, "weight_decay": decay, "lr_ratio": ratio}
            for (muon, decay, ratio), parameters in groups.items()
            if muon == of_muon
        ]

    adamw = torch.optim.AdamW(param_groups(False), lr=optim.learning_rate, betas=optim.betas, fused=True)
    return [Muon(param_groups(True), lr=optim.learning_rate), adamw] if by_muon else [adamw]


def _averager(decay: float) -> Callable[[Any, Any, Tensor | int], None]:
    """Make the update of an exponential moving average, whose decay rises from 2/11 to ``decay`` as in TensorFlow's."""

    def update(averages: Any, currents: Any, count: Tensor | int) -> None:
        step = float(count)
        torch._foreach_lerp_(averages, currents, 1 - min(decay, (1 + step) / (10 + step)))  # type: ignore[attr-defined]

    return update


def _restore(
    stage: Stage, run: Run, module: nn.Module, average: AveragedModel, optimizers: list[torch.optim.Optimizer]
) -> int:
    """Load the newest checkpoint; returns its step, 0 if there is none."""
    saved = load_checkpoint(run.checkpoint_folder(stage))
    if saved is None:
        run.forget_after(stage.name, 0)
        return 0
    module.load_state_dict(saved["module"])
    average.load_state_dict(saved["average"])
    for optimizer, values in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(values)
    run.forget_after(stage.name, saved["step"])
    return saved["step"]


def _save_sample_grid(stage: Stage[Module], run: Run, module: Module, step: int) -> None:
    """Write the stage's sample grid, if it has one, to ``samples/STAGE-STEP.png``."""
    module.eval()
    with torch.no_grad():
        image = stage.sample_grid(module, step)
    if image is not None:
        folder = run.folder / "samples"
        with replacing(folder / f"{stage.name}-{step:06d}.png") as temporary:
            image.save(temporary, format="PNG")


@contextmanager
def _progress(console: Console, name: str, start: int, steps: int) -> Iterator:
    """Show a progress bar on a terminal; elsewhere print one line at the end."""
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
    """Catch SIGINT and SIGTERM; yields a function that tells whether one has come. A second one ends a lone process.

    Python handles signals in its main thread alone: in any other, nothing is caught.
    """
    requested = False

    def handle(number: int, frame: object) -> None:
        nonlocal requested
        requested = True
        if not distributed.is_torchrun():  # torchrun may pass on a signal that has come already
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    caught = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    previous = {number: signal.signal(number, handle) for number in caught}
    try:
        yield lambda: requested
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
