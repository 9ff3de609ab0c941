"""The VAE of latent diffusion, at any size: image to latents and back.

Kingma and Welling 2013 (arXiv 1312.6114); Rombach et al. 2022 (arXiv 2112.10752), section 3.1. This file is the
only owner of the scaling factor: the rest of Gobelin knows latents of about unit variance and nothing else.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar, Self

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Generator, Tensor, nn

from gobelin.errors import UsageError
from gobelin.formats.component import Component
from gobelin.layers import Attention, Downsample2D, ResnetBlock2D, Upsample2D
from gobelin.operations import Conv2d, GroupNorm
from gobelin.validation import Count, PositiveNumber, validate_fields

_NORM_EPS = 1e-6  # of every norm in diffusers' AutoencoderKL, for which its config file has no field


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """The configuration of a VAE; fields as in a diffusers ``vae/config.json``.

    Raises :class:`UsageError` for widths that cannot be built.
    """

    block_out_channels: tuple[Count, ...]
    layers_per_block: Count = 2
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: Count = 4
    norm_num_groups: Count = 32
    sample_size: Count = 512
    scaling_factor: PositiveNumber = 0.18215
    mid_block_add_attention: bool = True

    fixed: ClassVar[dict[str, Any]] = {
        "act_fn": "silu",
        "latents_mean": None,
        "latents_std": None,
        "shift_factor": None,
        "use_post_quant_conv": True,
        "use_quant_conv": True,
    }

    def __post_init__(self) -> None:
        validate_fields(self)
        if not self.block_out_channels:
            raise UsageError("block_out_channels is empty: give a width for each level")
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise UsageError(f"the width {width} must divide into {self.norm_num_groups} groups (norm_num_groups)")

    @property
    def factor(self) -> int:
        """Pixels to a latent, in height and in width: 8 for Stable Diffusion 1.5."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def sd15(cls) -> Self:
        """Configure Stable Diffusion 1.5's VAE: 83,653,863 parameters."""
        return cls(block_out_channels=(128, 256, 512, 512))

    @classmethod
    def nano(cls) -> Self:
        """Configure a VAE of 64×64 images and 16×16 latents, for minutes of training."""
        return cls(
            block_out_channels=(16, 32, 32),
            layers_per_block=1,
            norm_num_groups=8,
            sample_size=64,
            scaling_factor=1.0,
            mid_block_add_attention=False,
        )

    @classmethod
    def tiny(cls) -> Self:
        """Configure 0.52 million parameters for 64×64 images and 16×16 latents: the shipped model."""
        return cls(
            block_out_channels=(24, 48, 48),
            layers_per_block=1,
            norm_num_groups=8,
            sample_size=64,
            scaling_factor=1.0,
            mid_block_add_attention=False,
        )

    @classmethod
    def small(cls) -> Self:
        """Configure a VAE of 64×64 images and 16×16 latents, wide enough for texture."""
        return cls(
            block_out_channels=(32, 64, 64),
            norm_num_groups=8,
            sample_size=64,
            scaling_factor=1.0,
            mid_block_add_attention=False,
        )


@dataclass(frozen=True, kw_only=True)
class Posterior:
    """The posterior q(z | x): a diagonal Gaussian over raw (unscaled) latents for each image."""

    mean: Float[Tensor, "batch latent_channels h w"]
    logvar: Float[Tensor, "batch latent_channels h w"]

    def mode(self) -> Float[Tensor, "batch latent_channels h w"]:
        """Return the most likely latents: the mean."""
        return self.mean

    def sample(self, generator: Generator | None = None) -> Float[Tensor, "batch latent_channels h w"]:
        """Draw latents z = μ + σ·ε (the reparametrisation trick); the generator is a CPU one."""
        noise = torch.randn(self.mean.shape, generator=generator, dtype=self.mean.dtype)
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean.device)

    def kl(self) -> Float[Tensor, " latent_channels"]:
        """Compute the KL divergence from N(0, 1) in nats, by channel: summed over positions, a mean over the batch."""
        divergence = 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar)
        return divergence.sum(dim=(2, 3)).mean(dim=0)


class MidAttention(Attention):
    """Self-attention of a feature map's positions, with one head and a residual."""

    def __init__(self, channels: int, groups: int):
        super().__init__(channels, heads=1, bias=True)
        self.group_norm = GroupNorm(groups, channels, eps=_NORM_EPS)

    def forward(  # type: ignore[override]
        self, feature_map: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        positions = rearrange(self.group_norm(feature_map), "b c h w -> b (h w) c")
        attended = super().forward(positions)
        return feature_map + rearrange(attended, "b (h w) c -> b c h w", h=feature_map.shape[-2])


class MidBlock(nn.Module):
    """Middle of the encoder or decoder: residual block, attention where the configuration has it, residual block."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        width = config.block_out_channels[-1]
        self.resnets = nn.ModuleList(_resnet(width, width, config) for _ in range(2))
        if config.mid_block_add_attention:
            self.attentions = nn.ModuleList([MidAttention(width, config.norm_num_groups)])

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.resnets[0](hidden)
        if hasattr(self, "attentions"):
            hidden = self.attentions[0](hidden)
        return self.resnets[1](hidden)


class LevelBlock(nn.Module):
    """One resolution of the encoder or decoder: residual blocks, then the ``change`` "down" or "up", or None."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, change: str | None, config: VAEConfig):
        super().__init__()
        self.resnets = nn.ModuleList(
            _resnet(in_channels if layer == 0 else out_channels, out_channels, config) for layer in range(layers)
        )
        if change == "down":
            self.downsamplers = nn.ModuleList([Downsample2D(out_channels, padding=0)])
        elif change == "up":
            self.upsamplers = nn.ModuleList([Upsample2D(out_channels)])

    def forward(self, hidden: Tensor) -> Tensor:
        for resnet in self.resnets:
            hidden = resnet(hidden)
        if hasattr(self, "downsamplers"):
            hidden = self.downsamplers[0](hidden)
        if hasattr(self, "upsamplers"):
            hidden = self.upsamplers[0](hidden)
        return hidden


class Encoder(nn.Module):
    """The encoder: images to the posterior's mean and log-variance, before the last 1×1 convolution."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            LevelBlock(
                widths[max(level - 1, 0)],
                width,
                config.layers_per_block,
                "down" if level < len(widths) - 1 else None,
                config,
            )
            for level, width in enumerate(widths)
        )
        self.mid_block = MidBlock(config)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[-1], eps=_NORM_EPS)
        self.conv_out = Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.conv_in(images)
        for block in self.down_blocks:
            hidden = block(hidden)
        return self.conv_out(self.conv_norm_out(self.mid_block(hidden), silu=True))


class Decoder(nn.Module):
    """The decoder: latents to images, after the first 1×1 convolution."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = config.block_out_channels[::-1]
        self.conv_in = Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList(
            LevelBlock(
                widths[max(position - 1, 0)],
                width,
                config.layers_per_block + 1,
                "up" if position < len(widths) - 1 else None,
                config,
            )
            for position, width in enumerate(widths)
        )
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[-1], eps=_NORM_EPS)
        self.conv_out = Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        hidden = self.mid_block(self.conv_in(latents))
        for block in self.up_blocks:
            hidden = block(hidden)
        return self.conv_out(self.conv_norm_out(hidden, silu=True))


class VAE(Component[VAEConfig]):
    """The variational autoencoder.

    ``encode`` and ``decode`` use raw latents, as in diffusers; ``images_to_latents`` and ``latents_to_images`` use
    the scaled ones that the rest of Gobelin has.
    """

    config_class = VAEConfig
    class_name = "AutoencoderKL"
    weights_name = "diffusion_pytorch_model.safetensors"

    def __init__(self, config: VAEConfig):
        super().__init__(config)
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.quant_conv = Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = Conv2d(channels, channels, 1)
        self.decoder = Decoder(config)

    def encode(self, images: Float[Tensor, "batch 3 height width"]) -> Posterior:
        """Encode images in [-1, 1] to a posterior over raw latents.

        Raises :class:`UsageError` for sides that are no multiples of ``config.factor``.
        """
        if images.shape[-2] % self.config.factor or images.shape[-1] % self.config.factor:
            raise UsageError(
                f"the images are {images.shape[-1]}×{images.shape[-2]} pixels: the sides must be multiples "
                f"of {self.config.factor} for this VAE"
            )
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return Posterior(mean=mean, logvar=logvar.clamp(-30, 20))  # as CompVis and diffusers clamp

    def decode(self, latents: Float[Tensor, "batch latent_channels h w"]) -> Float[Tensor, "batch 3 height width"]:
        """Decode raw latents to images in about [-1, 1] (not clamped)."""
        return self.decoder(self.post_quant_conv(latents))

    def images_to_latents(
        self, images: Float[Tensor, "batch 3 height width"], generator: Generator | None = None
    ) -> Float[Tensor, "batch latent_channels h w"]:
        """Encode images in [-1, 1] to latents of about unit variance.

        With a generator they are drawn from the posterior; without one they are its mean.
        """
        posterior = self.encode(images)
        return self.config.scaling_factor * (posterior.mode() if generator is None else posterior.sample(generator))

    def latents_to_images(
        self, latents: Float[Tensor, "batch latent_channels h w"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Decode latents of about unit variance to images in about [-1, 1] (not clamped)."""
        return self.decode(latents / self.config.scaling_factor)

    def latents_to_large_images(
        self, latents: Float[Tensor, "batch latent_channels h w"], tile: int = 64, overlap: int = 16
    ) -> Float[Tensor, "batch 3 height width"]:
        """Decode one image at a time, in tiles of ``tile`` × ``tile`` latents: memory does not grow with the size.

        Neighbours share ``overlap`` latents, over which one fades into the other. Group norms see one tile, so that
        colours may differ a little from those of :meth:`latents_to_images`, except for an image of one tile. Raises
        :class:`UsageError` for an overlap of nothing, or of more than half of the tile.
        """
        return decode_in_tiles(self.latents_to_images, self.config, latents, tile, overlap)

    @torch.no_grad()
    def normalise_latents_(
        self, mean: Float[Tensor, " latent_channels"], std: Float[Tensor, " latent_channels"]
    ) -> None:
        """Normalise the raw latents: shift and scale each channel from its ``mean`` and ``std`` to 0 and 1.

        The change is folded into the two 1×1 convolutions, so that images decode as before and other tools, which have
        one scaling factor only, read the VAE as any other.
        """
        channels = self.config.latent_channels
        scale = torch.cat([std, torch.ones_like(std)])
        shift = torch.cat([mean / std, 2 * std.log()])
        assert self.quant_conv.bias is not None
        assert self.post_quant_conv.bias is not None
        self.quant_conv.weight.div_(scale[:, None, None, None])
        self.quant_conv.bias.div_(scale).sub_(shift)
        self.post_quant_conv.bias.add_(self.post_quant_conv.weight.reshape(channels, channels) @ mean)
        self.post_quant_conv.weight.mul_(std[None, :, None, None])

    @classmethod
    def map_names(cls, names: Iterable[str]) -> dict[str, str]:
        """Map the names of a file to keys: in older files, Stable Diffusion 1.5's own too, attention has others."""

        def current(name: str) -> str:
            *path, layer, kind = name.split(".")
            return ".".join([*path, _OLD_NAMES.get(layer, layer), kind]) if ".attentions." in name else name

        return {name: current(name) for name in names}

    def config_json(self) -> dict[str, Any]:
        """Write the configuration with the block types that diffusers wants named."""
        levels = len(self.config.block_out_channels)
        return {
            **super().config_json(),
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
        }


_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def decode_in_tiles(
    decode: Callable[[Tensor], Tensor],
    config: VAEConfig,
    latents: Float[Tensor, "batch latent_channels h w"],
    tile: int,
    overlap: int,
) -> Float[Tensor, "batch 3 height width"]:
    """Decode latents one image at a time, in tiles that fade into each other (:meth:`VAE.latents_to_large_images`)."""
    # Tiles of 64 are the 512 pixels that SD 1.5's VAE was trained at, a quarter of overlap is diffusers' default.
    if not 0 < overlap <= tile // 2:
        raise UsageError(
            f"the tiles are {tile} latents and overlap by {overlap}: give an overlap from 1 to half of the tile"
        )
    height, width = latents.shape[-2:]
    if max(height, width) <= tile:
        return torch.cat([decode(one) for one in latents.split(1)])
    factor = config.factor
    images = []
    for one in latents.split(1):
        shape = (height * factor, width * factor)
        image = torch.zeros(1, config.out_channels, *shape, device=one.device)  # summed in float32
        weight = torch.zeros(1, 1, *shape, device=one.device)
        for top, left in product(_starts(height, tile, overlap), _starts(width, tile, overlap)):
            part = one[..., top : top + tile, left : left + tile]
            rows, columns = (slice(start * factor, (start + tile) * factor) for start in (top, left))
            fade = _fade(part.shape[-2], overlap, factor)[:, None] * _fade(part.shape[-1], overlap, factor)
            image[..., rows, columns] += decode(part).float() * fade.to(one.device)
            weight[..., rows, columns] += fade.to(one.device)
        images.append((image / weight).to(one))
    return torch.cat(images)


def _starts(side: int, tile: int, overlap: int) -> list[int]:
    """Place tiles evenly along a side: the first latent of each, the last tile ending with the side."""
    if side <= tile:
        return [0]
    count = -(-(side - overlap) // (tile - overlap))
    return [round(index * (side - tile) / (count - 1)) for index in range(count)]


def _fade(side: int, overlap: int, factor: int) -> Float[Tensor, " pixels"]:
    """Compute a tile's weight at each pixel of a side: it rises over the overlap and falls again."""
    pixels = torch.arange(side * factor) + 0.5
    return torch.minimum(pixels, side * factor - pixels).clamp(max=overlap * factor)


def _resnet(in_channels: int, out_channels: int, config: VAEConfig) -> ResnetBlock2D:
    """Make a residual block with the VAE's norms, and without a timestep."""
    return ResnetBlock2D(in_channels, out_channels, groups=config.norm_num_groups, eps=_NORM_EPS)
