"""The workload of each row, by its kind."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gobelin.bench.rows import BenchRow, RowKind
from gobelin.bench.unet_contenders import unet_workload
from gobelin.bench.workload import Precision, Workload
from gobelin.validation import refuse_unknown

_KINDS: Mapping[RowKind, Callable[..., Workload]] = {"unet": unet_workload}


def workload_of(row: BenchRow, precision: Precision) -> Workload:
    """Make a row's workload; nothing is loaded or computed yet."""
    sizes: dict[str, Any] = dict(row.sizes)
    return _KINDS[row.kind](precision=precision, **sizes)


def refuse_unknown_contenders(names: Sequence[str], rows: Sequence[BenchRow]) -> None:
    """Raise :class:`UsageError` with the nearest name for a contender that none of the rows has."""
    there = [one.name for row in rows for one in workload_of(row, "float32").contenders]
    refuse_unknown(names, dict.fromkeys(there), what="contender")
