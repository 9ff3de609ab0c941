"""Attention while painting on a CPU: the kernel of ours that this one has, by tiles or by vectors, beside torch's own.

    python scripts/benchmarks/painting_attention.py --threads 2 --precision bfloat16

The shapes are those of Stable Diffusion 1.5's U-Net at 512×512 pixels, and of the shipped model's at a batch of 16.
Both take turns; printed are medians of milliseconds, and of the ratios of neighbours in a round with their quartiles,
what of the machine's arithmetic the kernel reaches, and the error of each against float64.
"""

import argparse
from collections.abc import Callable
from time import perf_counter

import numpy as np
import torch
import torch.nn.functional as F
from paired import print_machine, ratios, written
from torch import Tensor

from gobelin.attention import attention
from gobelin.bench.machine import machine
from gobelin.kernels import tiled_attention, vector_attention

_SHAPES = (
    *((1, 8, 4096, 4096, 40), (1, 8, 1024, 1024, 80), (1, 8, 256, 256, 160), (1, 8, 64, 64, 160)),
    *((1, 8, 4096, 77, 40), (1, 8, 1024, 77, 80), (1, 8, 256, 77, 160), (16, 4, 256, 256, 12), (16, 4, 256, 32, 12)),
)
_TRUTH_KEYS = 2**22  # logits of which float64 is computed


def seconds(attend: Callable[..., Tensor], inputs: list[Tensor]) -> float:
    """Measure one attention."""
    start = perf_counter()
    attend(*inputs)
    return perf_counter() - start


def torchs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend by torch's own kernel."""
    return F.scaled_dot_product_attention(query, key, value)


def kernel_of(inputs: list[Tensor]) -> str:
    """Name the kernel that attends to these."""
    if tiled_attention.takes_painting(*inputs):
        return "tiles"
    takes = (vector_attention.takes_float32, vector_attention.takes_bfloat16)
    return "vectors" if any(one(*inputs) for one in takes) else "torch's"


def error(attended: Tensor, truth: Tensor) -> float:
    """Compute the relative error, root mean square, of the queries that there is a truth of."""
    part = attended[:, :, : truth.shape[2]].double()
    return ((part - truth).norm() / truth.norm()).item()


def main() -> None:
    """Print a line for every shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print_machine(machine())
    for shape in _SHAPES:
        batch, heads, queries, keys, width = shape
        wide = [
            torch.randn(batch, n, heads * width).to(getattr(torch, options.precision)) for n in (queries, keys, keys)
        ]
        inputs = [each.unflatten(-1, (heads, width)).transpose(1, 2) for each in wide]
        query, key, value = inputs
        ways: dict[str, Callable[..., Tensor]] = {"ours": attention, "torch": torchs}
        rounds = [{name: seconds(way, inputs) for name, way in ways.items()} for _ in range(options.rounds + 2)][2:]
        times = {name: [one[name] for one in rounds] for name in ways}
        count = max(1, _TRUTH_KEYS // (batch * heads * keys))
        truth = torchs(query[:, :, :count].double(), key.double(), value.double())
        print(
            f"{' x '.join(map(str, shape)):24} {kernel_of(inputs):8} {1e3 * np.median(times['ours']):8.3f} ms, "
            f"{4 * np.prod(shape) / np.median(times['ours']) / 1e9:5.0f} GFLOP/s, error "
            f"{error(attention(query, key, value), truth):.2g}; torch {1e3 * np.median(times['torch']):8.3f} ms, "
            f"error {error(torchs(*inputs), truth):.2g}; "
            f"ratio {written(ratios(times['ours'], times['torch']))}",
            flush=True,
        )


if __name__ == "__main__":
    main()
