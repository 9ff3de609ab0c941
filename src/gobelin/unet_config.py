"""The U-Net's configuration: levels, widths and heads, under the names of a diffusers ``unet/config.json``."""

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Self

from annotated_types import Interval

from gobelin.errors import UsageError
from gobelin.validation import Count, PositiveNumber, validate_fields

_LARGEST_SAMPLE = 1024  # latents: 8192 pixels, of which one step takes minutes
_DOWN_BLOCKS = ("CrossAttnDownBlock2D", "DownBlock2D")
_UP_BLOCKS = ("CrossAttnUpBlock2D", "UpBlock2D")


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The configuration of a U-Net; fields as in a diffusers ``unet/config.json``.

    ``attention_head_dim`` is the number of *heads*: the misnomer is the file format's.
    ``sample_size`` is the latents' usual height and width; any other works too. Raises :class:`UsageError` for fields
    that do not fit each other.
    """

    sample_size: Annotated[int, Interval(ge=1, le=_LARGEST_SAMPLE)] = 64
    in_channels: Count = 4
    out_channels: Count = 4
    block_out_channels: tuple[Count, ...]
    layers_per_block: Count = 2
    down_block_types: tuple[str, ...]
    up_block_types: tuple[str, ...]
    cross_attention_dim: Count
    attention_head_dim: Count = 8
    norm_num_groups: Count = 32
    norm_eps: PositiveNumber = 1e-5

    # Other fields of a config file, with the only values that this architecture has.
    fixed: ClassVar[dict[str, Any]] = {
        "act_fn": "silu",
        "attention_type": "default",
        "center_input_sample": False,
        "class_embed_type": None,
        "addition_embed_type": None,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "cross_attention_norm": None,
        "downsample_padding": 1,
        "dropout": 0.0,
        "dual_cross_attention": False,
        "encoder_hid_dim": None,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "mid_block_only_cross_attention": None,
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "num_attention_heads": None,
        "num_class_embeds": None,
        "only_cross_attention": False,
        "resnet_out_scale_factor": 1.0,
        "resnet_skip_time_act": False,
        "resnet_time_scale_shift": "default",
        "reverse_transformer_layers_per_block": None,
        "time_cond_proj_dim": None,
        "time_embedding_act_fn": None,
        "time_embedding_dim": None,
        "time_embedding_type": "positional",
        "timestep_post_act": None,
        "transformer_layers_per_block": 1,
        "use_linear_projection": False,
    }

    def __post_init__(self) -> None:
        validate_fields(self)
        levels = len(self.block_out_channels)
        if not levels or len(self.down_block_types) != levels or len(self.up_block_types) != levels:
            raise UsageError(
                f"block_out_channels has {levels} widths, but down_block_types names {len(self.down_block_types)} "
                f"blocks and up_block_types {len(self.up_block_types)}: give one of each per width"
            )
        for name, known in (("down", _DOWN_BLOCKS), ("up", _UP_BLOCKS)):
            for kind in getattr(self, f"{name}_block_types"):
                if kind not in known:
                    raise UsageError(f"{name}_block_types names {kind!r}: the choices are {', '.join(known)}")
        if self.block_out_channels[0] % 2:
            raise UsageError(f"the first width {self.block_out_channels[0]} must be even, for sines and cosines")
        for width in self.block_out_channels:
            if width % self.norm_num_groups or width % self.attention_head_dim:
                raise UsageError(
                    f"the width {width} must divide into {self.norm_num_groups} groups (norm_num_groups) "
                    f"and {self.attention_head_dim} heads (attention_head_dim)"
                )

    @classmethod
    def of(cls, *block_out_channels: int, attention: tuple[bool, ...], **others: Any) -> Self:
        """Configure a symmetric U-Net; ``attention`` says, from the top down, if a level has transformer blocks."""
        down = tuple(_DOWN_BLOCKS[not attends] for attends in attention)
        up = tuple(_UP_BLOCKS[not attends] for attends in reversed(attention))
        return cls(block_out_channels=block_out_channels, down_block_types=down, up_block_types=up, **others)

    @classmethod
    def sd15(cls) -> Self:
        """Configure Stable Diffusion 1.5's U-Net: 859,520,964 parameters."""
        return cls.of(320, 640, 1280, 1280, attention=(True, True, True, False), cross_attention_dim=768)

    @classmethod
    def nano(cls) -> Self:
        """Configure 1.1 million parameters for 16×16 latents: it trains in minutes on two CPU cores."""
        return cls.of(
            *(32, 64),
            attention=(True, True),
            sample_size=16,
            layers_per_block=1,
            cross_attention_dim=96,
            attention_head_dim=2,
            norm_num_groups=8,
        )

    @classmethod
    def tiny(cls) -> Self:
        """Configure 5,060,548 parameters for 16×16 latents: the shipped model."""
        return cls.of(
            *(48, 96, 144),
            attention=(True, True, False),
            sample_size=16,
            layers_per_block=1,
            cross_attention_dim=192,
            attention_head_dim=4,
            norm_num_groups=16,
        )

    @classmethod
    def emoji(cls) -> Self:
        """Configure 8,036,100 parameters for 16×16 latents, most of them at 8×8 and 4×4: the shipped model of emoji."""
        return replace(cls.tiny(), block_out_channels=(32, 128, 192))

    @classmethod
    def small(cls) -> Self:
        """Configure about 38 million parameters for 16×16 latents; training wants a GPU."""
        return cls.of(
            *(96, 192, 288),
            attention=(True, True, True),
            sample_size=16,
            cross_attention_dim=256,
            attention_head_dim=4,
            norm_num_groups=32,
        )
