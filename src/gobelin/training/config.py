"""Configuration of a run, and of training from scratch: dataclasses; :mod:`gobelin.training.presets` fills them in.

Every value is checked when a configuration is made: :class:`UsageError` names the field and the values that it takes.
Names in quotes are headings of ``docs/decisions.md``.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from gobelin.errors import UsageError
from gobelin.formats.tokenizer_files import MIN_VOCABULARY
from gobelin.prompt_weighting import parse_weights
from gobelin.settings import Settings
from gobelin.validation import (
    Count,
    Fraction,
    FractionBelowOne,
    NonNegativeNumber,
    PositiveNumber,
    WholeNumber,
    validate_fields,
)

Precision: TypeAlias = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The captioned images to train on."""

    path: Annotated[str | None, "the name of a folder"] = None
    """A folder of captioned images; without one, procedural scenes are drawn."""
    caption_column: Annotated[str | None, "the name of a column"] = None
    """The column of the metadata with the captions; without it, text, caption or prompt, whichever is there."""
    world: str = "nano"
    """The world of scenes: nano, core or rich."""
    count: Count = 16_000
    """Number of scenes."""
    size: Count | None = None
    """Height and width of the images, in pixels, a multiple of 16; without one, the model's, from scratch 64."""
    buckets: bool = False
    """Keep images near their own aspect: sides that are multiples, with an area of at most size × size."""
    fit: Literal["crop", "pad"] = "crop"
    """crop: scale to cover, cut what protrudes from the centre; pad: scale to fit, fill up with the background."""
    background: Annotated[str, "a colour such as white or #808080"] = "white"
    """Colour behind transparent images, and of what is filled up."""
    flip: bool = False
    """Show half of the images mirrored. Captions that say left or right then say wrong things."""
    workers: Count = 2
    """Threads that read images."""
    cache: Annotated[str | None, "the name of a folder"] = None
    """A folder that keeps images, latents and text embeddings for several runs; without one, the run's own."""
    validation: WholeNumber = 64
    """Images that are held out of training, at most a tenth, to measure whether the model hears their captions; of
    scenes, others are drawn. 0 measures nothing."""

    def __post_init__(self) -> None:
        validate_fields(self)
        if self.size is not None and self.size % 16:
            raise UsageError(f"size is {self.size}: give a multiple of 16")
        refuse_empty_path(self.path)
        if self.path is None:
            plain = DataConfig(path="of images")
            for name in ("caption_column", "buckets", "fit", "background"):
                if getattr(self, name) != getattr(plain, name):
                    raise UsageError(f"{name} is {getattr(self, name)!r}, and scenes have none: give path, a folder")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer, learning rate schedule (warm-up, constant, half a cosine), and moving average of the weights."""

    steps: Count
    """Optimizer steps."""
    batch_size: Count
    """Images a step, over all processes."""
    accumulate: Count = 1
    """Parts that each process's share of a batch is divided into: the same result with less memory, slower."""
    learning_rate: PositiveNumber
    """The highest learning rate, reached after the warm-up."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for matrices and kernels between hidden layers, AdamW for all else."""
    warmup_steps: WholeNumber = 100
    """Steps over which the learning rate rises from 0."""
    hold: FractionBelowOne = 0.0
    """Fraction of the steps, warm-up included, before the learning rate begins to fall. A run can be made longer while
    it holds."""
    final_lr_ratio: Fraction = 0.02
    """Learning rate of the last step, as a fraction of the highest."""
    weight_decay: NonNegativeNumber = 0.01
    """Decoupled weight decay of matrices and kernels."""
    betas: Annotated[tuple[FractionBelowOne, FractionBelowOne], "two fractions from 0 to less than 1"] = (
        0.9,
        0.99,
    )  # .99 and not AdamW's .999, as usual for short runs; not measured
    """AdamW's decay of its first and second moments."""
    clip_norm: PositiveNumber = 1.0
    """Largest norm of all gradients together; larger ones are scaled down to it."""
    ema: FractionBelowOne = 0.999
    """Decay of the exponential moving average of the weights, which is what is saved and sampled."""
    compile: bool = False
    """Compile the module (torch.compile): minutes at the start, faster steps on GPUs and for long runs."""
    precision: Precision = "float32"
    """bfloat16: autocast; the weights stay float32. auto: bfloat16 on a device that multiplies it faster."""

    def __post_init__(self) -> None:
        validate_fields(self)
        if self.batch_size % self.accumulate:
            raise UsageError(f"accumulate is {self.accumulate}: give a divisor of batch_size, {self.batch_size}")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The byte-pair vocabulary, learned from the captions."""

    vocab_size: Count = 1024
    """Largest number of tokens; 514 of them are bytes and markers."""
    max_length: Count = 32
    """Tokens of a prompt, BOS and EOS included; 77 for Stable Diffusion 1.5."""

    def __post_init__(self) -> None:
        validate_fields(self)
        if self.vocab_size < MIN_VOCABULARY:
            raise UsageError(f"vocab_size is {self.vocab_size}: give {MIN_VOCABULARY} (bytes and markers) or more")
        if self.max_length < 3:
            raise UsageError(f"max_length is {self.max_length}: give 3 (BOS, a token, EOS) or more")


@dataclass(frozen=True, kw_only=True)
class TextStageConfig:
    """The text encoder, trained by a contrastive loss against images and by a sketch loss."""

    width: Count = 96
    """Width of the text embeddings."""
    layers: Count = 2
    """Transformer layers."""
    heads: Count = 4
    """Attention heads; they divide the width."""
    projection: Count = 96
    """Width of the space that texts and images share."""
    text_lr_ratio: NonNegativeNumber = 0.1  # "The text encoder learns at a tenth of the rate"
    """The text encoder's learning rate, as a fraction of the image encoder's: at the full rate AdamW makes synonyms of
    words that the images cannot tell apart yet; Muon does not."""
    sketch: NonNegativeNumber = 5.0  # "The text encoder sketches"
    """Weight of the sketch loss beside the contrastive loss: the colours of 8×8 patches predicted from the text alone,
    the squared error as a fraction of their variance."""
    optim: OptimConfig

    def __post_init__(self) -> None:
        validate_fields(self)
        if self.width % self.heads:
            raise UsageError(f"width is {self.width}: give a multiple of heads, {self.heads}")
        if self.optim.batch_size < 2:
            raise UsageError(
                f"text.optim.batch_size is {self.optim.batch_size}: give 2 or more, the loss compares images of a batch"
            )
        if self.optim.accumulate > 1:
            raise UsageError(
                f"text.optim.accumulate is {self.optim.accumulate}: give 1, the loss compares images of a batch"
            )


@dataclass(frozen=True, kw_only=True)
class VAELossConfig:
    """The weights of the autoencoder's losses, each a mean over pixels in [-1, 1], and its optimizer."""

    # The weights: "The VAE's loss, and its noise"
    mse: NonNegativeNumber = 4.0
    """Weight of the squared error."""
    coarse_mse: NonNegativeNumber = 4.0
    """Weight of the squared error of means over 4×4 pixels, which carry colour."""
    edges: NonNegativeNumber = 1.0
    """Weight of the squared error of differences between neighbouring pixels."""
    l1: NonNegativeNumber = 0.1
    """Weight of the absolute error."""
    kl: NonNegativeNumber = 1e-7
    """Weight of the KL divergence, summed over the latents of an image."""
    latent_noise: NonNegativeNumber = 0.0  # "Noise in the latents does not matter to the decoder"
    """Noise added before decoding, as a fraction of each latent channel's standard deviation, so that the decoder
    learns to tolerate the U-Net's errors."""
    optim: OptimConfig

    def __post_init__(self) -> None:
        validate_fields(self)


@dataclass(frozen=True, kw_only=True)
class VAEStageConfig(VAELossConfig):
    """The autoencoder and its losses."""

    preset: Literal["nano", "tiny", "small", "sd15"] = "nano"
    """Size of the autoencoder."""

    def __post_init__(self) -> None:
        validate_fields(self)


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The diffusion loss of a U-Net, and its optimizer."""

    caption_dropout: Fraction = 0.1  # as Stable Diffusion 1.5 was trained
    """Fraction of captions replaced by the empty one, for classifier-free guidance."""
    train_text_encoder: bool = False  # "Timesteps shifted towards noise": after sketching it need not be
    """Train the text encoder by the U-Net's loss too; otherwise it is frozen."""
    text_lr_ratio: NonNegativeNumber = 0.3  # "The text encoder learns with the U-Net"
    """The text encoder's learning rate if it is trained, as a fraction of the U-Net's."""
    timestep_shift: PositiveNumber = 3.0  # "Timesteps shifted towards noise"
    """Shift of the sampled timesteps towards noise, where the layout is settled: half of them are beyond
    shift / (1 + shift) of the schedule. 1 samples them uniformly."""
    min_snr_gamma: Annotated[PositiveNumber | None, "a positive number"] = None
    """Weigh timesteps by min(SNR, gamma) in terms of the denoised latents (Hang et al. 2023, arXiv 2303.09556; 5
    there), so that those with little noise count less; without it all weigh alike."""
    offset_noise: Fraction = 0.0
    """Noise of each whole latent channel that is added to the noise, as a fraction of it: darker and lighter images."""
    grounding: NonNegativeNumber = 0.0
    """Weight of a loss that asks the attention of words to be on their objects, whose masks scenes have."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    optim: OptimConfig

    def __post_init__(self) -> None:
        validate_fields(self)


@dataclass(frozen=True, kw_only=True)
class UNetStageConfig(DiffusionConfig):
    """The U-Net and its diffusion loss."""

    preset: Literal["nano", "tiny", "emoji", "small", "sd15"] = "nano"
    """Size of the U-Net."""
    prediction: Literal["epsilon", "v_prediction"] = "v_prediction"
    """epsilon: the U-Net predicts the noise; v_prediction: the velocity."""
    half_size_steps: WholeNumber = 0  # "Half the size first"
    """Steps, the first ones, that train on images of half the height and width: each costs less, and what goes where is
    learned sooner; how things look is learned in the steps after them. Images that are sampled meanwhile are poor."""
    zero_terminal_snr: bool = True  # with epsilon it is refused: "ε-prediction with zero terminal SNR is refused"
    """Rescale the noise schedule so that its last timestep is pure noise."""

    def __post_init__(self) -> None:
        validate_fields(self)
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise UsageError(
                "zero_terminal_snr needs prediction v_prediction: in pure noise there is no epsilon to learn from"
            )
        if self.half_size_steps >= self.optim.steps:
            raise UsageError(
                f"half_size_steps is {self.half_size_steps}, of {self.optim.steps} steps in all: give fewer, as the "
                "last are to be at full size"
            )


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Sampling while a model trains, which it recommends afterwards."""

    sampler: str = "dpmpp_2m"
    """Sampler, as in gobelin generate."""
    steps: int = 20
    """Denoising steps."""
    guidance: float = 3.0
    """Classifier-free guidance scale."""
    guidance_rescale: float = 0.0
    """Guidance rescale, 0 to 1."""

    def __post_init__(self) -> None:
        self.settings()

    def settings(self) -> Settings:
        """Return the same as settings of an image; raises :class:`UsageError` for what cannot be sampled."""
        return Settings(**asdict(self))


def config_file(out: Path) -> Path:
    """Name the file that records a run's configuration."""
    return out / "training" / "config.json"


def refuse_empty_path(path: str | None) -> None:
    """Raise :class:`UsageError` for a path without a letter, which would be the folder that one is in."""
    if path == "":
        raise UsageError("path is '': give the name of a folder, . for this one")


def check_prompts(name: str, prompts: tuple[str, ...]) -> None:
    """Raise :class:`UsageError` for what cannot be painted, which would else be found when a run has begun."""
    for prompt in prompts:
        try:
            if not prompt.strip():
                raise UsageError("one is empty: say what to paint")
            parse_weights(prompt)
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings of every training run: its seed and device, when it saves and samples, and its data."""

    seed: WholeNumber = 0
    """Another seed gives other scenes, weights and noise."""
    device: str = "auto"
    """auto, cpu, cuda, mps."""
    parallelism: Literal["ddp", "fsdp"] = "ddp"
    """What several processes share: ddp, the batch; fsdp, the weights too, so that each holds a part of them."""
    save_every: Count = 500
    """Steps between checkpoints."""
    sample_every: Count = 1000
    """Steps between sheets of samples, and measurements."""
    sample_prompts: Annotated[tuple[str, ...], "a list of prompts"] = ()
    """Prompts to sample while training; without any, captions of the data."""
    samples: WholeNumber = 24
    """Captions of the data that are sampled where no prompts are given; 0 samples none."""
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Where metrics and sheets are also sent."""
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        validate_fields(self)
        check_prompts("sample_prompts", self.sample_prompts)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """The complete configuration of training from scratch, apart from the folder that it is written to.

    Start from a preset and change fields: ``dataclasses.replace(find_preset("nano"), seed=1)``.
    """

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    text: TextStageConfig
    vae: VAEStageConfig
    unet: UNetStageConfig
    recommended: SamplingConfig = field(default_factory=SamplingConfig)
