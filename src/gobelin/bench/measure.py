"""Measurement of a row in this process: prepare, compare, take turns, divide."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from gobelin.bench.paired import equals_spread, paired_ratio, take_turns, timed, verdict
from gobelin.bench.peers import PEERS
from gobelin.bench.workload import BenchPrecision, Call, Contender, Workload
from gobelin.errors import UsageError

AGAIN = "again"
PEAK = "matmul"
TOLERANCE: Mapping[BenchPrecision, float] = {"float32": 1e-3, "bfloat16": 0.1}
"""The largest relative RMS error of a contender that computes the same thing."""
_LEAST = 3  # rounds
_TURN = 0.15  # seconds: shorter calls are repeated
_WARM = 10.0  # seconds: so long a first call is not made again before the turns


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of a row: at most so many rounds, and after the least number of them, so many seconds."""

    rounds: int
    seconds: float = math.inf


@dataclass(kw_only=True)
class _Prepared:
    """A contender that is ready: its call, what it took to be, its error, and its shortest call's seconds."""

    contender: Contender
    call: Call
    seconds: float
    error: float | None
    shortest: float
    values: list[float] = field(default_factory=list)


def measure(
    workload: Workload,
    precision: BenchPrecision,
    limits: Limits,
    peers: Collection[str] = tuple(PEERS),
    peak_side: int = 4096,
) -> dict[str, Any]:
    """Measure a workload's contenders in turns; returns what JSON holds.

    Left out, with a sentence, are contenders whose peer is not among ``peers`` or not there, that fail, and that
    compute something else than the reference. Beside them stand the first contender once more, and a product of two
    matrices of ``peak_side`` rows and columns in the same precision. Raises :class:`UsageError` where the first
    contender itself cannot be measured.
    """
    began = perf_counter()
    reference = None if workload.reference is None else workload.reference()
    ready: list[_Prepared] = []
    failed: dict[str, str] = {}
    for contender in workload.contenders:
        if contender.peer is not None and (contender.peer not in peers or PEERS[contender.peer].missing):
            continue  # it was said once, for all rows
        try:
            ready.append(_prepared(contender, reference, precision, workload))
        except Exception as error:  # a peer's own, of no particular type
            if not ready and not failed:
                raise UsageError(f"{contender.name} cannot be measured: {_one_line(error)}") from error
            failed[contender.name] = _one_line(error)
    first = ready[0]
    calls = max(1, math.ceil(_TURN / min(one.shortest for one in ready))) if workload.is_timed else 1
    turns: dict[str, Callable[[], float]] = {one.contender.name: _turn(one.call, calls, workload) for one in ready}
    operations = 0 if workload.operations is None else workload.operations()
    if operations:
        product = _matmul(peak_side, precision)
        turns[PEAK] = lambda: timed(product)
    turns[AGAIN] = turns[first.contender.name]
    taken = take_turns(turns, limits.rounds, _until(began + limits.seconds))
    for one in ready:
        one.values = taken[one.contender.name]
    spread = equals_spread(first.values, taken[AGAIN])
    peak = 2 * peak_side**3 / _median(taken[PEAK]) if operations else None
    return {
        "unit": workload.unit,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "rounds": len(first.values),
        "calls": calls,
        "samples": workload.samples,
        "operations": operations or None,
        "peak": peak,
        "spread": spread,
        "equals": asdict(paired_ratio(taken[AGAIN], first.values)),
        "contenders": {one.contender.name: _result(one, ready, spread, operations, peak) for one in ready},
        "failed": failed,
        "seconds": perf_counter() - began,
    }


def relative_rms(one: Tensor, reference: Tensor) -> float:
    """Compute the root mean square of the difference, relative to the reference's own."""
    difference = one.double() - reference.double()
    return float(difference.square().mean().sqrt() / reference.double().square().mean().sqrt())


class ComputesSomethingElse(Exception):
    """A contender's result is not the reference's: its time would say nothing."""


def _prepared(
    contender: Contender, reference: Tensor | None, precision: BenchPrecision, workload: Workload
) -> _Prepared:
    """Prepare a contender: load, convert, compile, call it twice, and compare its result with the reference."""
    start = perf_counter()
    call = contender.prepare()
    before = perf_counter()
    result = call()
    shortest = perf_counter() - before
    seconds = perf_counter() - start
    error = None
    if reference is not None and contender.is_compared:
        if not isinstance(result, Tensor) or result.shape != reference.shape:
            what = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ComputesSomethingElse(f"it returns {what}, and not {list(reference.shape)}")
        error = relative_rms(result, reference)
        if not error <= TOLERANCE[precision]:  # a NaN is none
            raise ComputesSomethingElse(
                f"it computes something else: its error relative to float32 is {error:.2g}, "
                f"where {TOLERANCE[precision]:g} is allowed"
            )
    if workload.is_timed and shortest < _WARM:
        shortest = timed(call)
    return _Prepared(contender=contender, call=call, seconds=seconds, error=error, shortest=shortest)


def _turn(call: Call, calls: int, workload: Workload) -> Callable[[], float]:
    """Make one turn of a contender: timed, or what the call itself measured."""
    if workload.is_timed:
        return lambda: timed(call, calls)
    return lambda: float(call() or math.nan)


def _until(end: float) -> Callable[[int], bool]:
    """Make the rule by which rounds end: by the clock, but not before the least number of them."""
    return lambda done: done >= _LEAST and perf_counter() > end


def _result(
    one: _Prepared, ready: list[_Prepared], spread: float, operations: int, peak: float | None
) -> dict[str, Any]:
    """Describe a contender's values: the median, its ratios, its verdict, and its share of the peak."""
    first = ready[0]
    middle = _median(one.values)
    ratio = paired_ratio(one.values, first.values)
    against = next((other for other in ready if other.contender.name == one.contender.against), None)
    return {
        "peer": one.contender.peer,
        "median": middle,
        "ratio": asdict(ratio),
        "verdict": None if one is first else verdict(ratio, spread),
        "against": None
        if against is None
        else {"name": against.contender.name, **asdict(paired_ratio(one.values, against.values))},
        "peak_share": None if peak is None else operations / middle / peak,
        "error": one.error,
        "preparation": one.seconds,
        "values": one.values,
    }


def _matmul(side: int, precision: BenchPrecision) -> Callable[[], object]:
    """Make the product of two square matrices: the most that the machine multiplies in this precision."""
    one, other = (torch.randn(side, side).to(getattr(torch, precision)) for _ in range(2))
    out = torch.empty_like(one)
    return lambda: torch.mm(one, other, out=out)


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _one_line(error: BaseException) -> str:
    """Write an error as one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:199]}…"
