"""What the benchmarks share: loops that take turns, tables in Markdown, and results in a file.

The rest of a paired measurement is in the package, :mod:`gobelin.bench`.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gobelin.bench.machine import busy_line, machine_line
from gobelin.bench.paired import Ratio, paired_ratio
from gobelin.bench.training_loops import Loop


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
    return asdict(paired_ratio(one, other))


def written(ratio: dict[str, float]) -> str:
    """Write a ratio with its quartiles."""
    return str(Ratio(**ratio))


def print_machine(of: dict[str, Any]) -> None:
    """Print a machine, and whether other work on it makes the seconds worth little."""
    print(machine_line(of))
    if busy := busy_line(of):
        print(busy)


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
