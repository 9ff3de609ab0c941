"""Group norm with SiLU, and layer norm, for training in bfloat16 on a CPU: ``norms.cpp`` as operators of torch.

Weights and statistics are float32. No result depends on the number of threads.
"""

import ctypes

import torch
from jaxtyping import Float
from torch import Tensor

from gobelin.kernels.hardware import AVX512_BF16
from gobelin.kernels.operators import Kernel, constant

_KERNEL = Kernel("norms.cpp", AVX512_BF16)
_ROWS_AT_ONCE = 64  # as in norms.cpp
_POINTERS = ("x", "grad", "weight", "bias", "out", "mean", "inverse", "dweight", "dbias", "piece_sums")


class _Problem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("pieces", "positions", "channels", "groups")),
        ("eps", ctypes.c_float),
        ("has_silu", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    ]


def takes_norm(x: Tensor, weight: Tensor) -> bool:
    """Tell whether the kernel computes norms of these: bfloat16 and float32 on a CPU, nothing empty."""
    return _fit(x, weight) and has_norms()


def fused_group_norm(
    x: Float[Tensor, "batch channels height width"],
    weight: Float[Tensor, " channels"],
    bias: Float[Tensor, " channels"],
    groups: int,
    eps: float,
    silu: bool,
) -> Float[Tensor, "batch channels height width"]:
    """Compute a group norm, with SiLU after it where asked for; it lies in memory channels last, as its gradient."""
    return _group_norm(x, weight, bias, groups, eps, silu)[0]


def fused_layer_norm(
    x: Float[Tensor, "*rows channels"],
    weight: Float[Tensor, " channels"],
    bias: Float[Tensor, " channels"],
    eps: float,
) -> Float[Tensor, "*rows channels"]:
    """Compute a layer norm over the last dimension."""
    return _layer_norm(x, weight, bias, eps)[0]


@constant
def has_norms() -> bool:
    """Tell whether there is a kernel, which is compiled by the first call: some 2 s, once for a user and a version."""
    return _KERNEL.library is not None


# ---- Group norm ----


@torch.library.custom_op(
    "gobelin::group_norm",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool silu) -> (Tensor, Tensor, Tensor)",
)
def _group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute a group norm, and for the way back the means and the inverses of the standard deviations."""
    _require_fit(x, weight, bias, channels=x.shape[1])
    if x.ndim != 4 or groups < 1 or x.shape[1] % groups:
        raise ValueError(f"the input {[*x.shape]} does not divide into {groups} groups of channels")
    out, mean, inverse = made = _group_norm_shapes(x, weight, bias, groups, eps, silu)
    x, weight, bias = x.contiguous(memory_format=torch.channels_last), weight.contiguous(), bias.contiguous()
    sizes = (len(x), x[0, 0].numel(), x.shape[1], groups, eps, silu)
    _run("group_norm_forward", sizes, x=x, weight=weight, bias=bias, out=out, mean=mean, inverse=inverse)
    return made


@_group_norm.register_fake
def _group_norm_shapes(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.empty_like(x, memory_format=torch.channels_last)
    return out, weight.new_empty(len(x), groups), weight.new_empty(len(x), groups)


@torch.library.custom_op(
    "gobelin::group_norm_backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor inverse, float eps, bool silu)"
    " -> (Tensor, Tensor, Tensor)",
)
def _group_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients with respect to input, weight and bias."""
    _require_fit(x, weight, bias, channels=x.shape[1])
    made = _group_norm_backward_shapes(grad, x, weight, bias, mean, inverse, eps, silu)
    grad, x = (each.contiguous(memory_format=torch.channels_last) for each in (grad, x))
    sizes = (len(x), x[0, 0].numel(), x.shape[1], mean.shape[1], eps, silu)
    _run_backward("group_norm_backward", sizes, grad, x, weight, bias, mean, inverse, made)
    return made


@_group_norm_backward.register_fake
def _group_norm_backward_shapes(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    return dx, torch.empty_like(weight), torch.empty_like(bias)


def _save_group_norm(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _, ctx.eps, ctx.silu = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, weight, bias, *output[1:])


def _group_norm_gradients(ctx, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_group_norm_backward(grad, *ctx.saved_tensors, ctx.eps, ctx.silu), None, None, None


_group_norm.register_autograd(_group_norm_gradients, setup_context=_save_group_norm)


# ---- Layer norm ----


@torch.library.custom_op(
    "gobelin::layer_norm",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)",
)
def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute a layer norm, and for the way back the means and the inverses of the standard deviations."""
    _require_fit(x, weight, bias, channels=x.shape[-1])
    out, mean, inverse = made = _layer_norm_shapes(x, weight, bias, eps)
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    sizes = _layer_norm_sizes(x, eps)
    _run("layer_norm_forward", sizes, x=x, weight=weight, bias=bias, out=out, mean=mean, inverse=inverse)
    return made


@_layer_norm.register_fake
def _layer_norm_shapes(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return out, weight.new_empty(x.shape[:-1]), weight.new_empty(x.shape[:-1])


@torch.library.custom_op(
    "gobelin::layer_norm_backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor inverse)"
    " -> (Tensor, Tensor, Tensor)",
)
def _layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients with respect to input, weight and bias."""
    _require_fit(x, weight, bias, channels=x.shape[-1])
    made = _layer_norm_backward_shapes(grad, x, weight, bias, mean, inverse)
    grad, x = grad.contiguous(), x.contiguous()
    _run_backward("layer_norm_backward", _layer_norm_sizes(x, 0.0), grad, x, weight, bias, mean, inverse, made)
    return made


@_layer_norm_backward.register_fake
def _layer_norm_backward_shapes(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, torch.empty_like(weight), torch.empty_like(bias)


def _save_layer_norm(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:3], *output[1:])


def _layer_norm_gradients(ctx, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_layer_norm_backward(grad, *ctx.saved_tensors), None


_layer_norm.register_autograd(_layer_norm_gradients, setup_context=_save_layer_norm)


def _layer_norm_sizes(x: Tensor, eps: float) -> tuple[int, int, int, int, float, bool]:
    rows, channels = x.numel() // x.shape[-1], x.shape[-1]
    return -(-rows // _ROWS_AT_ONCE), rows, channels, 1, eps, False


# ---- Both ----


def _fit(x: Tensor, weight: Tensor) -> bool:
    return (
        (x.dtype, weight.dtype) == (torch.bfloat16, torch.float32)
        and x.device.type == weight.device.type == "cpu"
        and x.numel() > 0
    )


def _require_fit(x: Tensor, *vectors: Tensor, channels: int) -> None:
    """Raise ValueError for what the kernel would read wrongly: beyond the end of a tensor is other memory."""
    if not all(_fit(x, each) and each.shape == (channels,) for each in vectors):
        said = ", ".join(f"{each.dtype} {[*each.shape]}" for each in (x, *vectors))
        raise ValueError(f"the norm's input and weights are {said}: give bfloat16 and float32 on a CPU, that fit")


def _run_backward(
    function: str,
    sizes: tuple,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    inverse: Tensor,
    made: tuple[Tensor, Tensor, Tensor],
) -> None:
    out, dweight, dbias = made
    _run(
        function,
        sizes,
        x=x,
        grad=grad,
        weight=weight.contiguous(),
        bias=bias.contiguous(),
        out=out,
        mean=mean.contiguous(),
        inverse=inverse.contiguous(),
        dweight=dweight,
        dbias=dbias,
        piece_sums=weight.new_empty(sizes[0], 2, len(weight)),
    )


def _run(function: str, sizes: tuple, **tensors: Tensor) -> None:
    _KERNEL.run(function, _Problem(*sizes, **{name: each.data_ptr() for name, each in tensors.items()}))
