"""The workload of each row, by its kind, and its measurement in this process."""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, get_args

from gobelin.bench.growth import at_most, measure_growth
from gobelin.bench.measure import Limits, measure
from gobelin.bench.part_contenders import text_workload, vae_workload
from gobelin.bench.picture_contenders import picture_workload
from gobelin.bench.process_contenders import memory_workload, start_workload
from gobelin.bench.rows import BenchRow, RowKind
from gobelin.bench.trace_contenders import trace_workload
from gobelin.bench.training_contenders import train_workload
from gobelin.bench.unet_contenders import unet_workload
from gobelin.bench.workload import BenchPrecision, Workload
from gobelin.validation import refuse_unknown

_KINDS: Mapping[RowKind, Callable[..., Workload]] = {
    "unet": unet_workload,
    "trace": trace_workload,
    "vae": vae_workload,
    "text": text_workload,
    "picture": picture_workload,
    "train": train_workload,
    "start": start_workload,
    "memory": memory_workload,
}
_PEAK_SIDE = {True: 256, False: 4096}  # rows and columns of the matrices of a hidden row, and of the others


def measure_row(
    row: BenchRow, precision: BenchPrecision, limits: Limits, peers: Collection[str], only: Collection[str]
) -> dict[str, Any]:
    """Measure a row in this process; returns what JSON holds."""
    side = _PEAK_SIDE[row.hidden]
    if row.kind == "growth":
        along, values, sizes = (row.sizes[name] for name in ("along", "values", "sizes"))
        values = at_most(along, values, os.cpu_count() or 1)
        return measure_growth(along, values, sizes, precision, limits, peers, only, side)
    return measure(workload_of(row, precision).limited_to(only), precision, limits, peers, side)


def workload_of(row: BenchRow, precision: BenchPrecision) -> Workload:
    """Make a row's workload; nothing is loaded or computed yet. That of a growth curve is of its first size."""
    if row.kind == "growth":
        return unet_workload(**row.sizes["sizes"], precision=precision)
    return _KINDS[row.kind](precision=precision, **row.sizes)


def refuse_unknown_contenders(names: Sequence[str], rows: Sequence[BenchRow]) -> None:
    """Raise :class:`UsageError` with the nearest name for a contender that none of the rows has."""
    precisions: tuple[BenchPrecision, ...] = get_args(BenchPrecision)
    there = [one.name for row in rows for each in precisions for one in workload_of(row, each).contenders]
    refuse_unknown(names, dict.fromkeys(there), what="contender")
