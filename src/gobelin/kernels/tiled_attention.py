"""Attention for inference in bfloat16 by the matrix tiles of AMX: ``tiled_attention.cpp``, which has the equations."""

import ctypes

import torch
from torch import Tensor

from gobelin.kernels.hardware import AMX
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

_KERNEL = Kernel("tiled_attention.cpp", AMX)
_WIDEST = 256  # of a head: with wider ones, as a VAE has, sums leave the first cache, and torch's kernel is faster


def takes_painting(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> bool:
    """Tell whether the kernel computes attention of these: bfloat16 on a CPU with tiles, and a mask of keys alone."""
    return (
        attention_fits(query, key, value)
        and query.shape[-1] <= _WIDEST
        and is_key_mask(mask, query, key)
        and LIBRARY is not None
    )


@torch.library.custom_op("gobelin::tiled_attention", mutates_args=(), device_types="cpu")
def tiled_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute attention, softmax(Q Kᵀ / √width) V, with no gradients; ``mask`` is True for a key that may be seen.

    Any strides will do. The result lies in memory as [batch, length, heads, width], so that to join the heads is free.
    Bits do not depend on the number of threads. Where a query may see no key, its result is no number, as in softmax.
    """
    return attend(query, key, value, mask)


@tiled_attention.register_fake
def _shape(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    return empty_like(query)


def attend(query: Queries, key: Keys, value: Keys, mask: KeyMask | None = None) -> Queries:
    """Do as :func:`tiled_attention` without the way through PyTorch's operators, which takes as long as a small one."""
    require_attention_fits(query, key, value)
    return attend_by(LIBRARY, "tiled_attention", query, key, value, mask)


def _load() -> ctypes.CDLL | None:
    """Load the kernel where the CPU has tiles, and Linux gives the process their use."""
    library = _KERNEL.library
    return library if library is not None and library.has_tiles() else None


LIBRARY = _load()
"""The kernel, or None. A constant, as torch.compile needs it: the import of this file compiles it, in its first use."""
