"""``gobelin bench``: measure speed and memory beside other programs."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional

from gobelin.cli.options import parse
from gobelin.cli.report_files import ReportFiles, publish
from gobelin.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Bench(ReportFiles):
    """Measure speed and memory beside other programs: the same weights and inputs, in turns, on this machine.

    What is measured is called a row; without a name, all of them are, as far as the time reaches. Programs that are not
    installed are named and left out; nothing is installed or downloaded.

    Some examples:
      gobelin bench --list
      gobelin bench unet-64 --precision bfloat16 --json bench.json
      gobelin bench tiny train --peers diffusers --rounds 30
      gobelin bench growth --budget 30 --plot growth.svg
    """

    rows: Positional[tuple[str, ...]] = ()
    """Rows by name, or groups of them."""
    list: bool = False
    """List the rows, and the other programs that are there, and exit."""
    precision: tuple[Literal["bfloat16", "float32"], ...] = ("bfloat16", "float32")
    """The precisions to compute in."""
    peers: tuple[str, ...] = ()
    """The other programs to compare with, by name, or none; without it, all that are installed."""
    only: tuple[str, ...] = ()
    """These contenders of a row alone, by name, beside gobelin's own."""
    threads: int | None = None
    """The number of threads of every contender; without it, the number of cores."""
    rounds: int = 15
    """The number of turns of each contender; fewer where time is short, but 3."""
    budget: float = 60.0
    """Minutes for all rows together; each gets its share, and what has begun is not broken off."""


def run(arguments: Sequence[str]) -> None:
    """Run ``gobelin bench``."""
    options = parse(Bench, "bench", arguments)
    from gobelin.bench.peers import find_peers
    from gobelin.bench.rows import find_rows

    rows = find_rows(options.rows)
    peers = find_peers([]) if options.peers != ("none",) else []
    if options.peers and peers:
        peers = find_peers(options.peers)
    if options.list:
        width = max(len(row.name) for row in rows)
        for row in rows:
            print(f"{row.name:<{width}}  {row.text} ({', '.join(row.precisions)}) [{row.group}]")
        for peer in peers:
            print(peer.line)
        return
    for name, value in (("--rounds", options.rounds), ("--budget", options.budget), ("--threads", options.threads)):
        if value is not None and not value > 0:
            raise UsageError(f"{name} is {value:g}: give a number above 0")
    _measure(options, rows, peers)


def _measure(options: Bench, rows: Sequence, peers: Sequence) -> None:
    """Measure the rows, and publish the report."""
    import torch

    from gobelin.bench.bench_report import bench_report
    from gobelin.bench.machine import busy_line, machine
    from gobelin.bench.session import BenchPlan, run_bench
    from gobelin.bench.workloads import refuse_unknown_contenders

    refuse_unknown_contenders(options.only, rows)
    for peer in peers:
        say(peer.line)
    found = machine()
    if busy := busy_line(found):
        say(busy)
    precisions = options.precision
    if not found["fast_bfloat16"] and "bfloat16" in precisions:
        say("this machine does not multiply bfloat16 in hardware: float32 alone is measured")
        precisions = tuple(one for one in precisions if one != "bfloat16")
    plan = BenchPlan(
        rows=rows,
        precisions=precisions,
        peers=peers,
        only=options.only,
        threads=options.threads or torch.get_num_threads(),
        rounds=options.rounds,
        budget=options.budget,
    )
    content = run_bench(plan, say)
    publish(options, content, bench_report(content))


def say(sentence: str) -> None:
    """Say one sentence on standard error."""
    print(f"gobelin: {sentence}", file=sys.stderr, flush=True)
