"""Growth curves: how the time of a U-Net's pass grows with its side, its batch, threads and processes."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from gobelin.bench.measure import Limits, measure
from gobelin.bench.peers import PEERS
from gobelin.bench.process_contenders import several_processes
from gobelin.bench.unet_contenders import BASE, unet_workload
from gobelin.bench.workload import BenchPrecision, Contender, Workload

_CONTENDERS = (BASE, "diffusers")
_CALLS = 10  # of each process in a turn


def measure_growth(
    along: str,
    values: Sequence[int],
    sizes: dict[str, Any],
    precision: BenchPrecision,
    limits: Limits,
    peers: Collection[str] = tuple(PEERS),
    only: Collection[str] = (),
    peak_side: int = 4096,
) -> dict[str, Any]:
    """Measure a pass at each of the ``values`` of "side", "batch", "threads" or "processes"; returns what JSON holds.

    ``growth`` of a contender is the exponent p of time ∝ valueᵖ, a straight line through the logarithms.
    """
    threads = torch.get_num_threads()
    names = only or _CONTENDERS
    points: list[dict[str, Any]] = []
    for value in values:
        each = Limits(rounds=limits.rounds, seconds=limits.seconds / len(values))
        if along == "threads":
            torch.set_num_threads(value)
        workload = _workload(along, value, sizes, precision).limited_to(names)
        points.append({"at": value, **measure(workload, precision, each, peers, peak_side)})
    torch.set_num_threads(threads)
    there = [name for name in points[0]["contenders"] if all(name in point["contenders"] for point in points)]
    medians = {name: [point["contenders"][name]["median"] for point in points] for name in there}
    growth = {name: exponent(values, seconds) for name, seconds in medians.items()}
    return {"along": along, "precision": precision, "points": points, "growth": growth}


def exponent(values: Sequence[float], seconds: Sequence[float]) -> float | None:
    """Fit the exponent of a power law; None for one point."""
    if len(values) < 2:
        return None
    return float(np.polyfit(np.log(values), np.log(seconds), 1)[0])


def at_most(along: str, values: Sequence[int], cores: int) -> list[int]:
    """Leave out threads and processes beyond the machine's cores."""
    return [value for value in values if along not in ("threads", "processes") or value <= cores]


def _workload(along: str, value: int, sizes: dict[str, Any], precision: BenchPrecision) -> Workload:
    if along != "processes":
        return unet_workload(**{**sizes, **({} if along == "threads" else {along: value})}, precision=precision)
    plain = unet_workload(**sizes, precision=precision)

    def together(contender: Contender) -> Contender:
        start: Callable[[], Any] = partial(
            several_processes, contender.name, value, _CALLS, precision=precision, **sizes
        )
        return replace(contender, prepare=start, is_compared=False)

    samples = value * _CALLS * plain.samples
    return Workload(contenders=[together(one) for one in plain.contenders], samples=samples)
