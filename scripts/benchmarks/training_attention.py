"""Attention while training in bfloat16 on a CPU: forward and backward of the kernel, plain products, and torch's own.

    python scripts/benchmarks/training_attention.py --threads 1

The shapes are those of the shipped model's U-Net, batch 64. The three take turns; printed are medians of milliseconds,
and of the ratios of neighbours in a round, which other work on the machine changes least.
"""

import argparse
from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from paired import print_machine
from torch import Tensor

from gobelin.attention import training_attention
from gobelin.bench.machine import machine
from gobelin.kernels.fused_attention import fused_attention

_BATCH, _HEADS = 64, 4
_SHAPES = ((256, 256, 12), (64, 64, 24), (16, 16, 36), (256, 32, 12), (64, 32, 24), (16, 32, 36))


def plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute attention by two products and a softmax between them."""
    return torch.softmax(query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2), dim=-1) @ value


def seconds(attend: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> float:
    """Measure one way there and back, from and to [batch, length, heads · width]."""
    start = perf_counter()
    heads = [each.unflatten(-1, (_HEADS, -1)).transpose(1, 2) for each in inputs]
    attended = attend(*heads).transpose(1, 2).flatten(2)
    torch.autograd.grad(attended, inputs, grad)
    return perf_counter() - start


def main() -> None:
    """Print a line for every shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print_machine(machine())
    if training_attention() != "fused":
        raise SystemExit("there is no kernel here: no compiler, or no AVX512-BF16")
    ways = {"fused": fused_attention, "plain": plain_attention, "torch": F.scaled_dot_product_attention}
    for queries, keys, width in _SHAPES:
        inputs = [torch.randn(_BATCH, n, _HEADS * width).bfloat16().requires_grad_() for n in (queries, keys, keys)]
        grad = torch.randn(_BATCH, queries, _HEADS * width).bfloat16()
        rounds = [{name: seconds(way, inputs, grad) for name, way in ways.items()} for _ in range(options.rounds + 2)]
        times = {name: 1e3 * median(one[name] for one in rounds[2:]) for name in ways}
        faster = {name: median(one[name] / one["fused"] for one in rounds[2:]) for name in ways}
        print(
            f"{queries:4} x {keys:3} x {width:2}  "
            + "  ".join(f"{name} {times[name]:7.2f} ms ({faster[name]:5.2f})" for name in ways),
            flush=True,
        )


if __name__ == "__main__":
    main()
