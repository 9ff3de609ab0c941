"""Adapters that are trained: LoRA, LoHa and LoKr beside the frozen layers of a U-Net or text encoder.

LoRA: Hu et al. 2021 (arXiv 2106.09685). LoHa and LoKr, and how all three begin, as in LyCORIS (Yeh et al. 2023, arXiv
2309.14859; ``lycoris/modules/{locon,loha,lokr}.py``), without Tucker's core.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gobelin.adapters.adapter_settings import AdapterConfig, Targets
from gobelin.errors import UsageError
from gobelin.formats.weight_deltas import LohaDelta, LokrDelta, LoraDelta, WeightDelta
from gobelin.operations import Conv2d

# Parts of layers' names, in U-Net and text encoder. "all" is what kohya's sd-scripts adapt with a ``conv_dim``
# (``networks/lora.py``: Transformer2DModel, ResnetBlock2D, Downsample2D, Upsample2D), the time embedding's projections
# in the residual blocks among them; LyCORIS' preset "full" has conv_in, conv_out and time_embedding besides.
_ATTENTION = r"\.attn[12]\.to_([qkv]|out\.0)$|\.self_attn\.(q|k|v|out)_proj$"
_TRANSFORMER = rf"{_ATTENTION}|_blocks?(\.\d+)?\.attentions\.\d+\.|\.mlp\.fc[12]$"
_TARGETS: dict[Targets, re.Pattern[str]] = {
    "attention": re.compile(_ATTENTION),
    "transformer": re.compile(_TRANSFORMER),
    "all": re.compile(rf"{_TRANSFORMER}|_blocks?(\.\d+)?\.(resnets|downsamplers|upsamplers)\.\d+\."),
}

Operation = Callable[[Tensor, Tensor], Tensor]
"""A layer's operation on hidden states with a weight in the place of its own, and without a bias."""


class LayerAdapter(nn.Module, ABC):
    """The trainable change of one layer, in float32; it is zero at the start."""

    def __init__(self, config: AdapterConfig, shape: tuple[int, ...]):
        super().__init__()
        self.config = config
        self.layer_shape = shape

    @abstractmethod
    def delta(self) -> WeightDelta:
        """Return the change of the layer's weight, of the parameters themselves."""

    def forward(self, hidden: Tensor, operation: Operation) -> Tensor:
        """Apply the layer's ``operation`` with ΔW."""
        with torch.autocast(hidden.device.type, enabled=False):  # products of small numbers, rounded once and not twice
            # computed again in the backward pass: its parts are each as large as the layer's own weight
            weight = checkpoint(self._weight, use_reentrant=False, preserve_rng_state=False)
        return operation(_cast(hidden, weight), weight)

    def _weight(self) -> Tensor:
        """Compute ΔW in the shape of the layer's weight."""
        return self.delta().delta_weight().reshape(self.layer_shape)


class LoraAdapter(LayerAdapter):
    """LoRA: ``down`` to the rank by the layer's own kernel, and ``up`` from it, on the activations."""

    def __init__(self, config: AdapterConfig, shape: tuple[int, ...], generator: torch.Generator | None):
        super().__init__(config, shape)
        out_width, in_width, *kernel = shape
        self.down = _uniform((config.rank, in_width, *kernel), generator)
        self.up = _zeros((out_width, config.rank, *(1 for _ in kernel)))

    def delta(self) -> LoraDelta:
        return LoraDelta(down=self.down, up=self.up, scale=self.config.scale)

    def forward(self, hidden: Tensor, operation: Operation) -> Tensor:
        """Compute up(down(hidden)), never ΔW: it takes rank · (in + out) products where ΔW takes in · out."""
        up = F.linear if self.up.ndim == 2 else F.conv2d
        return up(self.config.scale * operation(_cast(hidden, self.down), self.down), self.up)


class LohaAdapter(LayerAdapter):
    """LoHa: two products of the same rank, of which one begins at zero; a kernel is flattened."""

    def __init__(self, config: AdapterConfig, shape: tuple[int, ...], generator: torch.Generator | None):
        super().__init__(config, shape)
        out_width, in_width = shape[0], math.prod(shape[1:])
        self.w1_a = _normal((out_width, config.rank), 0.1, generator)
        self.w1_b = _normal((config.rank, in_width), 1.0, generator)
        self.w2_a = _zeros((out_width, config.rank))
        self.w2_b = _normal((config.rank, in_width), 1.0, generator)

    def delta(self) -> LohaDelta:
        return LohaDelta(w1=(self.w1_a, self.w1_b), w2=(self.w2_a, self.w2_b), scale=self.config.scale)


class LokrAdapter(LayerAdapter):
    """LoKr: a small matrix ``w1``, and a large one ``w2``, which is whole or a product of the rank."""

    def __init__(self, config: AdapterConfig, shape: tuple[int, ...], generator: torch.Generator | None):
        super().__init__(config, shape)
        (rows, more_rows), (columns, more_columns) = (kronecker_sizes(width, config.factor) for width in shape[:2])
        self.w1 = _uniform((rows, columns), generator)
        if config.rank >= max(more_rows, more_columns) / 2:
            self.w2 = nn.ParameterList([_zeros((more_rows, more_columns, *shape[2:]))])
        else:
            flat = more_columns * math.prod(shape[2:])
            factors = _uniform((more_rows, config.rank), generator), _zeros((config.rank, flat))
            self.w2 = nn.ParameterList(factors)

    def delta(self) -> LokrDelta:
        scale = 1.0 if len(self.w2) == 1 else self.config.scale
        return LokrDelta(w1=(self.w1,), w2=tuple(self.w2), scale=scale)


_ADAPTERS = {"lora": LoraAdapter, "loha": LohaAdapter, "lokr": LokrAdapter}


class AdaptedLinear(nn.Linear):
    """A linear layer with an adapter beside it; ``weight`` and ``bias`` are the base layer's own parameters."""

    def __init__(self, base: nn.Linear, adapter: LayerAdapter):
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias, self.training = base.weight, base.bias, base.training
        self.adapter = adapter

    def forward(self, hidden: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        output = super().forward(hidden)
        return output + self.adapter(hidden, F.linear).to(output.dtype)

    def base(self) -> nn.Linear:
        """Return the layer without its adapter, with the same parameters."""
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        layer.weight, layer.bias, layer.training = self.weight, self.bias, self.training
        return layer


class AdaptedConv2d(Conv2d):
    """A convolution with an adapter beside it; ``weight`` and ``bias`` are the base layer's own parameters."""

    def __init__(self, base: nn.Conv2d, adapter: LayerAdapter):
        super().__init__(**_conv_options(base))
        self.weight, self.bias, self.training = base.weight, base.bias, base.training
        self.adapter = adapter
        self._base_class = type(base)

    def forward(self, hidden: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        output = super().forward(hidden)
        return output + self.adapter(hidden, partial(self._conv_forward, bias=None)).to(output.dtype)

    def base(self) -> nn.Conv2d:
        """Return the layer without its adapter, with the same parameters."""
        layer = self._base_class(**_conv_options(self))
        layer.weight, layer.bias, layer.training = self.weight, self.bias, self.training
        return layer


def add_adapters_(network: nn.Module, config: AdapterConfig, generator: torch.Generator | None = None) -> None:
    """Freeze a network and put adapters beside its target layers, in place; its output is the same until they learn.

    Keys of the base's parameters stay; the adapter's come under ``adapter.`` of each layer, drawn from ``generator``,
    a CPU's, layer by layer. Raises :class:`UsageError` for a network that has adapters or none of the layers.
    """
    if any(_adapted_layers(network)):
        raise UsageError("this network has adapters already: remove them first, with remove_adapters_")
    layers = [
        (name, layer)
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and _TARGETS[config.targets].search(name)
    ]
    if not layers:
        raise UsageError(f"this {type(network).__name__} has no layers of the targets {config.targets!r}")
    network.requires_grad_(False)
    for name, layer in layers:
        adapter = _ADAPTERS[config.kind](config, tuple(layer.weight.shape), generator).to(layer.weight.device)
        adapted = AdaptedLinear(layer, adapter) if isinstance(layer, nn.Linear) else AdaptedConv2d(layer, adapter)
        network.set_submodule(name, adapted)


def remove_adapters_(network: nn.Module) -> None:
    """Take the adapters out again, in place: the layers are of their old classes with the same parameters, frozen."""
    for name, layer in list(_adapted_layers(network)):
        network.set_submodule(name, layer.base())


def adapter_parameters(network: nn.Module) -> list[nn.Parameter]:
    """List the parameters of a network's adapters, which alone are to be trained."""
    return [parameter for _, layer in _adapted_layers(network) for parameter in layer.adapter.parameters()]


def adapter_deltas(network: nn.Module) -> dict[str, WeightDelta]:
    """Return the change of each adapted layer, of the parameters themselves, by the layer's name."""
    return {name: layer.adapter.delta() for name, layer in _adapted_layers(network)}


def adapter_config(network: nn.Module) -> AdapterConfig:
    """Return the configuration of a network's adapters; raises :class:`UsageError` where it has none."""
    for _, layer in _adapted_layers(network):
        return layer.adapter.config
    raise UsageError(f"this {type(network).__name__} has no adapters: add them first, with add_adapters_")


def kronecker_sizes(width: int, factor: int | None) -> tuple[int, int]:
    """Split a width into two factors, the smaller first (LyCORIS, ``factorization`` in ``functional/general.py``).

    Where ``factor`` divides the width it is one of them; otherwise the smaller is the width's largest divisor up to
    ``factor`` and the square root, and without a factor up to the square root.
    """
    if factor is not None and width % factor == 0:
        return min(factor, width // factor), max(factor, width // factor)
    highest = math.isqrt(width) if factor is None else min(factor, math.isqrt(width))
    small = next(divisor for divisor in range(highest, 0, -1) if width % divisor == 0)
    return small, width // small


def _adapted_layers(network: nn.Module) -> Iterator[tuple[str, AdaptedLinear | AdaptedConv2d]]:
    for name, layer in network.named_modules():
        if isinstance(layer, AdaptedLinear | AdaptedConv2d):
            yield name, layer


def _conv_options(layer: nn.Conv2d) -> dict:
    """Return the options that make a convolution like this one, on the meta device."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {"bias": layer.bias is not None, "device": "meta", **{name: getattr(layer, name) for name in names}}


def _cast(hidden: Tensor, weight: Tensor) -> Tensor:
    """Cast hidden states to the precision of an adapter's weight, unless autocast is to choose one for both."""
    return hidden if torch.is_autocast_enabled(hidden.device.type) else hidden.to(weight.dtype)


def _zeros(shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


def _normal(shape: tuple[int, ...], std: float, generator: torch.Generator | None) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape).normal_(std=std, generator=generator))


def _uniform(shape: tuple[int, ...], generator: torch.Generator | None) -> nn.Parameter:
    """Draw from ± 1/√(fan-in), as PyTorch's layers begin (Kaiming's uniform with a = √5)."""
    weight = torch.empty(shape)
    return nn.Parameter(nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator))
