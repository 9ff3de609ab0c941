"""Activations as whole numbers of 8 bits: ``quantize.cpp``, which has the equations, or torch's operations."""

import ctypes
from typing import NamedTuple

import torch
from jaxtyping import BFloat16, UInt8
from torch import Tensor

from gobelin.kernels.hardware import AVX512_BF16
from gobelin.kernels.operators import Kernel, constant

_KERNEL = Kernel("quantize.cpp", AVX512_BF16)
_AT_ONCE = 1 << 15  # as in quantize.cpp


class _Problem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("samples", "count")),
        *((name, ctypes.c_void_p) for name in ("numbers", "out", "scales", "zero_points", "extremes")),
    ]


class QuantizedSamples(NamedTuple):
    """Whole numbers q, and what they stand for in each sample: (q - zero point) · scale."""

    values: UInt8[Tensor, "batch ..."]
    scales: list[float]
    zero_points: list[int]


@constant
def has_quantize() -> bool:
    """Tell whether there is a kernel, which is compiled by the first call: some 2 s, once for a user and a version."""
    return _KERNEL.library is not None


def quantize_samples(numbers: BFloat16[Tensor, "batch ..."]) -> QuantizedSamples:
    """Round numbers to whole ones of 8 bits, relative to each sample's own lowest and highest, and zero.

    Zero is exact. A sample's numbers do not depend on those of another, and bits not on the number of threads.
    """
    numbers = numbers.contiguous()
    if numbers.dtype != torch.bfloat16 or numbers.device.type != "cpu" or not numbers.numel() or not has_quantize():
        return by_torch(numbers)
    samples, count = len(numbers), numbers[0].numel()
    out = torch.empty_like(numbers, dtype=torch.uint8)
    scales, extremes = numbers.new_empty(samples, dtype=torch.float32), samples * -(-count // _AT_ONCE) * 2
    zero_points = numbers.new_empty(samples, dtype=torch.int32)
    room = numbers.new_empty(extremes, dtype=torch.float32)
    pointers = (each.data_ptr() for each in (numbers, out, scales, zero_points, room))
    _KERNEL.run("quantize", _Problem(samples, count, *pointers))
    return QuantizedSamples(out, scales.tolist(), zero_points.tolist())


def by_torch(numbers: Tensor) -> QuantizedSamples:
    """Do as :func:`quantize_samples` by torch's own operations, which take longer."""
    flat = numbers.flatten(1).float()
    lowest, highest = flat.amin(1).clamp(max=0), flat.amax(1).clamp(min=0)
    scales = (highest - lowest) / 255
    scales = torch.where(scales == 0, 1, scales)
    zero_points = torch.nan_to_num((-lowest / scales).round(), 0, 0, 0)
    values = torch.nan_to_num((flat / scales[:, None]).round() + zero_points[:, None]).clamp(0, 255).to(torch.uint8)
    return QuantizedSamples(values.view(numbers.shape), scales.tolist(), zero_points.int().tolist())
