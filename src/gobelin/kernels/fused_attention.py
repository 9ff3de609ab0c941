"""Fused attention for training in bfloat16 on a CPU: ``fused_attention.cpp``, there and back, as operators of torch.

The C++ has the equations. Operators, unlike a function that calls them, are known to autograd, torch.compile,
checkpointing and autocast.
"""

import ctypes
import sys
from functools import cache
from pathlib import Path

import torch
from jaxtyping import BFloat16, Float32
from torch import Tensor

from gobelin.kernels.compiled import load_library

_SOURCE = Path(__file__).with_name("fused_attention.cpp")
_INCLUDES = (Path(__file__).with_name("lanes.hpp"),)

QueryRows = BFloat16[Tensor, "batch heads queries width"]
KeyRows = BFloat16[Tensor, "batch heads keys width"]
LogSumExp = Float32[Tensor, "batch heads queries"]


class _Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "heads", "queries", "keys", "width")]


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        *((f"{name}_stride", ctypes.c_int64) for name in ("batch", "head", "row")),
    ]


class _ForwardProblem(ctypes.Structure):
    _fields_ = [
        ("sizes", _Sizes),
        *((name, _Tensor) for name in ("query", "key", "value", "out", "remainder")),
        ("log_sum_exp", ctypes.c_void_p),
    ]


class _BackwardProblem(ctypes.Structure):
    _fields_ = [
        ("sizes", _Sizes),
        *(
            (name, _Tensor)
            for name in ("query", "key", "value", "out", "remainder", "grad", "dquery", "dkey", "dvalue")
        ),
        ("log_sum_exp", ctypes.c_void_p),
    ]


@torch.compiler.assume_constant_result
def is_available() -> bool:
    """Tell whether there is a kernel, which is compiled by the first call: some 2 s, once for a user and a version."""
    return _library() is not None


def takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Tell whether the kernel computes attention of these: bfloat16 on a CPU, nothing to broadcast, nothing empty."""
    return _fit(query, key, value) and is_available()


def fused_attention(query: QueryRows, key: KeyRows, value: KeyRows) -> QueryRows:
    """Compute attention, softmax(Q Kᵀ / √width) V, and its gradients when asked; not its second derivatives.

    Any strides will do. The result and the gradients lie in memory as [batch, length, heads, width], so that to join
    the heads is free. Bits do not depend on the number of threads.
    """
    return _forward(query, key, value)[0]


@torch.library.custom_op(
    "gobelin::fused_attention",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor query, Tensor key, Tensor value) -> (Tensor, Tensor, Tensor)",
)
def _forward(query: QueryRows, key: KeyRows, value: KeyRows) -> tuple[QueryRows, QueryRows, LogSumExp]:
    """Compute attention, and for the way back what rounding took from it, and the log-sum-exp of every query."""
    _require_fit(query, key, value)
    out, remainder, log_sum_exp = _forward_shapes(query, key, value)
    query, key, value = (_with_rows(each) for each in (query, key, value))
    tensors = (_described(each) for each in (query, key, value, out, remainder))
    _run("attention_forward", _ForwardProblem(_sizes(query, key), *tensors, log_sum_exp.data_ptr()))
    return out, remainder, log_sum_exp


@torch.library.custom_op(
    "gobelin::fused_attention_backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor remainder, Tensor log_sum_exp)"
    " -> (Tensor, Tensor, Tensor)",
)
def _backward(
    grad: QueryRows,
    query: QueryRows,
    key: KeyRows,
    value: KeyRows,
    out: QueryRows,
    remainder: QueryRows,
    log_sum_exp: LogSumExp,
) -> tuple[QueryRows, KeyRows, KeyRows]:
    """Compute the gradients of a scalar with respect to query, key and value from the one with respect to ``out``."""
    _require_fit(query, key, value)
    for each in (grad, out, remainder):
        _require_fit(each, query, query)
    grads = _backward_shapes(grad, query, key, value, out, remainder, log_sum_exp)
    inputs = [_with_rows(each) for each in (query, key, value, out, remainder, grad)]
    log_sum_exp = log_sum_exp.contiguous()
    tensors = (_described(each) for each in (*inputs, *grads))
    _run("attention_backward", _BackwardProblem(_sizes(query, key), *tensors, log_sum_exp.data_ptr()))
    return grads


@_forward.register_fake
def _forward_shapes(query: QueryRows, key: KeyRows, value: KeyRows) -> tuple[QueryRows, QueryRows, LogSumExp]:
    return _empty_like(query), _empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


@_backward.register_fake
def _backward_shapes(
    grad: QueryRows, query: QueryRows, key: KeyRows, value: KeyRows, *_: Tensor
) -> tuple[QueryRows, KeyRows, KeyRows]:
    return _empty_like(query), _empty_like(key), _empty_like(value)


def _save(ctx, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs, *output)


def _gradients(ctx, grad: Tensor, *_: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(grad, *ctx.saved_tensors)


_forward.register_autograd(_gradients, setup_context=_save)


def _fit(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return (
        all(each.dtype == torch.bfloat16 and each.device.type == "cpu" for each in (query, key, value))
        and all(each.ndim == 4 and each.numel() > 0 for each in (query, key, value))
        and key.shape == value.shape
        and (query.shape[:2], query.shape[3]) == (key.shape[:2], key.shape[3])
    )


def _require_fit(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise ValueError for what the kernel would read wrongly: beyond the end of a tensor is other memory."""
    if not _fit(query, key, value):
        said = ", ".join(f"{each.dtype} {[*each.shape]}" for each in (query, key, value))
        raise ValueError(f"query, key and value are {said}: give bfloat16 on a CPU, whose shapes fit")


def _empty_like(tensor: Tensor) -> Tensor:
    """Make room for [batch, heads, length, width] that lies in memory as [batch, length, heads, width]."""
    batch, heads, length, width = tensor.shape
    return tensor.new_empty((batch, length, heads, width)).transpose(1, 2)


def _with_rows(tensor: Tensor) -> Tensor:
    """Copy a tensor unless its rows are contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _described(tensor: Tensor) -> _Tensor:
    return _Tensor(tensor.data_ptr(), *tensor.stride()[:3])


def _sizes(query: Tensor, key: Tensor) -> _Sizes:
    batch, heads, queries, width = query.shape
    return _Sizes(batch, heads, queries, key.shape[2], width)


def _run(function: str, problem: ctypes.Structure) -> None:
    """Call a function of the library; raises MemoryError where there is not enough."""
    library = _library()
    assert library is not None
    if getattr(library, function)(ctypes.byref(problem), torch.get_num_threads(), _openmp()):
        raise MemoryError("there is no memory for attention")


@cache
def _library() -> ctypes.CDLL | None:
    """Load the kernel where the CPU has its instructions, Linux keeps its users apart, and torch has threads for it."""
    has_instructions = getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
    if sys.platform != "linux" or not has_instructions or _openmp() is None:
        return None
    return load_library(_SOURCE, _INCLUDES)


@cache
def _openmp() -> ctypes.c_void_p | None:
    """Find the entry of the OpenMP that torch itself uses: a second one would compete with it for the cores."""
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(torch_cpu.GOMP_parallel, ctypes.c_void_p)
    except (OSError, AttributeError):
        return None
