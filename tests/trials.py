"""Trials: files and texts that were made to harm, in any number, and what the slowest of them took.

``GOBELIN_TRIALS=2000 pytest tests/formats tests/checkpoint/test_hostile_models.py`` makes so many of each kind, and
prints the longest time and the largest growth of memory at the end.
"""

import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar, cast

from hypothesis import HealthCheck, settings

_SLOW = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
Test = TypeVar("Test", bound=Callable[..., Any])


@dataclass
class Measured:
    """The cases of a kind: how many, the longest time in seconds, the largest growth of memory in bytes."""

    cases: int = 0
    longest: float = 0.0
    growth: int = 0


MEASURED: dict[str, Measured] = {}


def peak() -> int:
    """The most bytes that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def trials(count: int) -> Callable[[Test], Test]:
    """Make a test of Hypothesis' run ``count`` cases, or as many as GOBELIN_TRIALS says, and measure them."""

    def decorate(test: Test) -> Test:
        found = MEASURED.setdefault(test.__name__, Measured())
        handle = cast(Any, test).hypothesis
        inner = handle.inner_test

        @wraps(inner)
        def measured(*args: Any, **kwargs: Any) -> None:
            began, before = time.perf_counter(), peak()
            try:
                inner(*args, **kwargs)
            finally:
                found.cases += 1
                found.longest = max(found.longest, time.perf_counter() - began)
                found.growth = max(found.growth, peak() - before)

        handle.inner_test = measured
        examples = int(os.environ.get("GOBELIN_TRIALS", count))
        return settings(max_examples=examples, suppress_health_check=_SLOW)(test)

    return decorate


def summary() -> list[str]:
    """A line for each kind that was tried."""
    return [
        f"{name}: {found.cases:,} cases, the slowest {found.longest:.2f} s, memory by {found.growth / 2**20:.0f} MB"
        for name, found in sorted(MEASURED.items())
        if found.cases
    ]
