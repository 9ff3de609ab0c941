"""Progress of a stage, measured and shown: a bar on a terminal, a line at the end elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gobelin.training import distributed


class Clock:
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


@contextmanager
def show_progress(
    console: Console, name: str, start: int, steps: int
) -> Iterator[Callable[[int, float, dict[str, float]], None]]:
    """Show loss, images a second, time left, memory and the share of time spent waiting for data."""
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    begun = time.perf_counter()
    note = ""
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=steps, completed=start, note="")

        def advance(done: int, loss: float, speeds: dict[str, float]) -> None:
            nonlocal note
            note = (
                f"loss {loss:.4f}, {speeds['samples_per_s']:.0f} images/s, {speeds['memory_mb']:,.0f} MB, "
                f"{speeds['data_wait']:.0%} waiting for data"
            )
            progress.update(task, completed=done, note=note)

        yield advance
    if not console.is_terminal:
        console.print(f"{name}: {steps} steps in {time.perf_counter() - begun:.0f} s; {note}", highlight=False)
