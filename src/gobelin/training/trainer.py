"""The training loop that every stage with gradients shares.

No random state outlives a step: its batch and its noise follow from (seed, stage, step, row) alone, so that a resumed
run is the run that was interrupted, however many processes and micro-batches it is cut into.
"""

import math
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from itertools import chain, islice
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from gobelin.errors import TrainingError, is_out_of_memory
from gobelin.training import distributed
from gobelin.training.checkpoints import load_checkpoint, save_checkpoint
from gobelin.training.config import OptimConfig
from gobelin.training.muon import Muon, muon_parameters
from gobelin.training.parallelize import parallelize, synchronised
from gobelin.training.precision import autocast
from gobelin.training.progress import show_progress
from gobelin.training.run_folder import Run
from gobelin.training.weight_average import WeightAverage

Module = TypeVar("Module", bound=nn.Module)
LOG_EVERY = 50
"""Steps that a line of metrics.jsonl is the mean of."""
_AHEAD = 2  # steps whose batches are made before they are needed
_OPTIMIZER_STATE = StateDictOptions(flatten_optimizer_state_dict=True, ignore_frozen_params=True)
_STATE = "state."  # how names of an optimizer's tensors begin; the rest of its state follows from the configuration


@runtime_checkable
class TrainingBatch(Protocol):
    """The samples that one process trains on at a time, made on the CPU."""

    def to(self, device: torch.device) -> "TrainingBatch":
        """Move every tensor to a device."""
        ...


@runtime_checkable
class Stage(Protocol[Module]):
    """The contract of a training stage: a module whose ``forward`` takes a batch and returns losses, and its batches.

    ``loss`` is the one to minimise. A stage knows one device and one process.
    """

    name: str
    optim: OptimConfig
    module: Module
    lr_ratios: dict[str, float]
    """Fractions of the learning rate, by the prefix of parameters' names."""
    is_divisible: bool
    """Whether the loss is a mean over samples, so that a batch can be divided; else every process takes all of it."""

    def batch(self, step: int, rows: slice) -> Any:
        """Make these rows of a step's batch, on the CPU: a pure function of its arguments, called in any thread."""
        ...

    def describe(self, step: int) -> str:
        """Name the first samples of a step's batch, for an error."""
        ...

    def evaluate(self, module: Module, step: int, run: Run) -> Image.Image | None:
        """Measure the module, its weights averaged, and draw its samples in one image; None for a stage without."""
        ...


def fit(stage: Stage[Module], run: Run) -> Module:
    """Train a stage to its last step, from its newest checkpoint if it has one; returns the averaged module.

    All processes start with the same weights and average their gradients, so that their weights stay the same.
    SIGINT and SIGTERM stop training after the current step, with a checkpoint and a KeyboardInterrupt. Raises
    :class:`TrainingError` for a loss that is not finite; the last checkpoint stands.
    """
    optim, module = stage.optim, stage.module.train().to(run.device)
    if run.device.type == "cuda":
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    whole = deepcopy(module) if distributed.is_initialized() and run.parallelism == "fsdp" else module
    parallel = parallelize(module, run.parallelism, run.device)
    optimizers = make_optimizers(module, optim, stage.lr_ratios)
    average = WeightAverage(module, optim.ema)
    start = _restore(stage, run, module, average, optimizers)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    recent: list[dict[str, Tensor]] = []
    clock = _Clock(optim.batch_size, start)
    if start == 0:
        _evaluate(stage, run, whole, average, 0)  # so that what cannot be sampled is said before hours of training

    with (
        show_progress(run.console, stage.name, start, optim.steps) as advance,
        _stop_requested() as stop,
        _prefetched(stage, start) as batches,
    ):
        for step in range(start, optim.steps):
            for group in chain.from_iterable(optimizer.param_groups for optimizer in optimizers):
                group["lr"] = group["lr_ratio"] * learning_rate(optim, step)
            module.zero_grad(set_to_none=True)
            with clock.waiting():
                micro_batches = next(batches)
            losses = _gradients(stage, run, parallel, micro_batches)
            stopping = torch.tensor(float(stop()), device=run.device)
            distributed.all_reduce_mean_([*losses.values(), stopping])
            norm = _whole(nn.utils.clip_grad_norm_(trained, optim.clip_norm))
            if not (losses["loss"].isfinite() and norm.isfinite()):
                raise TrainingError(
                    f"stage {stage.name}, step {step}, {stage.describe(step)}: the loss is "
                    f"{losses['loss'].item()} and its gradient's norm {norm.item()}; the last checkpoint stands, "
                    "start again in another folder with a lower learning rate"
                )
            for optimizer in optimizers:
                optimizer.step()
            average.update(step)

            done = step + 1
            recent.append({**losses, "grad_norm": norm})
            last = done == optim.steps
            if done % LOG_EVERY == 0 or last:
                means = {name: torch.stack([r[name] for r in recent]).mean().item() for name in recent[0]}
                speeds = clock.read(done)
                run.log(stage.name, {"step": done, "lr": learning_rate(optim, step), **means, **speeds})
                advance(done, means["loss"], speeds)
                recent = []
            if done % run.save_every == 0 or last or stopping:
                state = _state(module, average, optimizers)
                save_checkpoint(run.checkpoint_folder(stage.name), done, state)
            if stopping:
                run.console.print(f"{stage.name}: stopped; step {done} is saved, and --resume goes on from it")
                raise KeyboardInterrupt
            if done % run.sample_every == 0 or last:
                with clock.paused():
                    _evaluate(stage, run, whole, average, done)
    _put_average(whole, average)
    return whole.eval()


def _gradients(stage: Stage, run: Run, module: nn.Module, batches: list[TrainingBatch]) -> dict[str, Tensor]:
    """Add up the gradients of a step's micro-batches; returns the means of the losses, detached, in float32."""
    totals: dict[str, Tensor] = {}
    for number, batch in enumerate(batches, start=1):
        with _memory_of(stage), synchronised(module, last=number == len(batches)):
            with autocast(run.device, stage.optim.precision):
                losses = module(batch.to(run.device))
            (losses["loss"] / len(batches)).backward()
        for name, value in losses.items():
            totals[name] = totals.get(name, 0.0) + value.detach().float() / len(batches)
    return totals


@contextmanager
def _memory_of(stage: Stage) -> Iterator[None]:
    """Raise :class:`TrainingError` that says what to lower where a batch does not fit into memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        section = stage.name.removesuffix("_encoder")
        micro = "" if not stage.is_divisible else f", or divide it: --{section}.optim.accumulate 2"
        raise TrainingError(
            f"stage {stage.name}: a batch of {stage.optim.batch_size} images does not fit into memory: give a smaller "
            f"one, --{section}.optim.batch-size{micro}; the last checkpoint stands"
        ) from error


@contextmanager
def _prefetched(stage: Stage, start: int) -> Iterator[Iterator[list[TrainingBatch]]]:
    """Make the micro-batches of the next steps in another thread, while this one computes."""
    parts = distributed.world_size() * stage.optim.accumulate if stage.is_divisible else 1
    first = distributed.rank() * stage.optim.accumulate if stage.is_divisible else 0
    shares = [slice(first + number, None, parts) for number in range(stage.optim.accumulate if parts > 1 else 1)]

    def make(step: int) -> list[TrainingBatch]:
        return [stage.batch(step, rows) for rows in shares]

    def batches() -> Iterator[list[TrainingBatch]]:
        steps = iter(range(start, stage.optim.steps))
        ahead: deque[Future[list[TrainingBatch]]] = deque(pool.submit(make, step) for step in islice(steps, _AHEAD))
        while ahead:
            made = ahead.popleft().result()
            ahead.extend(pool.submit(make, step) for step in islice(steps, 1))
            yield made

    pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
    try:
        yield batches()
    finally:
        pool.shutdown(cancel_futures=True)


class _Clock:
    """Measure samples a second, the share of the time that is spent waiting for data, and memory."""

    def __init__(self, batch_size: int, step: int):
        self._batch_size, self._step = batch_size, step
        self._began, self._waited, self._idle = time.perf_counter(), 0.0, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the block's time as waiting for data."""
        before = time.perf_counter()
        yield
        self._waited += time.perf_counter() - before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the block's time out of the measurement."""
        before = time.perf_counter()
        yield
        self._idle += time.perf_counter() - before

    def read(self, step: int) -> dict[str, float]:
        """Return what was measured since the last reading."""
        now = time.perf_counter()
        taken = max(now - self._began - self._idle, 1e-9)
        read = {
            "samples_per_s": (step - self._step) * self._batch_size / taken,
            "data_wait": self._waited / taken,
            "memory_mb": distributed.peak_memory() / 2**20,
        }
        self._step, self._began, self._waited, self._idle = step, now, 0.0, 0.0
        return read


def learning_rate(optim: OptimConfig, step: int) -> float:
    """Learning rate schedule: linear warm-up, constant, then half a cosine down to the last step."""
    if step < optim.warmup_steps:
        return optim.learning_rate * (step + 1) / optim.warmup_steps
    fall = max(optim.warmup_steps, round(optim.hold * optim.steps))
    progress = (step - fall) / max(1, optim.steps - 1 - fall)
    cosine = (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2
    return optim.learning_rate * (optim.final_lr_ratio + (1 - optim.final_lr_ratio) * cosine)


def make_optimizers(
    module: nn.Module, optim: OptimConfig, lr_ratios: dict[str, float] | None = None
) -> list[torch.optim.Optimizer]:
    """Make AdamW for all parameters that are trained, or Muon and AdamW if the configuration asks for Muon.

    Weight decay applies to matrices and kernels, not to biases, norms and scalars. ``lr_ratios`` scales the learning
    rate of parameters by the prefix of their names.
    """
    by_muon = muon_parameters(module) if optim.optimizer == "muon" else set()
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = optim.weight_decay if parameter.ndim >= 2 else 0.0
        ratio = next((ratio for prefix, ratio in (lr_ratios or {}).items() if name.startswith(prefix)), 1.0)
        groups.setdefault((name in by_muon, decay, ratio), []).append(parameter)

    def param_groups(of_muon: bool) -> list[dict[str, Any]]:
        return [
            {"params": parameters, "weight_decay": decay, "lr_ratio": ratio}
            for (muon, decay, ratio), parameters in groups.items()
            if muon == of_muon
        ]

    optimizers: list[torch.optim.Optimizer] = []
    if param_groups(True):
        optimizers.append(Muon(param_groups(True), lr=optim.learning_rate))
    if param_groups(False):
        optimizers.append(torch.optim.AdamW(param_groups(False), lr=optim.learning_rate, betas=optim.betas, fused=True))
    return optimizers


def _state(module: nn.Module, average: WeightAverage, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """List every tensor that a stage goes on from, by name: trained weights, their averages, the optimizers' state."""
    weights = {name: value.detach() for name, value in module.named_parameters() if value.requires_grad}
    states = get_optimizer_state_dict(module, optimizers, options=_OPTIMIZER_STATE)
    return {
        **{f"weights.{name}": value for name, value in weights.items()},
        **{f"average.{name}": value for name, value in average.averages.items()},
        **{f"optimizer.{name}": cast(Tensor, one) for name, one in states.items() if name.startswith(_STATE)},
    }


def _restore(
    stage: Stage, run: Run, module: nn.Module, average: WeightAverage, optimizers: list[torch.optim.Optimizer]
) -> int:
    """Load the newest checkpoint; returns its step, 0 if there is none."""
    state = _state(module, average, optimizers)
    step = load_checkpoint(run.checkpoint_folder(stage.name), state)
    if step:
        prefix = "optimizer."
        states = get_optimizer_state_dict(module, optimizers, options=_OPTIMIZER_STATE)
        loaded = {name.removeprefix(prefix): one for name, one in state.items() if name.startswith(prefix)}
        states.update(cast(dict[str, Any], loaded))
        set_optimizer_state_dict(module, optimizers, states, options=_OPTIMIZER_STATE)
    run.forget_after(stage.name, step)
    distributed.barrier()
    return step


def _evaluate(stage: Stage[Module], run: Run, whole: Module, average: WeightAverage, step: int) -> None:
    """Let the stage measure and draw itself with averaged weights, in the main process, while the others wait."""
    with _averaged(whole, average) as averaged:
        if distributed.is_main_process():
            averaged.eval()
            with torch.no_grad():
                sheet = stage.evaluate(averaged, step, run)
            if sheet is not None:
                run.save_sheet(stage.name, step, sheet)
            averaged.train()
    distributed.barrier()


@contextmanager
def _averaged(whole: Module, average: WeightAverage) -> Iterator[Module]:
    """Put the averaged weights into the module, or into its unsharded copy, while the block runs."""
    is_copy = _put_average(whole, average)
    try:
        yield whole
    finally:
        if not is_copy:
            average.swap()


def _put_average(whole: nn.Module, average: WeightAverage) -> bool:
    """Put the averaged weights into the module; returns whether that is an unsharded copy of the one that is trained.

    Every process takes part in gathering shards.
    """
    gathered = {name: _whole(value) for name, value in average.averages.items() if isinstance(value, DTensor)}
    if gathered:
        whole.load_state_dict(gathered, strict=False)
    else:
        average.swap()
    return bool(gathered)


def _whole(tensor: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Gather a tensor from the shards of all processes; one without shards stays itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


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
