"""Progress of a stage: a bar on a terminal, a line at the end elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


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
