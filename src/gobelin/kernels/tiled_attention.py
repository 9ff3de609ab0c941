"""Attention for inference in bfloat16 by the matrix tiles of AMX: ``tiled_attention.cpp``, which has the equations."""

import ctypes
import sys
from pathlib import Path

import torch
from jaxtyping import Bool
from torch import Tensor

from gobelin.kernels.compiled import load_library
from gobelin.kernels.hardware import has_instructions
from gobelin.kernels.operands import (
    Keys,
    Queries,
    Sizes,
    TensorView,
    attention_fits,
    call,
    empty_like,
    openmp,
    require_attention_fits,
    sizes_of,
    view,
    with_rows,
)

_SOURCE = Path(__file__).with_name("tiled_attention.cpp")
_INCLUDES = tuple(Path(__file__).with_name(name) for name in ("lanes.hpp", "operands.hpp"))
_FLAGS = ("-mamx-tile", "-mamx-bf16")
_WIDEST = 256  # of a head: with wider ones, as a VAE has, sums leave the first cache, and torch's kernel is faster

KeyMask = Bool[Tensor, "batch #heads #queries keys"]


class _Problem(ctypes.Structure):
    _fields_ = [
        ("sizes", Sizes),
        *((name, TensorView) for name in ("query", "key", "value", "out")),
        ("mask", ctypes.c_void_p),
    ]


def takes_painting(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> bool:
    """Tell whether the kernel computes attention of these: bfloat16 on a CPU with tiles, and a mask of keys alone."""
    return (
        attention_fits(query, key, value)
        and query.shape[-1] <= _WIDEST
        and (mask is None or mask.shape == (len(query), 1, 1, key.shape[2]))
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
    query, key, value = (with_rows(each) for each in (query, key, value))
    out = empty_like(query)
    if mask is not None:
        mask = mask.reshape(len(query), key.shape[2]).contiguous()
    views = (view(each) for each in (query, key, value, out))
    assert LIBRARY is not None
    call(LIBRARY, "tiled_attention", _Problem(sizes_of(query, key), *views, None if mask is None else mask.data_ptr()))
    return out


def _load() -> ctypes.CDLL | None:
    """Load the kernel where the CPU has tiles, Linux gives the process their use, and torch has threads for it."""
    if sys.platform != "linux" or not has_instructions("amx_bf16") or openmp() is None:
        return None
    library = load_library(_SOURCE, _INCLUDES, _FLAGS)
    return None if library is None or library.request_tiles() else library


LIBRARY = _load()
"""The kernel, or None. A constant, as torch.compile needs it: the import of this file compiles it, in its first use."""
