"""Write a Stable Diffusion 1.5 of random weights as one half-precision file of 2.1 GB, laid out as the original's.

    python scripts/random_sd15.py sd15.safetensors
    gobelin verify sd15.safetensors --tokenizer src/gobelin/models/tiny
    gobelin generate "a castle" --model sd15.safetensors --tokenizer src/gobelin/models/tiny --steps 2 --dtype bfloat16

What it paints is noise; what opening and painting take, in memory and time, is what a trained one takes.
"""

import sys
from pathlib import Path

import torch

from gobelin.checkpoint import Model
from gobelin.clip import TextEncoder, TextEncoderConfig
from gobelin.pipeline import Pipeline, shipped_model
from gobelin.schedule import NoiseSchedule
from gobelin.tokenizer import Tokenizer
from gobelin.unet import UNet, UNetConfig
from gobelin.vae import VAE, VAEConfig


def main() -> None:
    """The script."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    networks = UNet(UNetConfig.sd15()), VAE(VAEConfig.sd15()), TextEncoder(TextEncoderConfig.sd15())
    torch.set_default_dtype(torch.float32)
    unet, vae, text_encoder = networks
    model = Model(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=Tokenizer.from_pretrained(shipped_model() / "tokenizer"),
        schedule=NoiseSchedule(),
    )
    Pipeline(model).save_single_file(Path(sys.argv[1]), torch.float16)


if __name__ == "__main__":
    main()
