"""GEGLU for training in bfloat16 on a CPU: ``geglu.cpp`` as an operator of torch."""

import ctypes

import torch
from jaxtyping import Float
from torch import Tensor

from gobelin.kernels.hardware import AVX512_BF16
from gobelin.kernels.operators import Kernel, constant

_KERNEL = Kernel("geglu.cpp", AVX512_BF16)


class _Problem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "width")),
        *((name, ctypes.c_void_p) for name in ("both", "grad", "out")),
    ]


def takes_geglu(both: Tensor) -> bool:
    """Tell whether the kernel computes GEGLU of this: bfloat16 on a CPU, in two halves, not empty."""
    return _fits(both) and has_geglu()


def fused_geglu(both: Float[Tensor, "*rows twice_width"]) -> Float[Tensor, "*rows width"]:
    """Multiply the first half of every row by the GELU of the second."""
    return _geglu(both)


@constant
def has_geglu() -> bool:
    """Tell whether there is a kernel, which is compiled by the first call: some 2 s, once for a user and a version."""
    return _KERNEL.library is not None


@torch.library.custom_op("gobelin::geglu", mutates_args=(), device_types="cpu", schema="(Tensor both) -> Tensor")
def _geglu(both: Tensor) -> Tensor:
    """Compute GEGLU."""
    _require_fit(both)
    out, both = _geglu_shape(both), both.contiguous()
    _KERNEL.run("geglu_forward", _Problem(*_sizes(both), both.data_ptr(), None, out.data_ptr()))
    return out


@_geglu.register_fake
def _geglu_shape(both: Tensor) -> Tensor:
    return both.new_empty(*both.shape[:-1], both.shape[-1] // 2)


@torch.library.custom_op(
    "gobelin::geglu_backward", mutates_args=(), device_types="cpu", schema="(Tensor grad, Tensor both) -> Tensor"
)
def _geglu_backward(grad: Tensor, both: Tensor) -> Tensor:
    """Compute the gradient with respect to both halves."""
    _require_fit(both)
    out, grad, both = _geglu_backward_shape(grad, both), grad.contiguous(), both.contiguous()
    _KERNEL.run("geglu_backward", _Problem(*_sizes(both), both.data_ptr(), grad.data_ptr(), out.data_ptr()))
    return out


@_geglu_backward.register_fake
def _geglu_backward_shape(grad: Tensor, both: Tensor) -> Tensor:
    return torch.empty_like(both, memory_format=torch.contiguous_format)


def _save(ctx, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx, grad: Tensor) -> Tensor:
    return _geglu_backward(grad, *ctx.saved_tensors)


_geglu.register_autograd(_gradient, setup_context=_save)


def _sizes(both: Tensor) -> tuple[int, int]:
    return both.numel() // both.shape[-1], both.shape[-1] // 2


def _fits(both: Tensor) -> bool:
    return both.dtype == torch.bfloat16 and both.device.type == "cpu" and both.numel() > 0 and both.shape[-1] % 2 == 0


def _require_fit(both: Tensor) -> None:
    """Raise ValueError for what the kernel would read wrongly: beyond the end of a tensor is other memory."""
    if not _fits(both):
        raise ValueError(f"the halves are {both.dtype} {[*both.shape]}: give bfloat16 on a CPU, of an even width")
