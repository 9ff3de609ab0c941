"""The cross-attention U-Net of Stable Diffusion 1.5, at any size: noisy latents, timestep and text to predicted noise.

Rombach et al. 2022 (arXiv 2112.10752), sections 3.3 and C.1. In every transformer block the patches of the
latents attend to each other (``attn1``) and to the words (``attn2``).
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Num
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gobelin.attention import (
    AttentionChange,
    AttentionEdit,
    AttentionMaps,
    AttentionSite,
    AttentionTensors,
    Probe,
    Reduction,
    Sites,
    TensorProbe,
    choose_sites,
)
from gobelin.errors import UsageError
from gobelin.formats.component import Component
from gobelin.layers import (
    Attention,
    Downsample2D,
    FeedForward,
    ResnetBlock2D,
    TimestepEmbedding,
    Timesteps,
    Upsample2D,
    repeat_rows,
)
from gobelin.operations import Conv2d, GroupNorm, LayerNorm
from gobelin.shortcuts import DeepFeatures, Shortcuts
from gobelin.token_merging import MergedPatches
from gobelin.unet_config import UNetConfig

SHALLOW_LAYERS = 2
"""The last layers of the way up, which run in every pass where deep features are kept (docs/decisions.md)."""
_TRANSFORMER_NORM_EPS = 1e-6  # diffusers' Transformer2DModel; the residual blocks and the output have `norm_eps`


class Conditioning(NamedTuple):
    """The conditioning of a U-Net's blocks, one value for all of them in a forward pass.

    The timestep's embedding is added in every residual block; ``text_embeddings`` are what attn2 attends to, where
    ``text_mask`` is True, or all without one. ``probe`` records and edits attention. ``merge_tokens`` is the share of
    the patches that are merged where the finest attend to each other.
    """

    time_embedding: Float[Tensor, "images time_width"]
    text_embeddings: Float[Tensor, "batch length text_width"]
    text_mask: Bool[Tensor, "batch length"] | None = None
    probe: Probe | None = None
    merge_tokens: float = 0.0


class BasicTransformerBlock(nn.Module):
    """Self-attention of patches, cross-attention to words, feed-forward; each is added to a residual."""

    def __init__(self, width: int, config: UNetConfig):
        super().__init__()
        heads = config.attention_head_dim
        self.norm1 = LayerNorm(width)
        self.attn1 = Attention(width, heads=heads)
        self.norm2 = LayerNorm(width)
        self.attn2 = Attention(width, heads=heads, context_width=config.cross_attention_dim)
        self.norm3 = LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(
        self,
        hidden: Float[Tensor, "rows patches width"],
        conditioning: Conditioning,
        height: int = 1,
    ) -> Float[Tensor, "batch patches width"]:
        """Attend to patches, which stand in ``height`` rows, and to words, and feed forward."""
        text_embeddings, text_mask, probe = conditioning.text_embeddings, conditioning.text_mask, conditioning.probe
        attended = self._attend_to_patches(hidden, conditioning, height)
        batch = text_embeddings.shape[0]  # from here on the texts of an image are told apart
        hidden = repeat_rows(hidden, batch) + repeat_rows(attended, batch)
        hidden = hidden + self.attn2(self.norm2(hidden), text_embeddings, text_mask, probe)
        return hidden + self.ff(self.norm3(hidden))

    def _attend_to_patches(self, hidden: Tensor, conditioning: Conditioning, height: int) -> Tensor:
        """Attend to patches; the finest, of which there are the most, may be merged for it."""
        site, probe = self.attn1.site, conditioning.probe
        if not conditioning.merge_tokens or site is None or site.downscale > 1:
            return self.attn1(self.norm1(hidden), probe=probe)
        patches = MergedPatches.of(hidden, height, conditioning.merge_tokens)
        attended = self.attn1(patches.merge(self.norm1(hidden)), probe=probe)
        if probe is not None and site in probe.maps:
            probe.maps[site] = patches.spread(probe.maps[site], probe.rows_among(hidden.shape[0]))
        return patches.unmerge(attended)


class Transformer2DModel(nn.Module):
    """A transformer over the patches of a feature map, with a residual around the whole."""

    def __init__(self, channels: int, config: UNetConfig):
        super().__init__()
        self.norm = GroupNorm(config.norm_num_groups, channels, eps=_TRANSFORMER_NORM_EPS)
        self.proj_in = Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([BasicTransformerBlock(channels, config)])
        self.proj_out = Conv2d(channels, channels, 1)

    def forward(
        self,
        feature_map: Float[Tensor, "rows channels height width"],
        conditioning: Conditioning,
    ) -> Float[Tensor, "batch channels height width"]:
        """Take the feature map apart into a row of patches, and put it together again after the blocks."""
        height = feature_map.shape[-2]
        patches = rearrange(self.proj_in(self.norm(feature_map)), "b c h w -> b (h w) c")
        for block in self.transformer_blocks:
            patches = block(patches, conditioning, height)
        change = self.proj_out(rearrange(patches, "b (h w) c -> b c h w", h=height))
        return repeat_rows(feature_map, change.shape[0]) + change


class _Block(nn.Module):
    """Residual blocks of one level of the U, each followed by a transformer where the level has them."""

    def __init__(self, channels: list[tuple[int, int]], transformers: int, config: UNetConfig):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock2D(
                in_channels,
                out_channels,
                groups=config.norm_num_groups,
                eps=config.norm_eps,
                time_width=4 * config.block_out_channels[0],
            )
            for in_channels, out_channels in channels
        )
        if transformers:
            width = channels[-1][1]
            self.attentions = nn.ModuleList(Transformer2DModel(width, config) for _ in range(transformers))

    def run_layer(self, layer: int, hidden: Tensor, conditioning: Conditioning) -> Tensor:
        """Run one residual block, and the transformer after it where there is one."""
        hidden = self.resnets[layer](hidden, conditioning.time_embedding)
        return self.attentions[layer](hidden, conditioning) if hasattr(self, "attentions") else hidden


class DownBlock2D(_Block):
    """One level of the encoder half. Returns its output and the feature maps of its skip connections."""

    def __init__(self, config: UNetConfig, level: int):
        widths = config.block_out_channels
        layers = config.layers_per_block
        width = widths[level]
        channels = [(widths[max(level - 1, 0)], width)] + [(width, width)] * (layers - 1)
        attends = config.down_block_types[level] == "CrossAttnDownBlock2D"
        super().__init__(channels, layers if attends else 0, config)
        if level < len(widths) - 1:
            self.downsamplers = nn.ModuleList([Downsample2D(width, padding=1)])

    def forward(
        self, hidden: Float[Tensor, "batch in_channels height width"], conditioning: Conditioning
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the layers, and halve height and width except at the last level."""
        skips = []
        for layer in range(len(self.resnets)):
            hidden = self.run_layer(layer, hidden, conditioning)
            skips.append(hidden)
        if hasattr(self, "downsamplers"):
            hidden = self.downsamplers[0](hidden)
            skips.append(hidden)
        return hidden, skips


class UNetMidBlock2DCrossAttn(_Block):
    """The bottom of the U: residual block, transformer, residual block."""

    def __init__(self, config: UNetConfig):
        width = config.block_out_channels[-1]
        super().__init__([(width, width)] * 2, 1, config)

    def forward(
        self, hidden: Float[Tensor, "rows channels height width"], conditioning: Conditioning
    ) -> Float[Tensor, "batch channels height width"]:
        """Run the residual block with its transformer, and the other residual block."""
        return self.resnets[1](self.run_layer(0, hidden, conditioning), conditioning.time_embedding)


class UpBlock2D(_Block):
    """One level of the decoder half. Every residual block has a skip connection's feature map beside its input."""

    def __init__(self, config: UNetConfig, position: int):
        widths = config.block_out_channels
        level = len(widths) - 1 - position
        layers = config.layers_per_block + 1
        below = widths[min(level + 1, len(widths) - 1)]
        skips = [widths[level]] * (layers - 1) + [widths[max(level - 1, 0)]]
        inputs = [below] + [widths[level]] * (layers - 1)
        channels = [(hidden + skip, widths[level]) for hidden, skip in zip(inputs, skips, strict=True)]
        attends = config.up_block_types[position] == "CrossAttnUpBlock2D"
        super().__init__(channels, layers if attends else 0, config)
        if level > 0:
            self.upsamplers = nn.ModuleList([Upsample2D(widths[level])])

    def forward(
        self,
        hidden: Float[Tensor, "batch in_channels height width"],
        skips: list[Tensor],
        size: tuple[int, int] | None,
        conditioning: Conditioning,
        deep: DeepFeatures | None = None,
    ) -> Float[Tensor, "batch out_channels new_height new_width"]:
        """Run the layers over ``skips``, from the last one, and grow to ``size`` except at the first level.

        With fewer skips than layers, the last layers run. What enters the shallow ones is left in ``deep``.
        """
        layers = len(self.resnets)
        for layer, skip in enumerate(reversed(skips), start=layers - len(skips)):
            if deep is not None and layer == layers - SHALLOW_LAYERS:
                deep.hidden = hidden
            hidden = self.run_layer(layer, torch.cat([hidden, repeat_rows(skip, hidden.shape[0])], dim=1), conditioning)
        return self.upsamplers[0](hidden, size) if hasattr(self, "upsamplers") else hidden


class UNet(Component[UNetConfig]):
    """The cross-attention U-Net: ε_θ(z_t, t, τ(y)), or v_θ where the schedule says so.

    Set ``gradient_checkpointing`` to recompute each block in the backward pass instead of keeping its activations.
    """

    config_class = UNetConfig
    class_name = "UNet2DConditionModel"
    weights_name = "diffusion_pytorch_model.safetensors"

    def __init__(self, config: UNetConfig):
        super().__init__(config)
        widths = config.block_out_channels
        self.gradient_checkpointing = False
        self.conv_in = Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_proj = Timesteps(widths[0])
        self.time_embedding = TimestepEmbedding(widths[0], 4 * widths[0])
        self.down_blocks = nn.ModuleList(DownBlock2D(config, level) for level in range(len(widths)))
        self.mid_block = UNetMidBlock2DCrossAttn(config)
        self.up_blocks = nn.ModuleList(UpBlock2D(config, position) for position in range(len(widths)))
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[0], eps=config.norm_eps)
        self.conv_out = Conv2d(widths[0], config.out_channels, 3, padding=1)
        self.attention_sites = tuple(self._name_sites())

    def forward(
        self,
        noisy_latents: Float[Tensor, "images in_channels height width"],
        timesteps: Num[Tensor, " images"],
        text_embeddings: Float[Tensor, "batch length text_width"],
        text_mask: Bool[Tensor, "batch length"] | None = None,
    ) -> Float[Tensor, "batch out_channels height width"]:
        """Predict the noise (or the velocity) in ``noisy_latents``.

        ``timesteps`` are in 0 … 999 and may lie between two integers. ``text_mask`` is True where a token may be
        attended to; without one all are, the padding too, as in Stable Diffusion. Height and width are free:
        where a level has an odd size, the way up goes back to that size.

        An image may have several texts, as guidance gives it: one of every image, then another of every image. What
        comes before the first cross-attention is then computed once for all of them.
        """
        time_embedding = self._embed_time(timesteps, noisy_latents.dtype)
        return self._predict(noisy_latents, Conditioning(time_embedding, text_embeddings, text_mask))

    def trace(
        self,
        noisy_latents: Float[Tensor, "images in_channels height width"],
        timesteps: Num[Tensor, " images"],
        text_embeddings: Float[Tensor, "batch length text_width"],
        text_mask: Bool[Tensor, "batch length"] | None = None,
        sites: Sites = None,
        reduce: Reduction = "heads",
        rows: slice | None = None,
        edits: Sequence[AttentionEdit] = (),
        shortcuts: Shortcuts | None = None,
    ) -> tuple[Float[Tensor, "batch out_channels height width"], AttentionMaps]:
        """Predict, bit for bit as a plain call, and return the attention maps of this call beside the prediction.

        ``sites`` chooses among ``attention_sites``: None for all cross-attention, a pattern of names
        (``"up_blocks.*attn2"``), a function of a site, or the sites themselves. ``reduce`` "heads" gives means over
        heads [B, patches, keys], "none" every head [B, heads, patches, keys], float32. ``edits`` change attention
        probabilities, one after the other, at every timestep, and then the maps and the prediction are those of the
        changed ones. ``rows`` limits maps and edits to a part of the batch. With ``shortcuts`` the prediction is an
        approximate one, the same traced or not, and sites that did not run have no maps. Raises :class:`UsageError`,
        with a list of the sites, for a choice that matches none, and for edits of a pass with shortcuts.
        """
        if edits and shortcuts is not None:
            raise UsageError("attention edits need a whole pass: leave out the shortcuts, or the edits")
        probe = Probe(
            sites=choose_sites(self.attention_sites, sites),
            reduce=reduce,
            batch=text_embeddings.shape[0],
            rows=slice(None) if rows is None else rows,
            changes=self._changes(edits),
        )
        time_embedding = self._embed_time(timesteps, noisy_latents.dtype)
        taken = shortcuts or Shortcuts()
        conditioning = Conditioning(time_embedding, text_embeddings, text_mask, probe, taken.merge_tokens)
        return self._predict(noisy_latents, conditioning, taken.deep), probe.maps

    def attention_tensors(
        self,
        noisy_latents: Float[Tensor, "images in_channels height width"],
        timesteps: Num[Tensor, " images"],
        text_embeddings: Float[Tensor, "images length text_width"],
        text_mask: Bool[Tensor, "images length"] | None = None,
        sites: Sites = None,
        edits: Sequence[AttentionEdit] = (),
    ) -> dict[AttentionSite, AttentionTensors]:
        """Predict, and return queries, keys, values, probabilities and outputs at ``sites``, with ``edits`` applied.

        ``sites`` and ``edits`` are as in :meth:`trace`, and so are the probabilities.
        """
        probe = TensorProbe(
            sites=choose_sites(self.attention_sites, sites),
            reduce="none",
            batch=text_embeddings.shape[0],
            rows=slice(None),
            changes=self._changes(edits),
        )
        time_embedding = self._embed_time(timesteps, noisy_latents.dtype)
        self._predict(noisy_latents, Conditioning(time_embedding, text_embeddings, text_mask, probe))
        return probe.tensors

    def _changes(self, edits: Sequence[AttentionEdit]) -> dict[AttentionSite, list[AttentionChange]]:
        """List the changes of each site."""
        changes: dict[AttentionSite, list[AttentionChange]] = {}
        for edit in edits:
            for site in choose_sites(self.attention_sites, edit.sites):
                changes.setdefault(site, []).append(edit.change)
        return changes

    def _embed_time(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """Embed timesteps: sinusoids, then two linear layers in ``dtype``."""
        return self.time_embedding(self.time_proj(timesteps).to(dtype))

    def _predict(self, noisy_latents: Tensor, conditioning: Conditioning, deep: DeepFeatures | None = None) -> Tensor:
        """Predict, with all layers or, where there are ``deep`` features already, the shallow ones."""
        images, texts = noisy_latents.shape[0], conditioning.text_embeddings.shape[0]
        if texts != images and (0 in (images, texts) or texts % images):
            raise UsageError(f"the U-Net is given {texts} texts for {images} images: give each image as many")
        hidden = self.conv_in(noisy_latents)
        if deep is None or deep.hidden is None:
            hidden = self._run_whole(hidden, conditioning, deep)
        else:
            hidden = self._run_shallow(hidden, conditioning, deep.hidden)
        return self.conv_out(self.conv_norm_out(hidden, silu=True))

    def _run_whole(self, hidden: Tensor, conditioning: Conditioning, deep: DeepFeatures | None) -> Tensor:
        """Go down, noting feature maps for the skip connections, through the middle, and up again."""
        skips = [hidden]
        for block in self.down_blocks:
            hidden, block_skips = self._run(block, hidden, conditioning)
            skips += block_skips

        hidden = self._run(self.mid_block, hidden, conditioning)

        for block in self.up_blocks:
            count = self.config.layers_per_block + 1
            skips, block_skips = skips[:-count], skips[-count:]
            size = tuple(skips[-1].shape[-2:]) if skips else None
            hidden = self._run(block, hidden, block_skips, size, conditioning, None if skips else deep)
        return hidden

    def _run_shallow(self, hidden: Tensor, conditioning: Conditioning, deep: Tensor) -> Tensor:
        """Run the layers nearest to the latents, over what deeper ones returned in an earlier pass."""
        finest = self.down_blocks[0]
        assert isinstance(finest, DownBlock2D)
        skips = [hidden]
        for layer in range(SHALLOW_LAYERS - 1):
            skips.append(finest.run_layer(layer, skips[-1], conditioning))
        return self.up_blocks[-1](deep, skips, None, conditioning)

    def _name_sites(self) -> Iterator[AttentionSite]:
        """Give every attention its site, in the order in which latents pass through them."""
        names = {module: name for name, module in self.named_modules()}
        down = [2**level for level in range(len(self.down_blocks))]
        blocks = [*self.down_blocks, self.mid_block, *self.up_blocks]
        for block, downscale in zip(blocks, [*down, down[-1], *reversed(down)], strict=True):
            for module in block.modules():
                if isinstance(module, Attention):
                    kind = "self" if names[module].endswith("attn1") else "cross"
                    module.site = AttentionSite(name=names[module], kind=kind, downscale=downscale, heads=module.heads)
                    yield module.site

    def _run(self, block: nn.Module, *inputs: Any) -> Any:
        """Run a block, under gradient checkpointing where that is set."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def zero_init_(self) -> Self:
        """Set the last layer of every residual branch, and of the network, to zero: training from scratch begins so.

        As CompVis trains (``zero_module`` in ``ldm/modules/diffusionmodules/openaimodel.py``); diffusers does not.
        """
        for module in self.modules():
            if isinstance(module, ResnetBlock2D):
                _zero_(module.conv2)
            elif isinstance(module, Transformer2DModel):
                _zero_(module.proj_out)
        _zero_(self.conv_out)
        return self


def _zero_(layer: nn.Conv2d) -> None:
    """Set a layer's weight and bias to zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
