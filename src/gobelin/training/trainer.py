"""The training loop that every stage with gradients shares.

No random state outlives a step: its batch and its noise follow from (seed, stage, step, row) alone, so that a resumed
run is the run that was interrupted, however many processes and micro-batches it is cut into.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
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

from gobelin.allocator import keep_freed_memory
from gobelin.errors import TrainingError, is_out_of_memory
from gobelin.training import distributed
from gobelin.training.checkpoints import load_checkpoint, newest_step, save_checkpoint
from gobelin.training.config import OptimConfig
from gobelin.training.frozen_weights import FrozenWeights
from gobelin.training.muon import Muon, muon_parameters
from gobelin.training.parallelize import Parallelism, parallelize, synchronised
from gobelin.training.precision import autocast
from gobelin.training.progress import Clock, show_progress
from gobelin.training.run_folder import Run
from gobelin.training.stop_request import StopRequest, caught_signals
from gobelin.training.weight_average import WeightAverage

Module = TypeVar("Module", bound=nn.Module)
LOG_EVERY = 50
"""Steps that a line of metrics.jsonl is the mean of."""
_AHEAD = 2  # steps whose batches are made before they are needed
_PATIENCE = 0.1  # seconds between two looks for a request to stop, while data is waited for
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
    """Whether the loss is a mean over samples, so that a batch can be taken in parts; else it takes all at once.

    Processes share a batch in any case: the loss then sees to it that it is that of the whole.
    """

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
    SIGINT and SIGTERM stop training after the current step, with a checkpoint and a KeyboardInterrupt; they end a wait
    for data, and an evaluation, which is made again when training goes on. Raises :class:`TrainingError` for a loss
    that is not finite; the last checkpoint stands.
    """
    optim, module = stage.optim, stage.module.train().to(run.device)
    if run.device.type == "cuda":
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    parallelism = _parallelism(stage, run)
    whole = deepcopy(module) if distributed.is_initialized() and parallelism == "fsdp" else module
    if optim.compile:
        module.compile()  # its forward pass, in place: what is drawn and measured meanwhile is not
    parallel = parallelize(module, parallelism, run.device)
    optimizers = make_optimizers(module, optim, stage.lr_ratios)
    average = WeightAverage(module, optim.ema)
    # Shards of FSDP are not this process's to replace.
    frozen = FrozenWeights(nn.Module() if parallelism == "fsdp" else module, run.device, optim.precision)
    saved = start = _restore(stage, run, module, average, optimizers)
    recent: list[dict[str, Tensor]] = []
    clock = Clock(optim.batch_size, start)

    def save(step: int) -> None:
        nonlocal saved
        if step > saved:
            save_checkpoint(run.checkpoint_folder(stage.name), step, _state(module, average, optimizers))
            saved = step

    with (
        keep_freed_memory(),
        show_progress(run.console, stage.name, start, optim.steps) as advance,
        caught_signals() as stop,
        _prefetched(stage, start, stop) as next_batch,
    ):
        if _is_sampled(run, optim, start):  # at 0, so that what cannot be sampled is said before hours of training
            _evaluate(stage, run, whole, average, start, stop)
        for step in range(start, optim.steps):
            with clock.waiting():
                micro_batches = next_batch()
            if distributed.any_process(stop.is_set, run.device):
                save(step)
                raise KeyboardInterrupt
            rate = learning_rate(optim, step)
            losses = _train_step(stage, run, module, parallel, micro_batches, optimizers, rate, step, frozen)
            average.update(step)

            done = step + 1
            recent.append(losses)
            last = done == optim.steps
            if done % LOG_EVERY == 0 or last:
                means = {name: torch.stack([r[name] for r in recent]).mean().item() for name in recent[0]}
                speeds = clock.read(done)
                run.log(stage.name, {"step": done, "lr": rate, **means, **speeds})
                advance(done, means["loss"], speeds)
                recent = []
            if done % run.save_every == 0 or last:
                save(done)
            if _is_sampled(run, optim, done):
                with clock.paused():
                    _evaluate(stage, run, whole, average, done, stop)
        if distributed.any_process(stop.is_set, run.device):
            raise KeyboardInterrupt
    _put_average(whole, average)
    return whole.eval()


def _parallelism(stage: Stage, run: Run) -> Parallelism:
    """Choose DDP for a text encoder: it is small, and FSDP takes no scalar, such as CLIP's temperature."""
    return run.parallelism if stage.is_divisible else "ddp"


def _is_sampled(run: Run, optim: OptimConfig, step: int) -> bool:
    return step % run.sample_every == 0 or step == optim.steps


def _train_step(
    stage: Stage,
    run: Run,
    module: nn.Module,
    parallel: nn.Module,
    micro_batches: list[TrainingBatch],
    optimizers: list[torch.optim.Optimizer],
    rate: float,
    step: int,
    frozen: FrozenWeights,
) -> dict[str, Tensor]:
    """Take one step; returns the losses and the gradient's norm, means over the processes.

    Raises :class:`TrainingError`, before any weight changes, for a loss or a gradient that is not finite.
    """
    for group in chain.from_iterable(optimizer.param_groups for optimizer in optimizers):
        group["lr"] = group["lr_ratio"] * rate
    module.zero_grad(set_to_none=True)
    with _memory_of(stage):
        with frozen.in_use():
            losses = _gradients(stage, run, parallel, micro_batches)
        distributed.all_reduce_mean_(losses.values())
        trained = _with_gradients(stage, module, run)
        norm = _whole(nn.utils.clip_grad_norm_(trained, stage.optim.clip_norm))
        if not (losses["loss"].isfinite() and norm.isfinite()):
            raise TrainingError(
                f"stage {stage.name}, step {step}, {stage.describe(step)}: the loss is "
                f"{losses['loss'].item()} and its gradient's norm {norm.item()}; the last checkpoint stands, "
                "start again in another folder with a lower learning rate"
            )
        for optimizer in optimizers:
            optimizer.step()
    return {**losses, "grad_norm": norm}


def _with_gradients(stage: Stage, module: nn.Module, run: Run) -> list[nn.Parameter]:
    """List the trained parameters, each with a gradient: zeros where the loss does not depend on it in this step.

    Raises :class:`TrainingError` for such a one under DDP, which would wait for its gradient.
    """
    trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
    for name, parameter in trained.items():
        if parameter.grad is None:
            if distributed.is_initialized() and _parallelism(stage, run) == "ddp":
                raise TrainingError(
                    f"stage {stage.name}: its loss does not depend on {name}, which several processes cannot train: "
                    "freeze it, or train in one process"
                )
            parameter.grad = torch.zeros_like(parameter)
    return list(trained.values())


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
def _prefetched(stage: Stage, start: int, stop: StopRequest) -> Iterator[Callable[[], list[TrainingBatch]]]:
    """Make the micro-batches of the next steps in another thread, while this one computes.

    Yields a function that waits for those of the next step; where a stop is requested meanwhile, it returns none.
    """
    parts = stage.optim.accumulate if stage.is_divisible else 1
    first = distributed.rank() * parts
    shares = [slice(first + number, None, distributed.world_size() * parts) for number in range(parts)]
    steps = iter(range(start, stage.optim.steps))
    ahead: deque[Future[list[TrainingBatch]]] = deque()

    def make(step: int) -> list[TrainingBatch]:
        return [stage.batch(step, rows) for rows in shares]

    def next_batch() -> list[TrainingBatch]:
        ahead.extend(pool.submit(make, step) for step in islice(steps, 1 + _AHEAD - len(ahead)))
        while not (stop.is_set or ahead[0].done()):
            wait([ahead[0]], timeout=_PATIENCE)
        return [] if stop.is_set else ahead.popleft().result()

    pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
    try:
        yield next_batch
    finally:
        pool.shutdown(cancel_futures=True)


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
    folder, step = run.checkpoint_folder(stage.name), 0
    if newest_step(folder):  # else the optimizers are left as they are: to list their state takes a step with no rate
        state = _state(module, average, optimizers)
        step = load_checkpoint(folder, state)
        prefix = "optimizer."
        states = get_optimizer_state_dict(module, optimizers, options=_OPTIMIZER_STATE)
        loaded = {name.removeprefix(prefix): one for name, one in state.items() if name.startswith(prefix)}
        states.update(cast(dict[str, Any], loaded))
        set_optimizer_state_dict(module, optimizers, states, options=_OPTIMIZER_STATE)
    # A checkpoint is written before its step is evaluated, which may not have come to an end.
    run.forget_after(stage.name, step, evaluated=step - 1 if _is_sampled(run, stage.optim, step) else step)
    distributed.barrier()
    return step


def _evaluate(
    stage: Stage[Module], run: Run, whole: Module, average: WeightAverage, step: int, stop: StopRequest
) -> None:
    """Let the stage measure and draw itself with averaged weights, in the main process, while the others wait."""
    with _averaged(whole, average) as averaged:
        if distributed.is_main_process() and not stop.is_set:
            averaged.eval()
            with stop.interrupting(), torch.no_grad():
                sheet = stage.evaluate(averaged, step, run)
                if sheet is not None:
                    run.save_sheet(stage.name, step, sheet)
            averaged.train()
    distributed.wait_for_main()


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
