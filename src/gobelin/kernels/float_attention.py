"""Attention for inference in float32 by the vectors of AVX-512: ``float_attention.cpp``, which has the equations."""

import torch
from jaxtyping import Float32
from torch import Tensor

from gobelin.kernels.operands import (
    KeyMask,
    attend_by,
    attention_fits,
    empty_like,
    is_key_mask,
    require_attention_fits,
)
from gobelin.kernels.operators import Kernel

_KERNEL = Kernel(
    "float_attention.cpp",
    "lanes.hpp",
    "operands.hpp",
    "threads.hpp",
    instructions=("avx512_f", "avx512_bw", "avx512_cd", "avx512_dq", "avx512_vl"),  # x86-64-v4
)
_WIDEST = 80  # of a head: with wider ones torch's kernel, of products by MKL, is as fast
_FEWEST = 64  # queries: with fewer, which leave lanes empty, and calls weigh, it is faster

FloatQueries = Float32[Tensor, "batch heads queries width"]
FloatKeys = Float32[Tensor, "batch heads keys width"]


def takes_float32(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> bool:
    """Tell whether the kernel is to compute attention of these: float32 on a CPU with AVX-512, no mask but of keys.

    It computes any width and any number of queries, but not always in less time than torch's.
    """
    return (
        attention_fits(query, key, value, torch.float32)
        and query.shape[-1] <= _WIDEST
        and query.shape[2] >= _FEWEST
        and is_key_mask(mask, query, key)
        and FLOAT_LIBRARY is not None
    )


@torch.library.custom_op("gobelin::float_attention", mutates_args=(), device_types="cpu")
def float_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute attention, softmax(Q Kᵀ / √width) V, with no gradients; ``mask`` is True for a key that may be seen.

    Any strides will do. The result lies in memory as [batch, length, heads, width], so that to join the heads is free.
    Bits do not depend on the number of threads. Where a query may see no key, its result is no number, as in softmax.
    """
    return attend_in_float32(query, key, value, mask)


@float_attention.register_fake
def _shape(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    return empty_like(query)


def attend_in_float32(
    query: FloatQueries, key: FloatKeys, value: FloatKeys, mask: KeyMask | None = None
) -> FloatQueries:
    """Do as :func:`float_attention` without the way through PyTorch's operators, which takes as long as a small one."""
    require_attention_fits(query, key, value, torch.float32)
    return attend_by(FLOAT_LIBRARY, "float_attention", query, key, value, mask)


FLOAT_LIBRARY = _KERNEL.library
"""The kernel, or None. A constant, as torch.compile needs it: the import of this file compiles it, in its first use."""
