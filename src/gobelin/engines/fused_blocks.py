"""Narrow networks, whose blocks run as a few calls of a kernel each, in place of many small operations.

A residual block is two or three fused layers (:mod:`gobelin.kernels.fused_layer`), a transformer nine and two
attentions. Wide networks are faster with packed weights (:mod:`gobelin.engines.packed_weights`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gobelin.attention import attention
from gobelin.engines.forwards import is_replaced, other_forwards
from gobelin.engines.packed_weights import Fingerprint, fingerprint_of, has_hooks, is_wide
from gobelin.kernels.fused_layer import FusedLayer, computes_fused_layers
from gobelin.layers import GEGLU, Attention, FeedForward, ResnetBlock2D, Upsample2D, repeat_rows
from gobelin.operations import Conv2d, GroupNorm, LayerNorm
from gobelin.unet import BasicTransformerBlock, Conditioning, Transformer2DModel

ChannelsFirst = Float[Tensor, "_batch _channels _height _width"]
ChannelsLast = Float[Tensor, "_batch _height _width _channels"]

_PLAIN = {
    *(nn.Linear, Conv2d, GroupNorm, LayerNorm, nn.Dropout, nn.ModuleList),
    *(Attention, FeedForward, GEGLU, BasicTransformerBlock, Transformer2DModel, ResnetBlock2D, Upsample2D),
}
"""Modules that compute what their class says; what is put in the place of one computes in another way."""


@dataclass(frozen=True)
class _FusedBlock:
    """The forward of a block by its fused layers, and what its weights were when they were packed."""

    fingerprints: tuple[Fingerprint, ...]
    forward: Callable[..., Tensor]


class FusedBlocks:
    """The fused blocks of a network, beside its own, which stay as they are.

    Only plain blocks have them: one with an adapter or a hook inside goes on as it is.
    """

    def __init__(self, network: nn.Module):
        self._network = network
        self._fused: dict[nn.Module, _FusedBlock] = {}

    def update(self) -> None:
        """Fuse what is new or has changed, as :meth:`PackedWeights.update` does."""
        found: dict[nn.Module, _FusedBlock] = {}
        inside: set[nn.Module] = set()  # of blocks that are fused: outer ones come first
        for block in self._network.modules():
            fuse = _FUSED.get(type(block))
            if fuse is not None and block not in inside and _is_plain(block):
                inside.update(block.modules())
                fingerprints = tuple(fingerprint_of(parameter) for parameter in block.parameters())
                known = self._fused.get(block)
                if known is None or known.fingerprints != fingerprints:
                    known = _FusedBlock(fingerprints, _where_it_may(block, fuse(block)))
                found[block] = known
        self._fused = found

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Compute with the fused blocks in every call of the network that is made inside."""
        with other_forwards({block: fused.forward for block, fused in self._fused.items()}):
            yield


def fusing_pays(network: nn.Module) -> bool:
    """Tell whether fused blocks make a network faster: a narrow one, on a CPU that computes them in its precision."""
    weight = next(network.parameters())
    return weight.device.type == "cpu" and not is_wide(network) and computes_fused_layers(weight.dtype)


def _is_plain(block: nn.Module) -> bool:
    """Tell whether nothing inside a block computes in another way, or is listened to; the block itself may be."""
    dtype = next(block.parameters()).dtype
    return (
        all(type(module) in _PLAIN and not is_replaced(module) for module in block.modules())
        and not any(has_hooks(module) for module in block.modules() if module is not block)
        and all(one.dtype == dtype and one.device.type == "cpu" for one in block.parameters())
        and all(_fits(layer, dtype) for layer in block.modules())
    )


def _fits(layer: nn.Module, dtype: torch.dtype) -> bool:
    """Tell whether the kernel computes such a layer: of windows those of 1×1 and 3×3, and no word may be cut."""
    in_word = 2 if dtype == torch.bfloat16 else 1
    if isinstance(layer, nn.Conv2d):
        side = layer.kernel_size[0]
        return (
            layer.kernel_size == (side, side)
            and side in (1, 3)
            and layer.padding == (side // 2, side // 2)
            and layer.stride == (layer.stride[0],) * 2
            and (layer.dilation, layer.groups) == ((1, 1), 1)
            and layer.padding_mode == "zeros"
            and layer.in_channels % in_word == 0
        )
    if isinstance(layer, nn.Linear):
        return layer.in_features % in_word == 0
    return not isinstance(layer, nn.GroupNorm | nn.LayerNorm) or (layer.weight is not None and layer.bias is not None)


def _where_it_may(block: nn.Module, fused: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Call the block's own forward where gradients are kept, or another precision comes in."""
    own, dtype = MethodType(type(block).forward, block), next(block.parameters()).dtype

    def forward(hidden: Tensor, *others: Any) -> Tensor:
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or hidden.dtype != dtype:
            return own(hidden, *others)
        return fused(hidden, *others)

    return forward


def _residual_block(block: ResnetBlock2D) -> Callable[..., ChannelsFirst]:
    first = FusedLayer(block.conv1.weight, block.conv1.bias, norm=block.norm1, silu=True)
    second = FusedLayer(block.conv2.weight, block.conv2.bias, norm=block.norm2, silu=True)
    shortcut = block.conv_shortcut and FusedLayer(block.conv_shortcut.weight, block.conv_shortcut.bias)
    embedding = getattr(block, "time_emb_proj", None)  # the VAE's blocks have none
    shift_of = embedding and FusedLayer(embedding.weight, embedding.bias, silu=True)

    def forward(hidden: ChannelsFirst, time: Float[Tensor, "images time_width"] | None = None) -> ChannelsFirst:
        x = _channels_last(hidden)
        shift = None if time is None or shift_of is None else repeat_rows(shift_of.rows(time, slot="shift"), len(x))
        residual = x if shortcut is None else shortcut.map(x, slot="shortcut")
        return _channels_first(second.map(first.map(x, shift=shift, slot="inside"), residual=residual))

    return forward


def _convolution(layer: Conv2d) -> Callable[..., ChannelsFirst]:
    fused = FusedLayer(layer.weight, layer.bias, stride=layer.stride[0])
    return lambda hidden: _channels_first(fused.map(_channels_last(hidden)))


def _upsampling(block: Upsample2D) -> Callable[..., ChannelsFirst]:
    layer = FusedLayer(block.conv.weight, block.conv.bias)

    def forward(hidden: ChannelsFirst, size: tuple[int, int] | None = None) -> ChannelsFirst:
        return _channels_first(layer.map(_channels_last(hidden), size or (2 * hidden.shape[2], 2 * hidden.shape[3])))

    return forward


def _transformer(model: Transformer2DModel) -> Callable[..., ChannelsFirst]:
    to_patches = FusedLayer(model.proj_in.weight, model.proj_in.bias, norm=model.norm)
    blocks = [_transformer_block(block) for block in model.transformer_blocks]
    to_map = FusedLayer(model.proj_out.weight, model.proj_out.bias)

    def forward(feature_map: ChannelsFirst, conditioning: Conditioning) -> ChannelsFirst:
        if conditioning.merge_tokens:
            return Transformer2DModel.forward(model, feature_map, conditioning)
        x = _channels_last(feature_map)
        patches = to_patches.map(x, slot="patches").flatten(1, 2)
        for block in blocks:
            patches = block(patches, conditioning)
        maps = patches.view(len(patches), *x.shape[1:])
        return _channels_first(to_map.map(maps, residual=repeat_rows(x, len(maps))))

    return forward


def _transformer_block(block: Any) -> Callable[[Tensor, Conditioning], Tensor]:
    """Fuse a :class:`BasicTransformerBlock`."""
    attn1, attn2 = block.attn1, block.attn2
    self_projections = FusedLayer(
        torch.cat([attn1.to_q.weight, attn1.to_k.weight, attn1.to_v.weight]), norm=block.norm1
    )
    query_of = FusedLayer(attn2.to_q.weight, norm=block.norm2)
    text_projections = FusedLayer(torch.cat([attn2.to_k.weight, attn2.to_v.weight]))
    self_out, cross_out = (FusedLayer(one.to_out[0].weight, one.to_out[0].bias) for one in (attn1, attn2))
    inner, outer = block.ff.net[0].proj, block.ff.net[2]
    gated = FusedLayer(inner.weight, inner.bias, norm=block.norm3, geglu=True)
    feed_out = FusedLayer(outer.weight, outer.bias)

    def forward(patches: Tensor, conditioning: Conditioning) -> Tensor:
        # A residual is written over: every number of it is read before.
        query, key, value = self_projections.rows(patches, slot="projections").chunk(3, dim=-1)
        attended = _attend(attn1, query, key, value, None, conditioning)
        patches = self_out.rows(attended, residual=repeat_rows(patches, len(attended)), slot="patches")
        patches = repeat_rows(patches, len(conditioning.text_embeddings))
        query = query_of.rows(patches, slot="projections")
        key, value = text_projections.rows(conditioning.text_embeddings, slot="text").chunk(2, dim=-1)
        mask = None if conditioning.text_mask is None else conditioning.text_mask[:, None, None, :]
        attended = _attend(attn2, query, key, value, mask, conditioning)
        patches = cross_out.rows(attended, residual=patches, slot="patches")
        return feed_out.rows(gated.rows(patches, slot="projections"), residual=patches, slot="patches")

    return forward


def _attend(
    layer: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, conditioning: Conditioning
) -> Tensor:
    """Attend by heads, as :meth:`Attention.forward` does."""
    query, key, value = (one.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for one in (query, key, value))
    probe = conditioning.probe
    attend = attention if probe is None or layer.site is None else partial(probe.attend, layer.site, key_of=layer.to_k)
    return attend(query, key, value, mask).transpose(1, 2).flatten(2)


def _channels_last(feature_map: ChannelsFirst) -> ChannelsLast:
    return feature_map.permute(0, 2, 3, 1)


def _channels_first(feature_map: ChannelsLast) -> ChannelsFirst:
    return feature_map.permute(0, 3, 1, 2)


_FUSED: dict[type[nn.Module], Callable[[Any], Callable[..., Tensor]]] = {
    ResnetBlock2D: _residual_block,
    Transformer2DModel: _transformer,
    Upsample2D: _upsampling,
    Conv2d: _convolution,
}
