"""Convolutions for training in bfloat16 on a CPU with AMX: ``convolution.cpp`` as an operator of torch.

Weights are float32, and rounded on their way into a product; their gradients are sums in float32.
"""

import ctypes
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from gobelin.kernels.hardware import AMX
from gobelin.kernels.operators import Kernel, constant

_KERNEL = Kernel("convolution.cpp", AMX)
_SIZES = ("batch", "height", "width", "inputs", "outputs")
_POINTERS = ("x", "grad", "weight", "bias", "out", "dweight", "dbias")


class _Problem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    ]


@constant
def has_convolution() -> bool:
    """Tell whether there is a kernel, which is compiled by the first call: some 3 s, once for a user and a version."""
    return _has_tiles()


@cache
def _has_tiles() -> bool:
    """Ask Linux for AMX's tiles, where there is AMX; without them the kernel would end the process."""
    return _KERNEL.library is not None and bool(_KERNEL.library.has_tiles())


def takes_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Tell whether the kernel computes a convolution of these, stride 1, as large as its input."""
    return _fit(x, weight, bias) and has_convolution()


def fused_convolution(
    x: Float[Tensor, "batch inputs height width"],
    weight: Float[Tensor, "outputs inputs 3 3"],
    bias: Float[Tensor, " outputs"] | None,
) -> Float[Tensor, "batch outputs height width"]:
    """Convolve, with zeros beyond the edges; the result and its gradient lie in memory channels last."""
    return _convolution(x, weight, bias)


@torch.library.custom_op(
    "gobelin::convolution",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
)
def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve."""
    _require_fit(x, weight, bias)
    out = _convolution_shape(x, weight, bias)
    x, weight = x.contiguous(memory_format=torch.channels_last), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    _run("convolution_forward", x, weight, x=x, weight=weight, bias=bias, out=out)
    return out


@_convolution.register_fake
def _convolution_shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    shape = (len(x), len(weight), *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.custom_op(
    "gobelin::convolution_backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor grad, Tensor x, Tensor weight, bool[] wanted) -> (Tensor, Tensor, Tensor)",
)
def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients with respect to input, weight and bias; those not wanted are empty."""
    _require_fit(x, weight, None)
    dx, dweight, dbias = made = _convolution_backward_shapes(grad, x, weight, wanted)
    grad, x = (each.contiguous(memory_format=torch.channels_last) for each in (grad, x))
    if wanted[0]:
        _run("convolution_backward_input", x, weight, grad=grad, weight=weight.contiguous(), out=dx)
    if wanted[1] or wanted[2]:
        _run("convolution_backward_weight", x, weight, grad=grad, x=x, dweight=dweight, dbias=dbias)
    return made


@_convolution_backward.register_fake
def _convolution_backward_shapes(
    grad: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.channels_last) if wanted[0] else x.new_empty(0)
    if not (wanted[1] or wanted[2]):
        return dx, weight.new_empty(0), weight.new_empty(0)
    return dx, torch.empty_like(weight, memory_format=torch.contiguous_format), weight.new_empty(len(weight))


def _save(ctx, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _gradients(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad)
    grads = _convolution_backward(grad, *ctx.saved_tensors, wanted)
    return tuple(each if is_wanted else None for each, is_wanted in zip(grads, wanted, strict=True))


_convolution.register_autograd(_gradients, setup_context=_save)


def _fit(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        x.dtype == torch.bfloat16
        and x.ndim == weight.ndim == 4
        and weight.shape[1] == x.shape[1]
        and weight.shape[2:] == (3, 3)
        and (bias is None or bias.shape == weight.shape[:1])
        and all(each is None or each.dtype == torch.float32 for each in (weight, bias))
        and all(each is None or (each.device.type == "cpu" and each.numel() > 0) for each in (x, weight, bias))
    )


def _require_fit(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError for what the kernel would read wrongly: beyond the end of a tensor is other memory."""
    if not has_convolution():
        raise ValueError("there is no kernel for convolutions here: no compiler, or no AMX")
    if not _fit(x, weight, bias):
        said = ", ".join(f"{each.dtype} {[*each.shape]}" for each in (x, weight, bias) if each is not None)
        raise ValueError(f"input, weight and bias are {said}: give bfloat16 and float32 on a CPU, that fit")


def _run(function: str, like: Tensor, kernels: Tensor, **tensors: Tensor | None) -> None:
    batch, inputs, height, width = like.shape
    sizes = (batch, height, width, inputs, len(kernels))
    _KERNEL.run(
        function, _Problem(*sizes, **{name: each.data_ptr() for name, each in tensors.items() if each is not None})
    )
