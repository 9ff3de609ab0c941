"""Configuration of a training run: frozen dataclasses, and presets as functions that return a complete one.

Every value is checked when a configuration is made: :class:`UsageError` names the field and the values that it takes.
Names in quotes are headings of ``docs/decisions.md``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from gobelin.checkpoint import Recommended
from gobelin.errors import UsageError
from gobelin.formats.component import require_choices, require_counts
from gobelin.samplers import find_sampler
from gobelin.tokenizer import MIN_VOCABULARY

_Rule = tuple[str, Callable[[float], bool]]
_ABOVE_ZERO: _Rule = ("a number above 0", lambda value: 0 < value < math.inf)
_ZERO_OR_MORE: _Rule = ("a number of 0 or more", lambda value: 0 <= value < math.inf)
_WHOLE_NUMBER: _Rule = ("a whole number of 0 or more", lambda value: isinstance(value, int) and value >= 0)
_FRACTION: _Rule = ("a fraction from 0 to 1", lambda value: 0 <= value <= 1)
_BELOW_ONE: _Rule = ("a fraction from 0 to less than 1", lambda value: 0 <= value < 1)


def _fits(value: Any, rule: _Rule) -> bool:
    """Tell whether a value is a number that keeps the rule; NaN keeps none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and rule[1](value)


def _require(config: Any, rule: _Rule, *names: str) -> None:
    """Raise :class:`UsageError` for the first of these fields that breaks the rule."""
    for name in names:
        if not _fits(getattr(config, name), rule):
            raise UsageError(f"{name} is {getattr(config, name)!r}: give {rule[0]}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The captioned images to train on."""

    path: str | None = None
    """A folder of captioned images; without one, procedural scenes are drawn."""
    world: str = "nano"
    """The world of scenes: nano, core or rich."""
    count: int = 16_000
    """Number of scenes."""
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
    """Optimizer, learning rate schedule (warm-up, constant, half a cosine), and moving average of the weights."""

    steps: int
    """Optimizer steps."""
    batch_size: int
    """Images a step."""
    learning_rate: float
    """The highest learning rate, reached after the warm-up."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for matrices and kernels between hidden layers, AdamW for all else."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from 0."""
    hold: float = 0.0
    """Fraction of the steps, warm-up included, before the learning rate begins to fall. A run can be made longer while
    it holds."""
    final_lr_ratio: float = 0.02
    """Learning rate of the last step, as a fraction of the highest."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices and kernels."""
    betas: tuple[float, float] = (0.9, 0.99)  # .99 and not AdamW's .999, as usual for short runs; not measured
    """AdamW's decay of its first and second moments."""
    clip_norm: float = 1.0
    """Largest norm of all gradients together; larger ones are scaled down to it."""
    ema: float = 0.999
    """Decay of the exponential moving average of the weights, which is what is saved and sampled."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast; the weights stay float32."""

    def __post_init__(self) -> None:
        require_counts(self, "steps", "batch_size")
        require_choices(self)
        _require(self, _WHOLE_NUMBER, "warmup_steps")
        _require(self, _ABOVE_ZERO, "learning_rate", "clip_norm")
        _require(self, _ZERO_OR_MORE, "weight_decay")
        _require(self, _FRACTION, "final_lr_ratio")
        _require(self, _BELOW_ONE, "hold", "ema")
        betas: Any = self.betas
        if not (isinstance(betas, tuple) and len(betas) == 2 and all(_fits(beta, _BELOW_ONE) for beta in betas)):
            raise UsageError(f"betas is {betas!r}: give two fractions from 0 to less than 1")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The byte-pair vocabulary, learned from the captions."""

    vocab_size: int = 1024
    """Largest number of tokens; 514 of them are bytes and markers."""
    max_length: int = 32
    """Tokens of a prompt, BOS and EOS included; 77 for Stable Diffusion 1.5."""

    def __post_init__(self) -> None:
        require_counts(self, "vocab_size", "max_length")
        if self.vocab_size < MIN_VOCABULARY:
            raise UsageError(f"vocab_size is {self.vocab_size}: give {MIN_VOCABULARY} (bytes and markers) or more")
        if self.max_length < 3:
            raise UsageError(f"max_length is {self.max_length}: give 3 (BOS, a token, EOS) or more")


@dataclass(frozen=True, kw_only=True)
class TextStageConfig:
    """The text encoder, trained by a contrastive loss against images and by a sketch loss."""

    width: int = 96
    """Width of the text embeddings."""
    layers: int = 2
    """Transformer layers."""
    heads: int = 4
    """Attention heads; they divide the width."""
    projection: int = 96
    """Width of the space that texts and images share."""
    text_lr_ratio: float = 0.1  # "The text encoder learns at a tenth of the rate"
    """The text encoder's learning rate, as a fraction of the image encoder's: at the full rate AdamW makes synonyms of
    words that the images cannot tell apart yet; Muon does not."""
    sketch: float = 5.0  # "The text encoder sketches"
    """Weight of the sketch loss beside the contrastive loss: the colours of 8×8 patches predicted from the text alone,
    the squared error as a fraction of their variance."""
    optim: OptimConfig

    def __post_init__(self) -> None:
        require_counts(self, "width", "layers", "heads", "projection")
        _require(self, _ZERO_OR_MORE, "text_lr_ratio", "sketch")
        if self.width % self.heads:
            raise UsageError(f"width is {self.width}: give a multiple of heads, {self.heads}")
        if self.optim.batch_size < 2:
            raise UsageError(
                f"text.optim.batch_size is {self.optim.batch_size}: give 2 or more, the loss compares images of a batch"
            )


@dataclass(frozen=True, kw_only=True)
class VAEStageConfig:
    """The autoencoder and the weights of its losses, each a mean over pixels in [-1, 1]."""

    # The weights: "The VAE's loss, and its noise"
    preset: Literal["nano", "tiny", "small", "sd15"] = "nano"
    """Size of the autoencoder."""
    mse: float = 4.0
    """Weight of the squared error."""
    coarse_mse: float = 4.0
    """Weight of the squared error of means over 4×4 pixels, which carry colour."""
    edges: float = 1.0
    """Weight of the squared error of differences between neighbouring pixels."""
    l1: float = 0.1
    """Weight of the absolute error."""
    kl: float = 1e-7
    """Weight of the KL divergence, summed over the latents of an image."""
    latent_noise: float = 0.0  # "Noise in the latents does not matter to the decoder"
    """Noise added before decoding, as a fraction of each latent channel's standard deviation, so that the decoder
    learns to tolerate the U-Net's errors."""
    optim: OptimConfig

    def __post_init__(self) -> None:
        require_choices(self)
        _require(self, _ZERO_OR_MORE, "mse", "coarse_mse", "edges", "l1", "kl", "latent_noise")


@dataclass(frozen=True, kw_only=True)
class UNetStageConfig:
    """The U-Net and its diffusion loss."""

    preset: Literal["nano", "tiny", "small", "sd15"] = "nano"
    """Size of the U-Net."""
    prediction: Literal["epsilon", "v_prediction"] = "v_prediction"
    """epsilon: the U-Net predicts the noise; v_prediction: the velocity."""
    zero_terminal_snr: bool = True  # with epsilon it is refused: "ε-prediction with zero terminal SNR is refused"
    """Rescale the noise schedule so that its last timestep is pure noise."""
    caption_dropout: float = 0.1  # as Stable Diffusion 1.5 was trained
    """Fraction of captions replaced by the empty one, for classifier-free guidance."""
    train_text_encoder: bool = False  # "Timesteps shifted towards noise": after sketching it need not be
    """Train the text encoder by the U-Net's loss too; otherwise it is frozen."""
    text_lr_ratio: float = 0.3  # "The text encoder learns with the U-Net"
    """The text encoder's learning rate if it is trained, as a fraction of the U-Net's."""
    timestep_shift: float = 3.0  # "Timesteps shifted towards noise"
    """Shift of the sampled timesteps towards noise, where the layout is settled: half of them are beyond
    shift / (1 + shift) of the schedule. 1 samples them uniformly."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    optim: OptimConfig

    def __post_init__(self) -> None:
        require_choices(self)
        _require(self, _FRACTION, "caption_dropout")
        _require(self, _ZERO_OR_MORE, "text_lr_ratio")
        _require(self, _ABOVE_ZERO, "timestep_shift")
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise UsageError(
                "zero_terminal_snr needs prediction v_prediction: in pure noise there is no epsilon to learn from"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The complete configuration of a training run, apart from the folder that it is written to.

    Start from a preset and change fields: ``dataclasses.replace(find_preset("nano"), seed=1)``.
    """

    seed: int = 0
    """Another seed gives other scenes, weights and noise."""
    device: str = "auto"
    """auto, cpu, cuda, mps."""
    save_every: int = 500
    """Steps between checkpoints."""
    sample_every: int = 1000
    """Steps between sample grids."""
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    text: TextStageConfig
    vae: VAEStageConfig
    unet: UNetStageConfig
    recommended: Recommended = field(default_factory=lambda: Recommended(steps=20, guidance=3.0))

    def __post_init__(self) -> None:
        require_counts(self, "save_every", "sample_every")
        _require(self, _WHOLE_NUMBER, "seed")
        find_sampler(self.recommended.sampler)
        try:
            require_counts(self.recommended, "steps")
            _require(self.recommended, _ZERO_OR_MORE, "guidance")
            _require(self.recommended, _FRACTION, "guidance_rescale")
        except UsageError as error:
            raise UsageError(f"recommended.{error}") from None


def nano() -> TrainConfig:
    """A model of 5 shapes and 6 colours, 1.4 million parameters: about 13 minutes on two CPU cores."""
    return TrainConfig(
        # Steps: "How long nano trains". bfloat16: "Plain attention for training in bfloat16 on a CPU".
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
    """The model that ships: seven shapes, ten colours, counts and relations, 7.5 million parameters."""
    return TrainConfig(
        data=DataConfig(world="core", count=64_000),
        tokenizer=TokenizerConfig(vocab_size=768),
        text=TextStageConfig(
            width=192,
            layers=4,
            projection=192,
            # Full rate, Muon, 204,800 pairs: "The text encoder sketches"
            text_lr_ratio=1.0,
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
            # Steps: "Noise in the latents does not matter to the decoder"
            optim=OptimConfig(
                steps=2400, batch_size=16, learning_rate=2e-3, ema=0.99, weight_decay=0.0, precision="bfloat16"
            ),
        ),
        unet=UNetStageConfig(
            preset="tiny",
            # Muon, rate and batch: "Muon for tiny's U-Net". Steps: "The sampling mix, and noise while painting".
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
        # ddpm: "The sampling mix, and noise while painting". Guidance: "The long run with both".
        recommended=Recommended(sampler="ddpm", steps=25, guidance=3.0),
    )


TRAINING_PRESETS: dict[str, Callable[[], TrainConfig]] = {"nano": nano, "tiny": tiny}


def find_preset(name: str) -> TrainConfig:
    """Make the configuration of a preset: nano or tiny.

    Raises :class:`UsageError` with the choices for any other name.
    """
    if name not in TRAINING_PRESETS:
        raise UsageError(f"unknown preset {name!r}: the choices are {', '.join(TRAINING_PRESETS)}")
    return TRAINING_PRESETS[name]()
