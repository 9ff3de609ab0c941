"""A model: its networks, tokenizer and noise schedule, and the settings that it recommends."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gobelin.clip import TextEncoder
from gobelin.errors import ModelError, UsageError
from gobelin.head_weights import HeadWeights
from gobelin.schedule import NoiseSchedule
from gobelin.settings import Settings
from gobelin.tokenizer import EOS, Tokenizer
from gobelin.unet import UNet
from gobelin.vae import VAE
from gobelin.validation import shown

NETWORKS = ("unet", "vae", "text_encoder")  # of a model, by the names of their folders
RECOMMENDED = Settings(sampler="dpmpp_2m", steps=25, guidance=7.5, guidance_rescale=0.0)
"""Settings for a model that recommends none."""
_RECOMMENDABLE = (
    *("sampler", "steps", "guidance", "guidance_rescale", "clip_skip", "negative_prompt", "height", "width"),
    "weights",
)


def recommended_from_json(content: dict[str, Any], source: Path) -> Settings:
    """Read the settings that a model recommends, the rest being :data:`RECOMMENDED`; other fields are left alone.

    Raises :class:`ModelError` for one that no image could be painted with, and for one that is not a model's to
    recommend, such as a file to open.
    """
    given = [field.name for field in dataclasses.fields(Settings) if field.name in content]
    if others := [name for name in given if name not in _RECOMMENDABLE]:
        raise ModelError(f"{source}: {others[0]} is no setting that a model may recommend: take it out")
    try:
        return Settings(**{name: content[name] for name in given}).filled(RECOMMENDED)
    except UsageError as error:
        raise ModelError(f"{source}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Model:
    """Three networks, with the tokenizer and the noise schedule that they were trained with.

    ``world`` names the world of scenes that the model was trained on, if any; ``examples`` are prompts to begin with;
    ``pointing`` says how well its words' maps point, where its folder does, and ``head_weights`` make its sharp maps,
    where they were fitted. Raises :class:`ModelError` for parts that do not fit together.
    """

    unet: UNet
    vae: VAE
    text_encoder: TextEncoder
    tokenizer: Tokenizer
    schedule: NoiseSchedule
    recommended: Settings = RECOMMENDED
    world: str | None = None
    examples: tuple[str, ...] = ()
    pointing: dict[str, Any] | None = None
    head_weights: HeadWeights | None = None
    name: str = ""

    def __post_init__(self) -> None:
        text, unet, vae = self.text_encoder.config, self.unet.config, self.vae.config
        beyond = next((word for word, number in self.tokenizer.vocab.items() if number >= text.vocab_size), None)
        for fits, problem in (
            (
                self.tokenizer.max_length <= text.max_position_embeddings,
                "the tokenizer gives more tokens than the text encoder has places",
            ),
            (
                beyond is None,
                f"the tokenizer has {shown(beyond)}, and the text encoder, which knows {text.vocab_size:,} tokens, has "
                "none for it",
            ),
            (
                # Older configurations of CLIP say 2, which transformers passes over too.
                text.eos_token_id in (2, self.tokenizer.vocab[EOS]),
                f"the tokenizer ends a text with token {self.tokenizer.vocab[EOS]}, and the text encoder expects "
                f"{text.eos_token_id}",
            ),
            (
                unet.out_channels == vae.latent_channels,
                f"the U-Net predicts {unet.out_channels} channels, and the VAE's latents have {vae.latent_channels}",
            ),
            (vae.in_channels == vae.out_channels == 3, "the VAE is not one of images in red, green and blue"),
            (text.hidden_size == unet.cross_attention_dim, "the U-Net expects text embeddings of another width"),
            (
                # A U-Net that inpaints sees the latents, the masked image's latents and the mask.
                unet.in_channels in (vae.latent_channels, 2 * vae.latent_channels + 1),
                "the U-Net expects latents with other channels than the VAE's",
            ),
        ):
            if not fits:
                raise ModelError(f"the parts of this model do not belong together: {problem}")
