"""The building blocks that the U-Net, the VAE and the image encoder share.

Class names and state-dict keys are those that Stable Diffusion 1.5 prints in diffusers, so its weights load
with no renaming. Feature maps are [B, C, H, W], sequences [B, length, width].
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Num
from torch import Tensor, nn

from gobelin.attention import AttentionSite, Probe, attention
from gobelin.operations import Conv2d, GroupNorm, geglu


def repeat_rows(tensor: Float[Tensor, "_ ..."], count: int) -> Float[Tensor, "_ ..."]:
    """Repeat the rows of a batch, in their order, up to a ``count``; as many stay the same tensor."""
    rows = tensor.shape[0]  # which may stay free in an exported graph, as len(tensor) may not
    return tensor if rows == count else torch.cat([tensor] * (count // rows))


class Timesteps(nn.Module):
    """Sinusoidal embedding of timesteps, cosines first (Ho et al. 2020, section 4; "Attention is all you need")."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, timesteps: Num[Tensor, " batch"]) -> Float[Tensor, "batch width"]:
        half = self.width // 2
        exponent = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
        angles = timesteps[:, None].float() * torch.exp(-math.log(10_000) * exponent)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """The timestep's embedding: two linear layers over its sinusoids; every residual block adds a projection of it."""

    def __init__(self, in_width: int, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, sinusoids: Float[Tensor, "batch in_width"]) -> Float[Tensor, "batch width"]:
        return self.linear_2(F.silu(self.linear_1(sinusoids)))


class ResnetBlock2D(nn.Module):
    """Residual block: two 3×3 convolutions, with the timestep's embedding added between them where there is one."""

    def __init__(self, in_channels: int, out_channels: int, *, groups: int, eps: float, time_width: int | None = None):
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        if time_width is not None:
            self.time_emb_proj = nn.Linear(time_width, out_channels)
        self.norm2 = GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(
        self,
        hidden: Float[Tensor, "batch in_channels height width"],
        time: Float[Tensor, "images time_width"] | None = None,
    ) -> Float[Tensor, "batch out_channels height width"]:
        residual = hidden if self.conv_shortcut is None else self.conv_shortcut(hidden)
        hidden = self.conv1(self.norm1(hidden, silu=True))
        if time is not None:
            hidden = hidden + repeat_rows(self.time_emb_proj(F.silu(time)), hidden.shape[0])[:, :, None, None]
        return residual + self.conv2(self.norm2(hidden, silu=True))


class Downsample2D(nn.Module):
    """Strided 3×3 convolution that halves height and width.

    It rounds up where ``padding`` is 1 (the U-Net), and down where it is 0 (the VAE, which pads the right and the lower
    edge only).
    """

    def __init__(self, channels: int, *, padding: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(
        self, hidden: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels half_height half_width"]:
        return self.conv(hidden if self.conv.padding[0] else F.pad(hidden, (0, 1, 0, 1)))


class Upsample2D(nn.Module):
    """Nearest-neighbour upsampling, by two or to the given (height, width), then a 3×3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(
        self, hidden: Float[Tensor, "batch channels height width"], size: tuple[int, int] | None = None
    ) -> Float[Tensor, "batch channels new_height new_width"]:
        if size is None:
            size = (2 * hidden.shape[-2], 2 * hidden.shape[-1])
        return self.conv(F.interpolate(hidden, size=size, mode="nearest"))


class Attention(nn.Module):
    """Multi-head attention of a sequence to itself, or to a context: attn1 and attn2 of the U-Net's blocks.

    ``site`` is set for the attentions of a U-Net, and None elsewhere.
    """

    site: AttentionSite | None = None

    def __init__(self, width: int, *, heads: int, context_width: int | None = None, bias: bool = False):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(context_width or width, width, bias=bias)
        self.to_v = nn.Linear(context_width or width, width, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])

    def forward(
        self,
        hidden: Float[Tensor, "rows queries width"],
        context: Float[Tensor, "rows keys context_width"] | None = None,
        mask: Bool[Tensor, "rows keys"] | None = None,
        probe: Probe | None = None,
    ) -> Float[Tensor, "batch queries width"]:
        """Attend to ``context``, or to ``hidden`` itself without one; ``mask`` is True where a key may be seen."""
        context = hidden if context is None else context
        query, key, value = (
            rearrange(projected, "b length (heads d) -> b heads length d", heads=self.heads)
            for projected in (self.to_q(hidden), self.to_k(context), self.to_v(context))
        )
        mask = mask if mask is None else mask[:, None, None, :]
        if probe is None or self.site is None:
            attended = attention(query, key, value, mask)
        else:
            attended = probe.attend(self.site, query, key, value, mask, self.to_k)
        attended = rearrange(attended, "b heads length d -> b length (heads d)")
        for layer in self.to_out:
            attended = layer(attended)
        return attended


class GEGLU(nn.Module):
    """Gated linear unit: half of a linear layer times the GELU of the other half (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, in_width: int, out_width: int):
        super().__init__()
        self.proj = nn.Linear(in_width, 2 * out_width)

    def forward(self, hidden: Float[Tensor, "batch length in_width"]) -> Float[Tensor, "batch length out_width"]:
        return geglu(self.proj(hidden))


class FeedForward(nn.Module):
    """Feed-forward layer of a transformer block, four times as wide inside, with a GEGLU."""

    def __init__(self, width: int):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(width, 4 * width), nn.Dropout(0.0), nn.Linear(4 * width, width)])

    def forward(self, hidden: Float[Tensor, "batch length width"]) -> Float[Tensor, "batch length width"]:
        for layer in self.net:
            hidden = layer(hidden)
        return hidden
