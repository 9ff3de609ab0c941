"""Fill the tables of docs/scale.md from what the benchmarks wrote.

    python scripts/benchmarks/scale_page.py --json runs/benchmarks/*.json

A table lies between ``<!-- figures: NAME -->`` and ``<!-- end -->``. One whose figures no file has stays as it is.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from paired import written

from gobelin.bench.machine import machine_line

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"
_BLOCK = re.compile(r"(<!-- figures: (?P<name>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Read, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, nargs="+", required=True)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for file in options.json:
        results = json.loads(file.read_text())
        where = machine_line(results.pop("machine"))
        found |= {name: (value, where) for name, value in results.items()}

    def filled(block: re.Match[str]) -> str:
        name = block["name"]
        if name not in found:
            print(f"{name}: no figures, left as it is")
            return block[0]
        value, where = found[name]
        return f"{block[1]}{_TABLES[name](value)}\n\n{where}.\n{block[3]}"

    options.page.write_text(_BLOCK.sub(filled, options.page.read_text()))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join([f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows)])


def _training_steps(measured: list[dict[str, Any]]) -> str:
    """Make a row for each loop, a column for each precision and number of threads."""
    names = list(dict.fromkeys(name for one in measured for name in one["seconds"]))
    head = ["time of a step, gobelin's = 1", *(_threads(f"{one['precision']}, {one['threads']}") for one in measured)]
    first = ["gobelin, steps/s", *(f"{1 / np.median(one['seconds']['gobelin']):.2f}" for one in measured)]
    rows = [
        [name, *(written(one["ratios"][name]) if name in one["ratios"] else "–" for one in measured)]
        for name in names
        if name != "gobelin"
    ]
    return _table(head, [first, *rows])


def _wait(measured: list[dict[str, Any]]) -> str:
    rows = [(m["preset"], m["stage"], f"{m['samples_per_s']:.0f}", f"{m['data_wait']:.2%}") for m in measured]
    return _table(("preset", "stage", "samples/s", "share of time waiting"), rows)


def _turns(what: str) -> Callable[[dict[str, Any]], str]:
    """Make the table of loops or runs that took turns; the first is what the others are compared with."""

    def table(measured: dict[str, Any]) -> str:
        rows = []
        for name, seconds in measured["seconds"].items():
            ratio = written(measured["ratios"][name]) if name in measured["ratios"] else "1"
            rows.append((name, f"{measured['batch_size'] / np.median(seconds):.0f}", ratio))
        return _table((what, "samples/s", "time, the first's = 1 (quartiles)"), rows)

    return table


def _threads(text: str) -> str:
    """Write the number of threads that a text ends with in words."""
    return f"{text} thread" if text.endswith(" 1") else f"{text} threads"


def _memory(measured: dict[str, Any]) -> str:
    """Make a table of a run's memory, one of its files, and a sentence on a made index."""
    kinds, held = ("index", "pixels", "latents", "texts"), ("peak", "own", "mapped")
    runs = [(f"{one['pairs']:,}", one) for one in measured["runs"]]
    memory = [(pairs, *(f"{one['memory'][kind]:,.0f}" for kind in held)) for pairs, one in runs]
    disk = [(pairs, *(f"{one['bytes'][kind] / one['pairs']:,.0f}" for kind in kinds)) for pairs, one in runs]
    text = _table(("pairs", *(f"{kind} MB" for kind in held)), memory)
    text += f"\n\n{_table(('bytes a pair on disk', *kinds), disk)}\n"
    if one := measured["index"]:
        text += (
            f"\nAn index of {one['pairs']:,} pairs opens in {one['seconds']:.2f} s, with {one['grown']['own']:+.0f} MB"
            f" of its own and {one['grown']['mapped']:+.0f} MB mapped; it takes {one['bytes'] / one['pairs']:.0f}"
            " bytes a pair on disk."
        )
    return text


def _sd15(measured: dict[str, Any]) -> str:
    """Make a row for each size of latents and way to train; what all were run with stands below."""
    rows, settings = [], []
    for key, ways in measured.items():
        side, _, setting = key.partition(", ")
        settings.append(setting)
        for name, one in ways.items():
            if "failed" in one:
                rows.append((f"{side}×{side}", name, "–", one["failed"], "–", "–"))
            else:
                trained, peak = f"{one['trained'] / 1e6:.1f} M", f"{one['memory']['peak']:,.0f}"
                spent = [f"{np.median(one[kind]):.1f}" for kind in ("seconds", "cpu_seconds")]
                rows.append((f"{side}×{side}", name, trained, *spent, peak))
    table = _table(("latents", "way", "trained", "seconds a step", "of CPU time, all threads", "peak MB"), rows)
    (setting,) = set(settings)
    return f"{table}\n\nAll with {_threads(setting.removesuffix(' thread(s)'))}."


_TABLES: dict[str, Callable[[Any], str]] = {
    "training_steps": _training_steps,
    "wait": _wait,
    "cache": _turns("latents and texts"),
    "processes": _turns("processes"),
    "memory": _memory,
    "steps": _sd15,
}


if __name__ == "__main__":
    main()
