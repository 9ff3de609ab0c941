"""A row's own process: ``python -m gobelin.bench.worker TASK.json`` measures it, and writes the result beside it."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gobelin.bench.workload import BenchPrecision


@dataclass(frozen=True, kw_only=True)
class RowTask:
    """A row to be measured, and how. ``only`` names contenders, empty for all."""

    row: str
    precision: BenchPrecision
    threads: int
    rounds: int
    seconds: float
    peers: list[str]
    only: list[str]


def measure_task(task: RowTask) -> dict[str, Any]:
    """Measure a row in this process."""
    import torch

    from gobelin.bench.measure import Limits
    from gobelin.bench.rows import ROWS
    from gobelin.bench.workloads import measure_row

    torch.set_num_threads(task.threads)
    limits = Limits(rounds=task.rounds, seconds=task.seconds)
    return measure_row(ROWS[task.row], task.precision, limits, task.peers, task.only)


def write_task(task: RowTask, file: Path) -> None:
    """Write a task for a process to read."""
    file.write_text(json.dumps(asdict(task)))


def measure_file() -> None:
    """Measure the task in the file that is named, and write the result, or the sentence why there is none."""
    from gobelin.errors import UsageError

    file = Path(sys.argv[1])
    try:
        result = measure_task(RowTask(**json.loads(file.read_text())))
    except UsageError as error:
        result = {"error": str(error)}
    file.with_suffix(".result").write_text(json.dumps(result))


if __name__ == "__main__":
    measure_file()
