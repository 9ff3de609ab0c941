"""Shape trace: the shapes of queries, keys, values and outputs at every attn1 and attn2 of a U-Net, for an image size.

No weights are needed: the network is built, and run, on the meta device, where tensors have shapes only.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gobelin.layers import Attention
from gobelin.unet import UNet
from gobelin.unet_config import UNetConfig

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class SiteShapes:
    """Shapes at one attention of the U-Net.

    ``name`` is its state-dict prefix; ``kind`` is "self" (attn1) or "cross" (attn2). ``query``,
    ``key`` and ``value`` are [B, heads, length, width of a head]; ``probs`` is softmax(QKᵀ/√width),
    [B, heads, patches, keys]; ``output`` is [B, patches, channels].
    """

    name: str
    kind: str
    grid: tuple[int, int]
    query: Shape
    key: Shape
    value: Shape
    probs: Shape
    output: Shape


def trace_shapes(config: UNetConfig, height: int, width: int, length: int = 77) -> list[SiteShapes]:
    """Trace the sites in the order in which latents of ``height`` × ``width`` pass through them.

    ``length`` is L, the number of tokens.
    """
    with torch.device("meta"):
        unet = UNet(config)
        latents = torch.empty(1, config.in_channels, height, width)
        text_embeddings = torch.empty(1, length, config.cross_attention_dim)
        timesteps = torch.zeros(1)
    sites: list[SiteShapes] = []

    def leave(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(module, Attention)
        assert module.site is not None
        hidden, *context = inputs
        keys = (context[0] if context else hidden).shape[1]
        head = module.to_q.out_features // module.heads
        sites.append(
            SiteShapes(
                name=module.site.name,
                kind=module.site.kind,
                grid=module.site.grid(height, width),
                query=(1, module.heads, hidden.shape[1], head),
                key=(1, module.heads, keys, head),
                value=(1, module.heads, keys, head),
                probs=(1, module.heads, hidden.shape[1], keys),
                output=tuple(output.shape),
            )
        )

    for module in unet.modules():
        if isinstance(module, Attention):
            module.register_forward_hook(leave)
    unet(latents, timesteps, text_embeddings)
    return sites
