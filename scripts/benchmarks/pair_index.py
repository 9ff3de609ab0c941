"""Opening a pair index of many made pairs: seconds and memory, each measured in a process of its own.

    python scripts/benchmarks/pair_index.py --pairs 10_000_000 --folder /tmp/made-index

Printed are the time to write it, its size on disk, the seconds to open it and to read 1,000 pairs from all over, and
how much the resident memory of the process grows, after Python and NumPy were loaded: what is its own, and pages of
mapped files, which the system takes back when it needs memory and which all processes share.
"""

import argparse
import hashlib
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from gobelin.data.buckets import Preprocessing
from gobelin.data.pair_index import Pair, PairIndex, PairIndexWriter, Shard

PAIRS_OF_A_SHARD = 10_000


def main() -> None:
    """Make the index, and measure in another process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, required=True, help="where the index is made; it stays there")
    parser.add_argument("--opened", action="store_true", help="measure an index that is there")
    options = parser.parse_args()
    if options.opened:
        measure(options.folder)
        return
    start = time.perf_counter()
    make(options.folder, options.pairs)
    size = sum(file.stat().st_size for file in options.folder.rglob("*") if file.is_file())
    print(f"{options.pairs:,} pairs written in {time.perf_counter() - start:.1f} s, {size / 1e6:,.0f} MB on disk")
    subprocess.run([sys.executable, __file__, "--folder", str(options.folder), "--opened"], check=True)


def make(folder: Path, pairs: int) -> None:
    """Write made pairs of the lengths that web captions have."""
    with PairIndexWriter(folder, {"kind": "tars"}) as writer:
        for number in range(pairs):
            shard, row = divmod(number, PAIRS_OF_A_SHARD)
            if not row:
                writer.add_shard(Shard(name=f"{shard:05}.tar", size=10**9, time=shard))
            caption = f"a made caption of picture {number} with as many words as people write for one on the web"
            writer.add(
                Pair(
                    name=f"{shard:05}.tar/{number:09}.jpg",
                    captions=(caption,),
                    size=100_000,
                    time=shard,
                    width=256 + number % 512,
                    height=256 + number % 311,
                    sha256=hashlib.sha256(number.to_bytes(8, "little")).digest(),
                    shard=shard,
                    offset=512 + row * 101_000,
                )
            )


def measure(folder: Path) -> None:
    """Open the index, assign buckets as a dataset does, and read pairs from all over."""
    before, start = (resident("RssAnon"), resident("RssFile")), time.perf_counter()
    index = PairIndex(folder)
    report("opened", start, before)
    start = time.perf_counter()
    buckets = Preprocessing(size=512, buckets=True).assign(index.widths, index.heights)
    report(f"buckets of {len(buckets):,} assigned", start, before)
    start = time.perf_counter()
    for row in np.random.default_rng(0).integers(0, len(index), 1000).tolist():
        assert index[row].captions[0].split()[5] == str(row)
    report("1,000 pairs read", start, before)
    start = time.perf_counter()
    assert index.find(index.names[len(index) // 2]) == index[len(index) // 2]
    report("a name found, the first time", start, before)


def report(what: str, start: float, before: tuple[float, float]) -> None:
    """Print the time since ``start``, and the memory beyond ``before``: the process's own, and mapped pages."""
    seconds = time.perf_counter() - start
    own, mapped = resident("RssAnon") - before[0], resident("RssFile") - before[1]
    print(f"{what} in {seconds:.3f} s; memory {own:+,.0f} MB, and {mapped:+,.0f} MB of mapped pages")


def resident(name: str) -> float:
    """Read the resident memory of this process in MB, that of its own or that of mapped files (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


if __name__ == "__main__":
    main()
