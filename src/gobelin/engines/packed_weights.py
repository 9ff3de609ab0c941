"""Weights packed ahead of time: in the blocks in which oneDNN multiplies them, instead of anew at every call.

The matrix products and convolutions of oneDNN read weights in an order of their own, into which PyTorch puts them at
every call. The operators here, those by which ``torch.compile`` computes with frozen weights, take them in that order.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import TypeGuard

import torch
from torch import Tensor, nn

from gobelin.engines.forwards import is_replaced, other_forwards
from gobelin.engines.packed_convolution import PackedConvolution
from gobelin.engines.phase_convolutions import pack_upsampling
from gobelin.engines.watched_weights import sum_of_bits
from gobelin.kernels.hardware import has_bfloat16, has_instructions
from gobelin.layers import Upsample2D
from gobelin.operations import Conv2d

_WIDE = (
    128  # channels of the narrowest feature map: Stable Diffusion's U-Net has 320, its VAE 128, the shipped model 48
)

Fingerprint = tuple[int, int, torch.dtype, int]
PackableLayer = nn.Linear | nn.Conv2d
LayerForward = Callable[[Tensor], Tensor]
PackLayer = Callable[[str, PackableLayer], LayerForward]
"""``pack(name, layer)`` puts the weight of a layer in order, and returns what computes with it, without gradients."""


@dataclass(frozen=True)
class _PackedLayer:
    """The forward of a layer by its packed weight, and what the weight was when it was packed."""

    fingerprint: Fingerprint
    forward: Callable[..., Tensor]


class PackedWeights:
    """The packed weights of a network's linear layers and convolutions, beside its own, which stay as they are.

    They take as much memory again, and are left out where there is not that much and as much to spare. Only plain
    layers have them: what computes in another way, as an adapter does, goes on doing so. ``pack`` packs one of
    them, by default as it is.
    """

    def __init__(self, network: nn.Module, pack: PackLayer | None = None):
        self._network = network
        self._pack = pack or pack_as_it_is
        self._packed: dict[nn.Module, _PackedLayer] = {}

    def __bool__(self) -> bool:
        """Tell whether any layer's weight is packed."""
        return bool(self._packed)

    def update(self) -> None:
        """Pack what is new or has changed: a LoRA was loaded, a weight was written to, or has another precision.

        Weights are read once, as fast as memory is, so that even a write through ``weight.data`` is found, of which
        PyTorch keeps no count.
        """
        if not self._packed and not has_room_for(self._network):
            return
        found: dict[nn.Module, _PackedLayer] = {}
        for name, layer in self._network.named_modules():
            if (weight := _packable_weight(layer)) is not None:
                fingerprint = fingerprint_of(weight)
                known = self._packed.get(layer)
                if known is None or known.fingerprint != fingerprint:
                    known = _PackedLayer(fingerprint, self._forward_of(name, layer))
                found[layer] = known
        self._packed = found

    def _forward_of(self, name: str, layer: nn.Module) -> Callable[..., Tensor]:
        if isinstance(layer, Upsample2D):
            return _doubling(layer, pack_upsampling(layer))
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        return _gated(layer, self._pack(name, layer))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Compute with the packed weights in every call of the network that is made inside."""
        with other_forwards({layer: packed.forward for layer, packed in self._packed.items()}):
            yield


def pays(network: nn.Module) -> bool:
    """Tell whether packed weights make a network faster, on this CPU and in its precision, if it is wide.

    Narrow networks lose more by the blocks' padding than they gain.
    """
    weight = next(network.parameters())
    return (
        weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and _pays_in(weight.dtype)
        and is_wide(network)
    )


def is_wide(network: nn.Module) -> bool:
    """Tell whether the narrowest feature map of a network has so many channels that its time is that of products."""
    return (
        min((len(layer.weight) for layer in network.modules() if isinstance(layer, nn.GroupNorm)), default=0) >= _WIDE
    )


def _pays_in(dtype: torch.dtype) -> bool:
    """Tell whether this CPU multiplies packed weights faster."""
    if dtype == torch.float32:
        return has_instructions("avx2")
    return dtype == torch.bfloat16 and has_bfloat16(torch.device("cpu"))


def has_room_for(network: nn.Module) -> bool:
    """Tell whether the machine has memory for a network's weights once more, and for as much beside; Linux says it."""
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return True
    return 2 * sum(parameter.nbytes for parameter in network.parameters()) <= available


def _can_pack(layer: nn.Module) -> TypeGuard[PackableLayer]:
    plain = type(layer) is nn.Linear or (
        type(layer) in (nn.Conv2d, Conv2d) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    )
    return plain and layer.weight.dtype in (torch.bfloat16, torch.float32) and layer.weight.device.type == "cpu"


def _packable_weight(layer: nn.Module) -> Tensor | None:
    """Find the weight of what can be packed: a plain layer, or an upsampling whose layer is, and is not listened to."""
    if type(layer) is Upsample2D:
        conv = layer.conv
        return conv.weight if _can_pack(conv) and not has_hooks(conv) and not is_replaced(conv) else None
    return layer.weight if _can_pack(layer) else None


def has_hooks(module: nn.Module) -> bool:
    """Tell whether somebody listens to a module's calls."""
    everywhere = torch.nn.modules.module._has_any_global_hook()
    return bool(everywhere or module._forward_hooks or module._forward_pre_hooks)


def fingerprint_of(weight: Tensor) -> Fingerprint:
    """Describe a weight: where it is, how often it was written to, its precision, and the sum of its bits."""
    return weight.data_ptr(), weight._version, weight.dtype, sum_of_bits(weight)


def _is_linear(layer: nn.Conv2d) -> bool:
    """Tell whether a convolution is a linear layer of every pixel.

    On CPUs without AMX, oneDNN packs such convolutions in another order than that in which it then computes, and
    reorders their weights at every call: 3 of the 7 seconds of a pass of Stable Diffusion 1.5's U-Net.
    """
    return (layer.kernel_size, layer.stride, layer.padding, layer.groups) == ((1, 1), (1, 1), (0, 0), 1)


def pack_as_it_is(name: str, layer: PackableLayer) -> LayerForward:
    """Pack a layer's weight in its own precision: numbers are the layer's, up to the order of sums."""
    return _linear(layer) if isinstance(layer, nn.Linear) or _is_linear(layer) else _convolution(layer)


def _gated(layer: PackableLayer, compute: LayerForward) -> LayerForward:
    """Compute with the layer's own forward where gradients are wanted, and what is in another precision."""
    own, dtype = MethodType(type(layer).forward, layer), layer.weight.dtype

    def forward(hidden: Tensor) -> Tensor:
        return own(hidden) if torch.is_grad_enabled() or hidden.dtype != dtype else compute(hidden)

    return forward


def _doubling(block: Upsample2D, compute: LayerForward) -> Callable[..., Tensor]:
    """Compute where a map is to be twice as large, by the block's own forward otherwise, and as :func:`_gated` does."""
    own, dtype = MethodType(type(block).forward, block), block.conv.weight.dtype

    def forward(hidden: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        doubled = 2 * hidden.shape[-2], 2 * hidden.shape[-1]
        if torch.is_grad_enabled() or hidden.dtype != dtype or size not in (None, doubled):
            return own(hidden, size)
        return compute(hidden)

    return forward


def _linear(layer: PackableLayer) -> LayerForward:
    """Pack a linear layer, or a convolution that is one of every pixel."""
    packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().flatten(1).contiguous(), None)

    def multiply(hidden: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(hidden, packed, layer.bias, "none", [], "")

    if isinstance(layer, nn.Linear):
        return multiply
    # Pixels of a map that is channels last are rows in memory.
    return lambda hidden: multiply(hidden.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _convolution(layer: nn.Conv2d) -> LayerForward:
    assert not isinstance(layer.padding, str)
    sizes = layer.padding, layer.stride, layer.dilation, layer.groups
    convolve = PackedConvolution(lambda: layer.weight.detach(), *sizes)
    return lambda hidden: convolve(hidden, layer.bias)
