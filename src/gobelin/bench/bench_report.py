"""The report of a benchmark: a table a row, made of its JSON, with the verdicts in words."""

from typing import Any

from gobelin.bench.machine import machine_line
from gobelin.evaluate.measurement_report import Report, ReportTable

_COLUMNS = ("", "median", "time, gobelin's = 1 (quartiles)", "verdict", "of peak", "error", "ready in")
_GROWTH_NOTES = {
    "processes": "each process computes ten passes: with as many cores as processes the time would stay as it is (n^0)",
    "threads": "with a core for each thread and nothing else in the way, twice of them would halve the time (n^−1)",
}


def bench_report(content: dict[str, Any]) -> Report:
    """Make the tables of a benchmark."""
    peers = ", ".join(f"{name} {version}" for name, version in content["peers"].items() if version)
    return Report(
        title="Benchmark",
        description=f"{machine_line(content['machine'])}; {content['threads']} thread(s); beside {peers or 'no peer'}",
        tables=[
            *_not_measured(content["rows"]),
            *(_growth_table(row) if "points" in row else _table(row) for row in content["rows"] if "error" not in row),
        ],
    )


def _not_measured(rows: list[dict[str, Any]]) -> list[ReportTable]:
    """Make the table of rows that could not be measured, where there are some."""
    found = [(row["row"], row["precision"], row["error"]) for row in rows if "error" in row]
    return [ReportTable(title="Not measured", columns=("row", "precision", "why"), rows=found)] if found else []


def _growth_table(row: dict[str, Any]) -> ReportTable:
    """Make the table of a growth curve: a row a size, and below it the exponent of each contender's time."""
    names = list(row["points"][0]["contenders"])
    rows = []
    for point in row["points"]:
        there = [point["contenders"].get(name) for name in names]
        medians = ["–" if one is None else quantity(one["median"], point["unit"]) for one in there]
        others = ["–" if one is None else f"{_ratio(one['ratio'])} {one['verdict']}" for one in there[1:]]
        rows.append((f"{point['at']}", *medians, *others))
    exponents = [row["growth"].get(name) for name in names]
    rows.append(("growth", *("–" if one is None else f"∝ n^{one:.2f}" for one in exponents), *("" for _ in names[1:])))
    return ReportTable(
        title=f"{row['row']}, {row['precision']}: {row['text']}",
        columns=(row["along"], *names, *(f"{name}, gobelin's = 1 (quartiles)" for name in names[1:])),
        rows=rows,
        bold=frozenset({len(rows) - 1}),
        note=_GROWTH_NOTES.get(row["along"], ""),
    )


def _table(row: dict[str, Any]) -> ReportTable:
    rows = [_cells(name, one, row["unit"]) for name, one in row["contenders"].items()]
    rows += [(name, "–", "–", f"left out: {why}", "–", "–", "–") for name, why in row["failed"].items()]
    return ReportTable(
        title=f"{row['row']}, {row['precision']}: {row['text']}",
        columns=_COLUMNS,
        rows=rows,
        note=_note(row),
    )


def _cells(name: str, one: dict[str, Any], unit: str) -> tuple[str, ...]:
    against = one["against"]
    extra = "" if against is None else f"; {_ratio(against)} of {against['name']}"
    return (
        name,
        quantity(one["median"], unit),
        ("1" if one["verdict"] is None else _ratio(one["ratio"])) + extra,
        one["verdict"] or "–",
        "–" if one["peak_share"] is None else f"{one['peak_share']:.0%}",
        "–" if one["error"] is None else f"{one['error']:.1e}",
        quantity(one["preparation"], "s"),
    )


def _ratio(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.3f} ({ratio['low']:.3f}–{ratio['high']:.3f})"


def quantity(value: float, unit: str) -> str:
    """Write seconds or megabytes with three digits: "1.23 s", "45.6 ms", "1,830 MB"."""
    if unit == "MB":
        return f"{value:,.0f} MB"
    if value < 1:
        value, unit = 1000 * value, "ms"
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f} {unit}"


def _note(row: dict[str, Any]) -> str:
    parts = [f"{row['rounds']} rounds", f"gobelin twice: apart by {row['spread'] - 1:.1%}, and what is within is level"]
    if row["samples"] > 1:
        parts.append(f"{row['samples']} samples a call")
    if row["operations"]:
        parts.append(f"{row['operations'] / 1e9:,.4g} GFLOP a call")
        parts.append(f"peak {row['peak'] / 1e9:,.4g} GFLOP/s, a product of two matrices in the same rounds")
    return "; ".join(parts)
