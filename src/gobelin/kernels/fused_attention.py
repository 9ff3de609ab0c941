"""Fused attention for training in bfloat16 on a CPU: ``fused_attention.cpp``, there and back, as operators of torch.

The C++ has the equations. Operators, unlike a function that calls them, are known to autograd, torch.compile,
checkpointing and autocast.
"""

import ctypes

import torch
from jaxtyping import Float32
from torch import Tensor

from gobelin.kernels.hardware import AVX512_BF16
from gobelin.kernels.operands import (
    Keys,
    Queries,
    Sizes,
    TensorView,
    attention_fits,
    empty_like,
    require_attention_fits,
    sizes_of,
    view,
    with_rows,
)
from gobelin.kernels.operators import Kernel, constant

_KERNEL = Kernel("fused_attention.cpp", AVX512_BF16)

LogSumExp = Float32[Tensor, "batch heads queries"]


class _ForwardProblem(ctypes.Structure):
    _fields_ = [
        ("sizes", Sizes),
        *((name, TensorView) for name in ("query", "key", "value", "out", "remainder")),
        ("log_sum_exp", ctypes.c_void_p),
    ]


class _BackwardProblem(ctypes.Structure):
    _fields_ = [
        ("sizes", Sizes),
        *(
            (name, TensorView)
            for name in ("query", "key", "value", "out", "remainder", "grad", "dquery", "dkey", "dvalue")
        ),
        ("log_sum_exp", ctypes.c_void_p),
    ]


@constant
def is_available() -> bool:
    """Tell whether there is a kernel, which is compiled by the first call: some 2 s, once for a user and a version."""
    return _KERNEL.library is not None


def takes_training(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Tell whether the kernel computes attention of these: bfloat16 on a CPU, nothing to broadcast, nothing empty."""
    return attention_fits(query, key, value) and is_available()


def fused_attention(query: Queries, key: Keys, value: Keys) -> Queries:
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
def _forward(query: Queries, key: Keys, value: Keys) -> tuple[Queries, Queries, LogSumExp]:
    """Compute attention, and for the way back what rounding took from it, and the log-sum-exp of every query."""
    require_attention_fits(query, key, value)
    out, remainder, log_sum_exp = _forward_shapes(query, key, value)
    query, key, value = (with_rows(each) for each in (query, key, value))
    tensors = (view(each) for each in (query, key, value, out, remainder))
    _KERNEL.run("attention_forward", _ForwardProblem(sizes_of(query, key), *tensors, log_sum_exp.data_ptr()))
    return out, remainder, log_sum_exp


@torch.library.custom_op(
    "gobelin::fused_attention_backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor remainder, Tensor log_sum_exp)"
    " -> (Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Queries,
    query: Queries,
    key: Keys,
    value: Keys,
    out: Queries,
    remainder: Queries,
    log_sum_exp: LogSumExp,
) -> tuple[Queries, Keys, Keys]:
    """Compute the gradients of a scalar with respect to query, key and value from the one with respect to ``out``."""
    require_attention_fits(query, key, value)
    for each in (grad, out, remainder):
        require_attention_fits(each, query, query)
    grads = _backward_shapes(grad, query, key, value, out, remainder, log_sum_exp)
    inputs = [with_rows(each) for each in (query, key, value, out, remainder, grad)]
    log_sum_exp = log_sum_exp.contiguous()
    tensors = (view(each) for each in (*inputs, *grads))
    _KERNEL.run("attention_backward", _BackwardProblem(sizes_of(query, key), *tensors, log_sum_exp.data_ptr()))
    return grads


@_forward.register_fake
def _forward_shapes(query: Queries, key: Keys, value: Keys) -> tuple[Queries, Queries, LogSumExp]:
    return empty_like(query), empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


@_backward.register_fake
def _backward_shapes(grad: Queries, query: Queries, key: Keys, value: Keys, *_: Tensor) -> tuple[Queries, Keys, Keys]:
    return empty_like(query), empty_like(key), empty_like(value)


def _save(ctx, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs, *output)


def _gradients(ctx, grad: Tensor, *_: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(grad, *ctx.saved_tensors)


_forward.register_autograd(_gradients, setup_context=_save)
