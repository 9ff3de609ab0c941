"""Operands of kernels: tensors as structures of C, and the threads that PyTorch itself uses."""

import ctypes
from functools import cache
from pathlib import Path

import torch
from jaxtyping import BFloat16, Bool
from torch import Tensor

Queries = BFloat16[Tensor, "batch heads queries width"]
KeyMask = Bool[Tensor, "batch #heads #queries keys"]
Keys = BFloat16[Tensor, "batch heads keys width"]


class Sizes(ctypes.Structure):
    """The sizes of an attention, as ``operands.hpp`` has them."""

    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "heads", "queries", "keys", "width")]


class TensorView(ctypes.Structure):
    """A tensor [batch, heads, length, width] whose rows are contiguous, as ``operands.hpp`` has it."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        *((f"{name}_stride", ctypes.c_int64) for name in ("batch", "head", "row")),
    ]


class AttentionProblem(ctypes.Structure):
    """An attention without gradients, as ``operands.hpp`` has it; ``mask`` [batch, keys] is 0 for a hidden key."""

    _fields_ = [
        ("sizes", Sizes),
        *((name, TensorView) for name in ("query", "key", "value", "out")),
        ("mask", ctypes.c_void_p),
    ]


def view(tensor: Tensor) -> TensorView:
    """Describe a tensor whose rows are contiguous."""
    return TensorView(tensor.data_ptr(), *tensor.stride()[:3])


def sizes_of(query: Tensor, key: Tensor) -> Sizes:
    """Describe the sizes of an attention."""
    batch, heads, queries, width = query.shape
    return Sizes(batch, heads, queries, key.shape[2], width)


def empty_like(tensor: Tensor) -> Tensor:
    """Make room for [batch, heads, length, width] that lies in memory as [batch, length, heads, width]."""
    batch, heads, length, width = tensor.shape
    return tensor.new_empty((batch, length, heads, width)).transpose(1, 2)


def with_rows(tensor: Tensor) -> Tensor:
    """Copy a tensor unless its rows are contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def attention_fits(query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Tell whether a kernel for ``dtype`` may read these: on a CPU, nothing to broadcast, nothing empty."""
    return (
        all(each.dtype == dtype and each.device.type == "cpu" for each in (query, key, value))
        and all(each.ndim == 4 and each.numel() > 0 for each in (query, key, value))
        and key.shape == value.shape
        and (query.shape[:2], query.shape[3]) == (key.shape[:2], key.shape[3])
    )


def require_attention_fits(query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype = torch.bfloat16) -> None:
    """Raise ValueError for what a kernel would read wrongly: beyond the end of a tensor is other memory."""
    if not attention_fits(query, key, value, dtype):
        said = ", ".join(f"{each.dtype} {[*each.shape]}" for each in (query, key, value))
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"query, key and value are {said}: give {name} on a CPU, whose shapes fit")


def is_key_mask(mask: Tensor | None, query: Tensor, key: Tensor) -> bool:
    """Tell whether a mask hides keys from all queries of a sample alike, or nothing where there is none."""
    return mask is None or mask.shape == (len(query), 1, 1, key.shape[2])


def attend_by(
    library: ctypes.CDLL | None, function: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> Tensor:
    """Call a kernel that attends without gradients; operands fit, and may have any strides."""
    assert library is not None
    query, key, value = (with_rows(each) for each in (query, key, value))
    out = empty_like(query)
    if mask is not None:
        mask = mask.reshape(len(query), key.shape[2]).contiguous()
    views = (view(each) for each in (query, key, value, out))
    call(library, function, AttentionProblem(sizes_of(query, key), *views, None if mask is None else mask.data_ptr()))
    return out


def call(library: ctypes.CDLL, function: str, problem: ctypes.Structure) -> None:
    """Call a kernel with as many threads as PyTorch uses; raises MemoryError where there is not enough."""
    if getattr(library, function)(ctypes.byref(problem), torch.get_num_threads(), openmp()):
        raise MemoryError(f"there is no memory for {function}")


@cache
def openmp() -> ctypes.c_void_p | None:
    """Find the entry of the OpenMP that torch itself uses: a second one would compete with it for the cores."""
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(torch_cpu.GOMP_parallel, ctypes.c_void_p)
    except (OSError, AttributeError):
        return None
