"""Attention for inference by vectors of AVX-512 or AVX2: ``vector_attention.cpp``, which has the equations.

In float32, and in bfloat16 where the CPU multiplies pairs of it but has no tiles, as AMD's have.
"""

import torch
from jaxtyping import Float32
from torch import Tensor

from gobelin.kernels.hardware import AVX512, FLOAT32_VECTORS, has_instructions
from gobelin.kernels.operands import (
    KeyMask,
    Keys,
    Queries,
    attend_by,
    attention_fits,
    empty_like,
    is_key_mask,
    require_attention_fits,
)
from gobelin.kernels.operators import Kernel

_KERNEL = Kernel("vector_attention.cpp", *FLOAT32_VECTORS)
# Width of a head: with wider ones torch's kernel, of products by MKL, is as fast.
_WIDEST_FLOAT32 = 80 if AVX512.is_here else 64
_FEWEST_FLOAT32 = 64  # queries: with fewer, which leave lanes empty, and calls weigh, it is faster

FloatQueries = Float32[Tensor, "batch heads queries width"]
FloatKeys = Float32[Tensor, "batch heads keys width"]


def takes_float32(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> bool:
    """Tell whether the kernel is to compute attention of these: float32 on a CPU with vectors, no mask but of keys.

    It computes any width and any number of queries, but not always in less time than torch's.
    """
    return (
        attention_fits(query, key, value, torch.float32)
        and query.shape[2] >= _FEWEST_FLOAT32
        and is_key_mask(mask, query, key)
        and VECTOR_LIBRARY is not None
        and query.shape[-1] <= _WIDEST_FLOAT32
    )


def takes_bfloat16(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> bool:
    """Tell whether the kernel is to compute attention of these: bfloat16, a CPU without tiles, no mask but of keys."""
    return _HAS_PAIRS and attention_fits(query, key, value) and is_key_mask(mask, query, key)


@torch.library.custom_op("gobelin::vector_attention", mutates_args=(), device_types="cpu")
def vector_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute attention, softmax(Q Kᵀ / √width) V, with no gradients; ``mask`` is True for a key that may be seen.

    Any strides will do. The result lies in memory as [batch, length, heads, width], so that to join the heads is free.
    Bits do not depend on the number of threads. Where a query may see no key, its result is no number, as in softmax.
    """
    return (
        attend_in_float32(query, key, value, mask)
        if query.dtype == torch.float32
        else attend_in_bfloat16(query, key, value, mask)
    )


@vector_attention.register_fake
def _shape(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    return empty_like(query)


def attend_in_float32(
    query: FloatQueries, key: FloatKeys, value: FloatKeys, mask: KeyMask | None = None
) -> FloatQueries:
    """Do as :func:`vector_attention`, not through PyTorch's operators, whose way takes as long as a small attention."""
    require_attention_fits(query, key, value, torch.float32)
    return attend_by(VECTOR_LIBRARY, "float_attention", query, key, value, mask)


def attend_in_bfloat16(query: Queries, key: Keys, value: Keys, mask: KeyMask | None = None) -> Queries:
    """Do as :func:`attend_in_float32`, of bfloat16; it needs a CPU with AVX512-BF16."""
    require_attention_fits(query, key, value)
    return attend_by(VECTOR_LIBRARY, "bfloat16_attention", query, key, value, mask)


VECTOR_LIBRARY = _KERNEL.library
"""The kernel, or None. A constant, as torch.compile needs it: the import of this file compiles it, in its first use."""

_HAS_PAIRS = (
    VECTOR_LIBRARY is not None and has_instructions("avx512_bf16") and not has_instructions("amx_bf16")
)  # with tiles, torch's kernel is the faster one even where ours does not take them
