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
