"""Training loops that take turns: each in a thread of its own, which waits at the start of every step.

So loops that know nothing of each other, :func:`gobelin.training.trainer.fit` among them, are measured in pairs.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from threading import Semaphore, Thread
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from gobelin.training.config import OptimConfig
from gobelin.training.losses import UNetBatch
from gobelin.training.run_folder import Run
from gobelin.unet_config import UNetConfig


class Finished(Exception):
    """Ends a loop at its next turn."""


class Loop:
    """A training loop in its own thread; ``run`` is given :meth:`turn`, and calls it at the start of every step.

    Made, it is at its first step, with everything before that done.
    """

    def __init__(self, name: str, run: Callable[[Callable[[], None]], object]):
        self.name = name
        self._permitted, self._arrived = Semaphore(0), SimpleQueue[BaseException | None]()
        self._ended = False
        self._thread = Thread(target=self._run, args=(run,), name=name, daemon=True)
        self._thread.start()
        self._wait()

    def turn(self) -> None:
        """Wait for permission to take the next step."""
        self._arrived.put(None)
        self._permitted.acquire()
        if self._ended:
            raise Finished

    def steps(self, count: int) -> float:
        """Take some steps; returns the seconds of one."""
        start = perf_counter()
        for _ in range(count):
            self._permitted.release()
        for _ in range(count):
            self._wait()
        return (perf_counter() - start) / count

    def end(self) -> None:
        """End the loop, before its next step."""
        self._ended = True
        self._permitted.release()
        self._thread.join()

    def _run(self, run: Callable[[Callable[[], None]], object]) -> None:
        try:
            run(self.turn)
        except Finished:
            pass
        except BaseException as error:
            self._arrived.put(error)

    def _wait(self) -> None:
        error = self._arrived.get()
        if error is not None:
            raise error


def time_steps(run: Callable[[Callable[[], None]], object], warm: int, count: int) -> float:
    """Run a training loop in this thread, as a program that trains alone; returns the seconds of a step after ``warm``.

    In the first steps memory is still growing.
    """
    starts: list[float] = []

    def turn() -> None:
        starts.append(perf_counter())
        if len(starts) > warm + count:
            raise Finished

    with suppress(Finished):
        run(turn)
    return (starts[-1] - starts[warm]) / count


class TakingTurns(nn.Module):
    """A loss whose ``forward`` first waits for its turn: by it, ``fit`` becomes a loop that takes turns."""

    def __init__(self, loss: nn.Module, turn: Callable[[], None]):
        super().__init__()
        self.loss = loss
        self._turn = turn

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """Wait, and compute the loss."""
        self._turn()
        return self.loss(batch)


@dataclass(kw_only=True, eq=False)
class MadeStage:
    """A stage over batches that are made, used again and again. It has no last step, and shows nothing."""

    module: nn.Module
    optim: OptimConfig
    batches: Sequence[Any]
    """A whole step's, or this process's share of it."""
    name: str = "unet"
    is_divisible: bool = True
    lr_ratios: dict[str, float] = field(default_factory=dict)

    def batch(self, step: int, rows: slice) -> Any:
        """Return one that is there."""
        return self.batches[step % len(self.batches)]

    def describe(self, step: int) -> str:
        """Say that it is made."""
        return "made latents"

    def evaluate(self, module: nn.Module, step: int, run: Run) -> None:
        """Measure nothing."""
        return None


class NoAverage:
    """Stands in for the moving average of the weights where the cost of having one is measured."""

    def __init__(self, module: nn.Module, decay: float):
        self.averages: dict[str, Tensor] = {}

    def update(self, step: int) -> None:
        """Average nothing."""

    def swap(self) -> None:
        """Exchange nothing."""


def quiet_run(folder: Path) -> Run:
    """Make a run on the CPU that prints, saves and samples nothing."""
    never = 10**9
    return Run(
        folder=folder,
        seed=0,
        device=torch.device("cpu"),
        save_every=never,
        sample_every=never,
        console=Console(quiet=True),
    )


def make_batch(config: UNetConfig, count: int, length: int, side: int | None = None) -> UNetBatch:
    """Make a batch of random latents, noise, timesteps and text embeddings."""
    shape = (count, config.in_channels, side or config.sample_size, side or config.sample_size)
    return UNetBatch(
        latents=torch.randn(shape),
        noise=torch.randn(shape),
        timesteps=torch.randint(0, 1000, (count,)),
        texts=torch.randn(count, length, config.cross_attention_dim),
    )
