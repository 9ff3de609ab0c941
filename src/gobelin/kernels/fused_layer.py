"""A layer of a narrow network with what stands around it, in one call: ``fused_layer.cpp``, which has the equation."""

import ctypes
import math
import threading
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gobelin.kernels.hardware import FLOAT32_VECTORS, has_instructions
from gobelin.kernels.operators import Kernel

_KERNEL = Kernel("fused_layer.cpp", *FLOAT32_VECTORS)


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("in_channels", "out_channels", "side", "stride", "groups")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("has_silu", "is_gated")),
        *((name, ctypes.c_void_p) for name in ("norm_weight", "norm_bias", "weight", "bias")),
    ]


class _Call(ctypes.Structure):
    _fields_ = [
        ("layer", ctypes.POINTER(_Layer)),
        *((name, ctypes.c_int64) for name in ("batch", "height", "width", "grown_height", "grown_width")),
        *((name, ctypes.c_void_p) for name in ("x", "shift", "residual", "out")),
    ]


def computes_fused_layers(dtype: torch.dtype) -> bool:
    """Tell whether the kernel computes in this precision here, by AVX-512 or AVX2, in bfloat16 by AVX512-BF16."""
    if dtype == torch.bfloat16 and not has_instructions("avx512_bf16"):
        return False
    return dtype in (torch.float32, torch.bfloat16) and _KERNEL.library is not None


class FusedLayer:
    """A linear layer or a convolution, with a norm and SiLU before it and GEGLU behind it where asked for.

    ``weight`` is [out, in], or [out, in, side, side] of a window of 1×1 or 3×3 that keeps the size or, with a
    ``stride``, divides it. It is packed as it is now: in float32 or bfloat16, in which maps come and go.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        norm: nn.GroupNorm | nn.LayerNorm | None = None,
        silu: bool = False,
        geglu: bool = False,
        stride: int = 1,
    ):
        weight = weight.detach()
        self._dtype = weight.dtype
        self._stride = stride
        self._function: Literal["float_layer", "bfloat16_layer"] = (
            "float_layer" if weight.dtype == torch.float32 else "bfloat16_layer"
        )
        out_channels, in_channels = weight.shape[:2]
        self.out_channels = out_channels // 2 if geglu else out_channels
        # Tensors whose memory the structure points into.
        self._tensors = (
            *((None, None) if norm is None else (_in_vectors(norm.weight), _in_vectors(norm.bias))),
            *_packed(weight, weight.new_zeros(out_channels) if bias is None else bias.detach(), geglu),
        )
        self._layer = _Layer(
            in_channels,
            self.out_channels,
            weight.shape[2] if weight.ndim == 4 else 1,
            stride,
            -1 if norm is None else norm.num_groups if isinstance(norm, nn.GroupNorm) else 0,
            0 if norm is None else norm.eps,
            silu,
            geglu,
            *(None if tensor is None else tensor.data_ptr() for tensor in self._tensors),
        )
        self._pointer = ctypes.pointer(self._layer)

    def map(
        self,
        x: Float[Tensor, "batch height width in_channels"],
        size: tuple[int, int] | None = None,
        shift: Float[Tensor, "batch channels"] | None = None,
        residual: Float[Tensor, "batch new_height new_width channels"] | None = None,
        slot: str | None = None,
    ) -> Float[Tensor, "batch new_height new_width channels"]:
        """Compute a feature map of one, enlarged to ``size`` before; ``shift`` and ``residual`` are added to it.

        With a ``slot`` the result lies in memory that stays (:class:`Slots`), until the slot is used again.
        """
        batch, height, width, _ = x.shape
        grown_height, grown_width = size or (height, width)
        new_height, new_width = (grown_height - 1) // self._stride + 1, (grown_width - 1) // self._stride + 1
        out = _SLOTS.take(slot, x, (batch, new_height, new_width, self.out_channels))
        self._run((batch, height, width, grown_height, grown_width), x, shift, residual, out)
        return out

    def rows(
        self,
        x: Float[Tensor, "*rows in_channels"],
        residual: Float[Tensor, "*rows channels"] | None = None,
        slot: str | None = None,
    ) -> Float[Tensor, "*rows channels"]:
        """Compute rows, each by itself, without a group norm; ``residual`` is added to them, and may be the slot's."""
        out = _SLOTS.take(slot, x, (*x.shape[:-1], self.out_channels))
        self._run((x.numel() // x.shape[-1], 1, 1, 1, 1), x, None, residual, out)
        return out

    def _run(
        self, sizes: tuple[int, ...], x: Tensor, shift: Tensor | None, residual: Tensor | None, out: Tensor
    ) -> None:
        if x.dtype != self._dtype or x.shape[-1] != self._layer.in_channels:
            raise ValueError(
                f"the layer has {self._layer.in_channels} channels of {self._dtype}: {x.dtype} {[*x.shape]}"
            )
        given = [None if one is None else one.to(self._dtype).contiguous() for one in (x, shift, residual)]
        pointers = [None if one is None else one.data_ptr() for one in given]
        _KERNEL.run(self._function, _Call(self._pointer, *sizes, *pointers, out.data_ptr()))


class Slots(threading.local):
    """Memory by name for results that do not outlive a block, of each thread by itself.

    New memory would have new pages, which take longer than what is written into them.
    """

    def __init__(self) -> None:
        self._rows: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, slot: str | None, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Take a slot's memory as a tensor of that shape, of a precision like another's; for None, new memory."""
        if slot is None:
            return like.new_empty(shape)
        count = math.prod(shape)
        row = self._rows.get((slot, like.dtype))
        if row is None or len(row) < count:
            row = self._rows[slot, like.dtype] = like.new_empty(count)
        return row[:count].view(shape)


_SLOTS = Slots()


def _in_vectors(numbers: Tensor) -> Tensor:
    """Take a norm's numbers in float32, with room for whole vectors."""
    return F.pad(numbers.detach().float(), (0, -len(numbers) % _KERNEL.constant("lanes")))


def _packed(weight: Tensor, bias: Tensor, gated: bool) -> tuple[Tensor, Tensor]:
    """Lay out weights and bias as the kernel reads them; with a gate, vectors of hidden numbers and of gates alternate.

    Weights lie by blocks of up to ``widest`` vectors of channels, in a block by pixel of the window and by word of it.
    """
    halves = 2 if gated else 1
    # [halves, channels of whole vectors, side², in]
    rows = (
        weight.reshape(halves, -1, *weight.shape[1:]).flatten(3).movedim(2, -1)
        if weight.ndim == 4
        else weight.reshape(halves, -1, 1, weight.shape[1])
    )
    lanes = _KERNEL.constant("lanes")
    room = -rows.shape[1] % lanes
    rows = F.pad(rows, (0, 0, 0, 0, 0, room)).unflatten(1, (-1, lanes)).transpose(0, 1).flatten(0, 1)
    in_vectors = F.pad(bias.float().reshape(halves, -1), (0, room)).unflatten(1, (-1, lanes)).transpose(0, 1)
    in_word = 2 if weight.dtype == torch.bfloat16 else 1
    # [vectors, lanes, side², words, in a word] to blocks of [side², words, vectors, lanes, in a word]
    blocks = [
        block.unflatten(3, (-1, in_word)).permute(2, 3, 0, 1, 4).flatten()
        for block in rows.split(2 if gated else _KERNEL.constant("widest"))
    ]
    return torch.cat(blocks), in_vectors.flatten().contiguous()
