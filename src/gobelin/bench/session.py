"""A session of measurements: each row and precision in a process of its own, one after the other, within a budget.

A process of its own has its memory and its threads to itself, and what ends it ends one row.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from gobelin.bench.machine import machine
from gobelin.bench.peers import Peer
from gobelin.bench.rows import BenchRow
from gobelin.bench.worker import RowTask, write_task
from gobelin.bench.workload import BenchPrecision


@dataclass(frozen=True, kw_only=True)
class BenchPlan:
    """The plan of a session: rows, precisions, peers, threads, and the time for all of them in minutes."""

    rows: Sequence[BenchRow]
    precisions: Sequence[BenchPrecision]
    peers: Sequence[Peer]
    only: Sequence[str]
    threads: int
    rounds: int
    budget: float

    @property
    def tasks(self) -> list[tuple[BenchRow, BenchPrecision]]:
        """Each row in each of its precisions."""
        return [(row, one) for row in self.rows for one in row.measured_in(self.precisions)]


def run_bench(plan: BenchPlan, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure; returns what JSON holds. Rows for which no time is left are left out, and said to be."""
    results: list[dict[str, Any]] = []
    content = {
        "machine": machine(),
        "threads": plan.threads,
        "peers": {peer.name: peer.version for peer in plan.peers},
        "rows": results,
    }
    end = perf_counter() + 60 * plan.budget
    tasks = plan.tasks
    for number, (row, precision) in enumerate(tasks):
        left = end - perf_counter()
        if left <= 0:
            say(f"{row.name} in {precision} is left out: the budget of {plan.budget:g} minutes is spent")
            continue
        say(f"{row.name} in {precision} ({number + 1} of {len(tasks)})")
        task = RowTask(
            row=row.name,
            precision=precision,
            threads=plan.threads,
            rounds=plan.rounds,
            seconds=left / (len(tasks) - number),
            peers=[peer.name for peer in plan.peers],
            only=list(plan.only),
        )
        result = in_process(task)
        if "error" in result:
            say(f"{row.name} in {precision}: {result['error']}")
        results.append({"row": row.name, "text": row.text, "precision": precision, **result})
    return content


def in_process(task: RowTask) -> dict[str, Any]:
    """Measure a row in a process of its own, which begins with that number of threads; its end by force is an error."""
    with tempfile.TemporaryDirectory(prefix="gobelin-bench-") as folder:
        file = Path(folder) / "task.json"
        write_task(task, file)
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(task.threads))
        quiet = {"HF_HUB_OFFLINE": "1", "DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}
        command = [sys.executable, "-m", "gobelin.bench.worker", str(file)]
        done = subprocess.run(command, env={**os.environ, **quiet, **threads}, capture_output=True, text=True)
        result = file.with_suffix(".result")
        if result.is_file():
            return json.loads(result.read_text())
    if done.returncode == -signal.SIGKILL:
        return {"error": "its process was killed, probably for want of memory"}
    said = done.stderr.strip().splitlines()
    return {"error": f"its process ended with {done.returncode}: {said[-1] if said else 'it said nothing'}"}
