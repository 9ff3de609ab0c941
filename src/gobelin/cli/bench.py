"""``gobelin bench``: measure speed and memory beside other programs."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gobelin.cli.options import Positional, parse
from gobelin.cli.report_files import ReportFiles, publish
from gobelin.errors import UsageError

if TYPE_CHECKING:
    from gobelin.bench.peers import Peer
    from gobelin.bench.rows import BenchRow
    from gobelin.bench.workload import BenchPrecision

_CHART_SUFFIXES = (".svg", ".png")


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
    """Rows by name, or by their group or kind."""
    list: bool = False
    """List the rows, and the other programs that are there, and exit."""
    precision: tuple[Literal["bfloat16", "float32"], ...] = ("bfloat16", "float32")
    """The precisions to compute in; growth curves are measured in the fastest of them alone."""
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
    plot: Path | None = None
    """Draw the ratios and the growth curves into this file, SVG or PNG."""


def run(arguments: Sequence[str]) -> None:
    """Run ``gobelin bench``."""
    options = parse(Bench, "bench", arguments)
    from gobelin.bench.peers import find_peers
    from gobelin.bench.rows import find_rows

    rows = find_rows(options.rows)
    peers = [] if options.peers == ("none",) else find_peers(options.peers)
    if options.list:
        for row in rows:
            print(f"{row.name:<18} {row.group:<7} {row.kind:<8} {row.text} ({', '.join(row.precisions)})")
        for peer in peers:
            print(peer.line)
        return
    for name, value in (("--rounds", options.rounds), ("--budget", options.budget), ("--threads", options.threads)):
        if value is not None and not value > 0:
            raise UsageError(f"{name} is {value:g}: give a number above 0")
    if options.plot is not None and options.plot.suffix.lower() not in _CHART_SUFFIXES:
        raise UsageError(f"--plot is {options.plot}: give a name that ends in {' or '.join(_CHART_SUFFIXES)}")
    _measure(options, rows, peers)


def _measure(options: Bench, rows: "Sequence[BenchRow]", peers: "Sequence[Peer]") -> None:
    """Measure the rows, and publish the report and the chart."""
    import torch

    from gobelin.bench.bench_chart import write_bench_chart
    from gobelin.bench.bench_report import bench_report
    from gobelin.bench.machine import busy_line, machine
    from gobelin.bench.session import BenchPlan, run_bench
    from gobelin.bench.workloads import refuse_unknown_contenders

    refuse_unknown_contenders(options.only, rows)
    for peer in peers:
        _say(peer.line)
    found = machine()
    if busy := busy_line(found):
        _say(busy)
    precisions: list[BenchPrecision] = [one for one in options.precision if one != "bfloat16" or found["bfloat16"]]
    if len(precisions) < len(options.precision):
        _say("this machine does not multiply bfloat16 in hardware: it is left out")
    plan = BenchPlan(
        rows=rows,
        precisions=precisions,
        peers=peers,
        only=options.only,
        threads=options.threads or torch.get_num_threads(),
        rounds=options.rounds,
        budget=options.budget,
    )
    content = run_bench(plan, _say)
    publish(options, content, bench_report(content))
    if options.plot is not None:
        write_bench_chart(content, options.plot)


def _say(sentence: str) -> None:
    """Say one sentence on standard error."""
    print(f"gobelin: {sentence}", file=sys.stderr, flush=True)
