"""Presets of training: functions that return a complete configuration, from scratch or from a model.

Names in quotes are headings of ``docs/decisions.md``.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any, Literal, overload

from gobelin.errors import UsageError
from gobelin.training.config import (
    DataConfig,
    DiffusionConfig,
    OptimConfig,
    SamplingConfig,
    TextStageConfig,
    TokenizerConfig,
    TrainConfig,
    UNetStageConfig,
    VAELossConfig,
    VAEStageConfig,
)
from gobelin.training.fine_tune_config import FineTuneConfig


def nano() -> TrainConfig:
    """A model of 5 shapes and 6 colours, 1.4 million parameters: about 13 minutes on two CPU cores."""
    return TrainConfig(
        # Steps: "How long nano trains". bfloat16: "Plain attention for training in bfloat16 on a CPU".
        text=TextStageConfig(
            optim=OptimConfig(
                steps=280, batch_size=128, learning_rate=2e-3, warmup_steps=40, ema=0.98, precision="auto"
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
                precision="auto",
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
                precision="auto",
            ),
        ),
        vae=VAEStageConfig(
            preset="tiny",
            # Steps: "Noise in the latents does not matter to the decoder"
            optim=OptimConfig(
                steps=2400, batch_size=16, learning_rate=2e-3, ema=0.99, weight_decay=0.0, precision="auto"
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
                precision="auto",
            ),
        ),
        # ddpm: "The sampling mix, and noise while painting". Guidance: "The long run with both".
        recommended=SamplingConfig(sampler="ddpm", steps=25, guidance=3.0),
    )


def emoji() -> TrainConfig:
    """The model of emoji that ships: 1,390 concepts in five styles, from the folder that gobelin data emoji writes."""
    base = tiny()
    text, vae, unet = (stage.optim for stage in (base.text, base.vae, base.unet))
    return replace(
        base,
        # All images are trained on: what is held out is in a folder of its own.
        data=DataConfig(path="emoji-set/train", validation=0),
        tokenizer=TokenizerConfig(vocab_size=2048),
        text=replace(base.text, optim=replace(text, steps=400, warmup_steps=40, ema=0.98)),
        vae=replace(base.vae, optim=replace(vae, steps=1600)),
        # Widths: "Emoji: a U-Net that is wide where it is cheap"
        unet=replace(base.unet, preset="emoji", timestep_shift=2.0, optim=replace(unet, steps=3200, hold=0.5)),
    )


def _fine_tuning(**changes: Any) -> FineTuneConfig:
    """Make the defaults of training from a model; rates are the usual ones for Stable Diffusion 1.5."""
    config = FineTuneConfig(
        save_every=250,
        sample_every=250,
        samples=4,  # each takes a minute at Stable Diffusion's size on a CPU
        vae=VAELossConfig(optim=OptimConfig(steps=1000, batch_size=4, learning_rate=1e-4, precision="auto")),
        # Uniform timesteps, as the model was trained with; a shorter average than from scratch, as are the runs.
        unet=DiffusionConfig(
            timestep_shift=1.0,
            optim=OptimConfig(
                steps=1000, batch_size=4, learning_rate=1e-5, betas=(0.9, 0.999), ema=0.99, hold=0.8, precision="auto"
            ),
        ),
    )
    return replace(config, **changes)


def finetune() -> FineTuneConfig:
    """The whole U-Net of a model, on one's own images."""
    return _fine_tuning()


def lora() -> FineTuneConfig:
    """A LoRA: a small file beside a model that stays as it is."""
    made = _fine_tuning(method="adapter")
    return replace(made, unet=replace(made.unet, optim=replace(made.unet.optim, learning_rate=1e-4)))


def textual_inversion() -> FineTuneConfig:
    """A new word for what a few images show; nothing else changes."""
    made = _fine_tuning(method="textual_inversion")
    optim = replace(made.unet.optim, learning_rate=5e-3, weight_decay=0.0)
    return replace(made, unet=replace(made.unet, caption_dropout=0.0, optim=optim))


def dreambooth() -> FineTuneConfig:
    """The U-Net and text encoder on a few images of one thing; add --prior.prompts or --prior.path to keep the rest."""
    made = _fine_tuning()
    optim = replace(made.unet.optim, learning_rate=2e-6)
    return replace(made, unet=replace(made.unet, train_text_encoder=True, text_lr_ratio=1.0, optim=optim))


def inpainting() -> FineTuneConfig:
    """A U-Net with nine channels, that sees the masked image and the mask."""
    return _fine_tuning(method="inpainting", data=DataConfig(validation=0))


def vae() -> FineTuneConfig:
    """The decoder of a model's autoencoder; the U-Net goes on with it as it is."""
    return _fine_tuning(method="vae", samples=8, data=DataConfig(validation=0))


TRAINING_PRESETS: dict[str, Callable[[], TrainConfig | FineTuneConfig]] = {
    "nano": nano,
    "tiny": tiny,
    "emoji": emoji,
    "finetune": finetune,
    "lora": lora,
    "textual-inversion": textual_inversion,
    "dreambooth": dreambooth,
    "inpainting": inpainting,
    "vae": vae,
}


FROM_SCRATCH = ("nano", "tiny", "emoji")
"""The presets of training from scratch; the others start from a model."""


def preset_of(method: str) -> str:
    """Name the preset that a configuration of a method starts from where none is named."""
    return {"full": "finetune", "adapter": "lora", "textual_inversion": "textual-inversion"}.get(method, method)


def refuse_without_effect(config: TrainConfig | FineTuneConfig) -> None:
    """Raise :class:`UsageError` for a setting that is in no preset and that this run would not read."""
    if not config.unet.train_text_encoder:
        _refuse_changed(config, "unet.text_lr_ratio", "the text encoder is not trained with the U-Net")
    if isinstance(config, FineTuneConfig):
        _refuse_changed(config, "unet" if config.method == "vae" else "vae", f"the method is {config.method}")
        _refuse_changed(config, "vae.kl", "the encoder stays as it is")


def refuse_scenes_of_folder(config: TrainConfig | FineTuneConfig) -> None:
    """Raise :class:`UsageError` for settings of scenes where images are read from a folder."""
    if config.data.path is not None:
        for name in ("data.world", "data.count"):
            _refuse_changed(config, name, "images are read from data.path")
        _refuse_changed(config, "unet.grounding", "images of a folder have no masks")


def _refuse_changed(config: TrainConfig | FineTuneConfig, section: str, reason: str) -> None:
    """Raise :class:`UsageError` for a value of a section that no preset has, for a ``reason`` why nothing reads it."""
    presets = [dict(_leaves(asdict(make()))) for make in TRAINING_PRESETS.values()]
    for name, value in _leaves(asdict(config)):
        if f"{name}.".startswith(f"{section}.") and value not in [one.get(name) for one in presets]:
            raise UsageError(f"{name} is {value!r} and would have no effect, as {reason}: leave it out")


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """List the values of nested tables by their dotted names."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


@overload
def find_preset(name: Literal["nano", "tiny", "emoji"]) -> TrainConfig: ...
@overload
def find_preset(
    name: Literal["finetune", "lora", "textual-inversion", "dreambooth", "inpainting", "vae"],
) -> FineTuneConfig: ...
@overload
def find_preset(name: str) -> TrainConfig | FineTuneConfig: ...
def find_preset(name: str) -> TrainConfig | FineTuneConfig:
    """Make the configuration of a preset, of training from scratch (nano, tiny, emoji) or from a model (the others).

    Raises :class:`UsageError` with the choices for any other name.
    """
    if name not in TRAINING_PRESETS:
        raise UsageError(f"unknown preset {name!r}: the choices are {', '.join(TRAINING_PRESETS)}")
    return TRAINING_PRESETS[name]()
