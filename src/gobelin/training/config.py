"""What a training run is told: frozen dataclasses, and presets that are functions returning a full one."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from gobelin.checkpoint import Recommended
from gobelin.errors import UsageError
from gobelin.formats.component import require_choices, require_counts
from gobelin.samplers import find_sampler


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the pairs come from."""

    path: str | None = None
    """A folder of captioned images; without one, the procedural scenes."""
    world: str = "nano"
    """The world of scenes."""
    count: int = 16_000
    """How many scenes."""
    size: int = 64
    """Height and width of the images, in pixels: a multiple of 16."""

    def __post_init__(self) -> None:
        require_counts(self, "size", "count")
        if self.size % 16:
            raise UsageError(f"size is {self.size}: give a multiple of 16")
        if self.path is not None and not isinstance(self.path, str):
            raise UsageError(f"path is {self.path!r}: give the name of a folder")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """An optimizer, a learning rate that warms up, holds, and falls as half a cosine, and an average of the weights."""

    steps: int
    """Optimizer steps."""
    batch_size: int
    learning_rate: float
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices and kernels between hidden layers, AdamW for all else."""
    warmup_steps: int = 100
    hold: float = 0.0
    """How much of the steps goes by, warm-up and all, before the rate begins to fall. A run can be made longer while it
    holds."""
    final_learning_rate: float = 0.02
    """Where the cosine ends, as a fraction of the learning rate."""
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    clip_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    ema: float = 0.999
    """How slowly the average of the weights moves; it is what is saved and sampled."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast; the weights stay float32."""

    def __post_init__(self) -> None:
        require_counts(self, "steps", "batch_size")
        require_choices(self)
        if not 0 <= self.hold < 1:
            raise UsageError(f"hold is {self.hold}: give a fraction from 0 to less than 1")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The vocabulary, trained on the captions."""

    vocab_size: int = 1024
    """At most; 514 of them are bytes and markers."""
    max_length: int = 32
    """Tokens of a prompt with its BOS and EOS; 77 for Stable Diffusion 1.5."""


@dataclass(frozen=True, kw_only=True)
class TextStageConfig:
    """The text encoder and its training: contrast with images, and sketches."""

    width: int = 96
    layers: int = 2
    heads: int = 4
    projection: int = 96
    """Width of the space that texts and images share."""
    text_rate: float = 0.1
    """The text encoder's learning rate, as a fraction of the image encoder's: at the full rate, words that the
    images cannot tell apart yet become synonyms, and stay so, unless Muon takes the steps."""
    sketch: float = 5.0
    """Weight of the sketches beside the contrast: colours in 8×8 places from words alone, the error as a share of their
    variance."""
    optim: OptimConfig


@dataclass(frozen=True, kw_only=True)
class VAEStageConfig:
    """The autoencoder and its losses' weights, each loss a mean over pixels in [-1, 1]."""

    preset: Literal["nano", "tiny", "small", "sd15"] = "nano"
    mse: float = 4.0
    coarse_mse: float = 4.0
    """Of means over 4×4 pixels: what carries colour."""
    edges: float = 1.0
    """Of differences between neighbouring pixels."""
    l1: float = 0.1
    kl: float = 1e-7
    """Of the KL divergence summed over the latents of an image."""
    latent_noise: float = 0.0
    """Noise added before decoding, as a fraction of each latent channel's spread, so that the decoder learns to bear
    what the U-Net gets wrong."""
    optim: OptimConfig

    def __post_init__(self) -> None:
        require_choices(self)


@dataclass(frozen=True, kw_only=True)
class UNetStageConfig:
    """The U-Net and what it predicts."""

    preset: Literal["nano", "tiny", "small", "sd15"] = "nano"
    prediction: Literal["epsilon", "v_prediction"] = "v_prediction"
    zero_terminal_snr: bool = True
    caption_dropout: float = 0.1
    """How often a caption is left empty, so that guidance has something to guide away from."""
    train_text_encoder: bool = False
    """Let the U-Net's loss train the text encoder too, in place of keeping it as its own stage left it."""
    text_rate: float = 0.3
    """The text encoder's learning rate then, as a fraction of the U-Net's."""
    timestep_shift: float = 3.0
    """How much more often timesteps near noise are drawn, where what goes where is settled: half of them are beyond
    shift / (1 + shift) of the schedule. 1 draws them evenly."""
    gradient_checkpointing: bool = False
    optim: OptimConfig

    def __post_init__(self) -> None:
        require_choices(self)
        if self.timestep_shift <= 0:
            raise UsageError(
                f"timestep_shift is {self.timestep_shift}: give a number above 0; 1 draws timesteps evenly"
            )
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise UsageError(
                "zero_terminal_snr needs prediction v_prediction: in pure noise there is no epsilon to learn from"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a training run, apart from where it is written."""

    seed: int = 0
    device: str = "auto"
    """auto, cpu, cuda, mps."""
    save_every: int = 500
    """Steps between checkpoints."""
    picture_every: int = 1000
    """Steps between sample grids."""
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    text: TextStageConfig
    vae: VAEStageConfig
    unet: UNetStageConfig
    recommended: Recommended = field(default_factory=lambda: Recommended(steps=20, guidance=3.0))

    def __post_init__(self) -> None:
        require_counts(self, "save_every", "picture_every")
        find_sampler(self.recommended.sampler)


def nano() -> TrainConfig:
    """From nothing to pictures in about 13 minutes on two CPU cores: 5 shapes, 6 colours, 1.4 million parameters."""
    return TrainConfig(
        text=TextStageConfig(
            optim=OptimConfig(
                steps=280, batch_size=128, learning_rate=2e-3, warmup_steps=40, ema=0.98, precision="bfloat16"
            )
        ),
        vae=VAEStageConfig(optim=OptimConfig(steps=500, batch_size=16, learning_rate=3e-3, ema=0.99, weight_decay=0.0)),
        unet=UNetStageConfig(
            optim=OptimConfig(
                steps=2400,
                batch_size=32,
                learning_rate=2e-3,
                warmup_steps=100,
                ema=0.998,
                precision="bfloat16",
            )
        ),
    )


def tiny() -> TrainConfig:
    """All seven shapes and ten colours, counts and relations: the model that ships."""
    return TrainConfig(
        data=DataConfig(world="core", count=64_000),
        tokenizer=TokenizerConfig(vocab_size=768),
        text=TextStageConfig(
            width=192,
            layers=4,
            projection=192,
            text_rate=1.0,
            optim=OptimConfig(
                steps=1600,
                batch_size=128,
                learning_rate=3e-3,
                optimizer="muon",
                warmup_steps=60,
                hold=0.6,
                ema=0.99,
                precision="bfloat16",
            ),
        ),
        vae=VAEStageConfig(
            preset="tiny",
            optim=OptimConfig(
                steps=2400, batch_size=16, learning_rate=2e-3, ema=0.99, weight_decay=0.0, precision="bfloat16"
            ),
        ),
        unet=UNetStageConfig(
            preset="tiny",
            optim=OptimConfig(
                steps=15_000,
                batch_size=64,
                learning_rate=3e-3,
                optimizer="muon",
                warmup_steps=200,
                hold=0.65,
                precision="bfloat16",
            ),
        ),
        recommended=Recommended(sampler="ddpm", steps=25, guidance=3.0),
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {"nano": nano, "tiny": tiny}


def find_preset(name: str) -> TrainConfig:
    """The preset of that name; raises :class:`UsageError` with the choices."""
    if name not in PRESETS:
        raise UsageError(f"unknown preset {name!r}: the choices are {', '.join(PRESETS)}")
    return PRESETS[name]()
