"""Reading a 12-megapixel JPEG as training sees it: milliseconds at several sizes, decoded small and decoded whole.

    python scripts/benchmarks/read_image.py --repeats 9

The picture is smooth shapes with noise on them, of 4000×3000 pixels and quality 90. Printed is the median of the
CPU time, of one thread.
"""

import argparse
import io
import time
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps

from gobelin.data.buckets import Preprocessing, decode
from gobelin.data.indexed_images import problem

SIZES = (64, 256, 512)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    content = made()
    print(f"a JPEG of 4000×3000 pixels, {len(content) / 1e6:.1f} MB")
    for size in SIZES:
        for buckets in (False, True):
            preprocessing = Preprocessing(size=size, buckets=buckets)
            spent = timed(lambda of=preprocessing: of.read(content, "it"), options.repeats)
            print(f"read at {size}{' in its bucket' if buckets else ''}: {spent:.1f} ms")
        spent = timed(lambda to=size: ImageOps.fit(decode(content, "it"), (to, to)), options.repeats)
        print(f"decoded whole and scaled to {size}: {spent:.1f} ms")
    print(f"verified, as each is once: {timed(lambda: problem(content), options.repeats):.1f} ms")


def made() -> bytes:
    """Draw the picture, as a JPEG's bytes."""
    generator = np.random.default_rng(0)
    small = Image.fromarray(generator.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    levels = np.asarray(small.resize((4000, 3000), Image.Resampling.BICUBIC)).astype(np.int16)
    noisy = (levels + generator.normal(0, 6, levels.shape)).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def timed(read: Callable[[], object], repeats: int) -> float:
    """Time a call: the median of the CPU's milliseconds, which other work on the machine does not change."""
    spent = []
    for _ in range(repeats):
        start = time.process_time()
        read()
        spent.append(time.process_time() - start)
    return 1000 * float(np.median(spent))


if __name__ == "__main__":
    main()
