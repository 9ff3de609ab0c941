"""A small model of Stable Diffusion 1.5's kind with random weights, as diffusers and transformers make it."""

from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tests.conftest import fill_
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from gobelin.formats import ldm

WIDTHS = (32, 64, 64, 64)


def small_pipeline(words: Path, in_channels: int = 4) -> StableDiffusionPipeline:
    """diffusers' pipeline with the tokenizer in ``words`` and so many input channels of the U-Net."""
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=in_channels, block_out_channels=WIDTHS, cross_attention_dim=64
    )
    vae = AutoencoderKL(
        block_out_channels=WIDTHS,
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=64,
    )
    tokenizer = CLIPTokenizer.from_pretrained(words)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=1,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return StableDiffusionPipeline(
        unet=_calm(fill_(unet, 1)),
        vae=fill_(vae, 2),
        text_encoder=fill_(CLIPTextModel(text), 3),
        tokenizer=tokenizer,
        scheduler=PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _calm(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The U-Net with less to say: random ones make much of the last digits, step after step."""
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.3)
    return unet


def original_weights(oracle: StableDiffusionPipeline) -> dict[str, Tensor]:
    """The model's tensors under the names of the original code, which diffusers' converters take apart."""
    parts = (
        (oracle.unet, lambda keys: ldm.map_unet_keys(keys, 2)),
        (oracle.vae, lambda keys: ldm.map_vae_keys(keys, len(WIDTHS))),
        (oracle.text_encoder, lambda keys: ldm.map_text_keys([key.removeprefix("text_model.") for key in keys])),
    )
    weights = {}
    for module, names in parts:
        state = module.state_dict()
        originals = names(state.keys())
        for key, tensor in state.items():
            name = originals[key.removeprefix("text_model.")]
            if name.startswith(ldm.TEXT_PREFIX):
                name = name.replace(ldm.TEXT_PREFIX, f"{ldm.TEXT_PREFIX}text_model.")
            weights[name] = tensor[:, :, None, None] if ldm.is_vae_attention_weight(name) else tensor
    return {name: tensor.detach().clone() for name, tensor in weights.items()}


def differences(ours, oracle: StableDiffusionPipeline, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """The largest relative difference of each network's output from the oracle's, on the same inputs.

    In float64, what is left is how the weights were read and put together, and no processor's way of rounding.
    """
    generator = torch.Generator().manual_seed(5)
    channels = oracle.unet.config.in_channels
    latents = torch.randn(2, channels, 8, 6, generator=generator).to(dtype)
    embeddings = torch.randn(2, 16, 64, generator=generator).to(dtype)
    ids = ours.tokenizer(["a red circle", "blue"])
    times = torch.tensor([7.0, 801.0])
    parts = ("unet", "text_encoder", "vae")
    if dtype != torch.float32:
        ours, oracle = (
            SimpleNamespace(
                tokenizer=pipe.tokenizer, **{part: deepcopy(getattr(pipe, part)).to(dtype) for part in parts}
            )
            for pipe in (ours, oracle)
        )
    with torch.no_grad():
        pairs = {
            "unet": (ours.unet(latents, times, embeddings), oracle.unet(latents, times, embeddings).sample),
            "text_encoder": (ours.text_encoder(ids), oracle.text_encoder(ids).last_hidden_state),
            "decoder": (ours.vae.decode(latents[:, :4]), oracle.vae.decode(latents[:, :4]).sample),
            "encoder": (
                ours.vae.encode(images := torch.rand(1, 3, 32, 48, generator=generator).to(dtype)).mean,
                oracle.vae.encode(images).latent_dist.mean,
            ),
        }
    return {name: ((a - b).abs().max() / b.abs().max()).item() for name, (a, b) in pairs.items()}
