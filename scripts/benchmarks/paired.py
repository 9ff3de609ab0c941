"""Paired measurements: loops that take turns in one process, ratios of neighbours, and the machine that it was.

Each loop runs in a thread of its own and waits for its turn at the start of every step, so that what slows the machine
slows all of them; a loop that is there twice says how much a ratio of equals spreads.
"""

import json
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from threading import Semaphore, Thread
from time import perf_counter
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from gobelin.training.config import OptimConfig
from gobelin.training.precision import has_fast_bfloat16
from gobelin.training.run_folder import Run

_BUSY = 0.25  # of the cores


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


def take_turns(loops: Sequence[Loop], rounds: int, steps: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Let each loop take some steps in every round, in an order that is turned round; returns seconds a step by name.

    The first steps of each are not counted.
    """
    for loop in loops:
        loop.steps(warm_up)
    seconds: dict[str, list[float]] = {loop.name: [] for loop in loops}
    for number in range(rounds):
        for loop in loops if number % 2 == 0 else reversed(loops):
            seconds[loop.name].append(loop.steps(steps))
    for loop in loops:
        loop.end()
    return seconds


def ratios(one: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Describe the ratios of neighbours: the median and the quartiles of ``one`` / ``other``."""
    low, middle, high = np.percentile(np.array(one) / np.array(other), [25, 50, 75])
    return {"median": float(middle), "low": float(low), "high": float(high)}


def written(ratio: dict[str, float]) -> str:
    """Write a ratio with its quartiles."""
    return f"{ratio['median']:.3f} ({ratio['low']:.3f}–{ratio['high']:.3f})"


def machine() -> dict[str, Any]:
    """Name the machine: its CPU, cores, what it multiplies in hardware, the versions, and how busy it was before."""
    capabilities = torch.cpu.get_capabilities()
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "fast_bfloat16": has_fast_bfloat16(torch.device("cpu")),
        "amx": any(bool(value) for name, value in capabilities.items() if name.startswith("amx")),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
    }


def print_machine(of: dict[str, Any]) -> None:
    """Print a machine, and whether other work on it makes the seconds worth little."""
    print(machine_line(of))
    if of["load_before"] > _BUSY * (of["cores"] or 1):
        print("other work runs here: seconds are too long, ratios spread, and several threads lose most")


def machine_line(of: dict[str, Any]) -> str:
    """Write a machine in one line."""
    bfloat16 = "bfloat16 in hardware" if of["fast_bfloat16"] else "no bfloat16 in hardware"
    return (
        f"{of['cpu']}, {of['cores']} cores, {of['memory_gb']:.0f} GB, {bfloat16}, "
        f"{'with' if of['amx'] else 'no'} AMX, torch {of['torch']}; load before: {of['load_before']:.1f}"
    )


def _cpu_name() -> str:
    """Name the CPU; a virtual machine's often hides its model, and then the family and model numbers are given."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    name = fields.get("model name", platform.processor())
    return f"{name} (family {fields.get('cpu family')}, model {fields.get('model')})"


def memory(process: str = "self") -> dict[str, float]:
    """Read a process's memory in MB (Linux): the most it had, its own, and mapped pages, which the system can drop."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    found = {name: value for name, _, value in (line.partition(":") for line in lines)}
    names = {"peak": "VmHWM", "own": "RssAnon", "mapped": "RssFile"}
    return {name: int(found[field].split()[0]) / 1024 for name, field in names.items()}


def print_table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table in Markdown."""
    print(f"\n{title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def write_results(path: Path | None, results: dict[str, Any]) -> None:
    """Write results as JSON where a path is given; what is there under other names stays."""
    if path is None:
        return
    earlier = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(earlier | results, indent=2, ensure_ascii=False) + "\n")
