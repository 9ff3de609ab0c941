"""Networks of random weights, made in seconds, and the same weights in diffusers' and transformers' modules."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gobelin.clip import TextEncoder, TextEncoderConfig
from gobelin.formats.component import Component
from gobelin.unet import UNet
from gobelin.unet_config import UNetConfig
from gobelin.vae import VAE, VAEConfig

_Network = TypeVar("_Network", bound=Component)
_ANY_EOS = 2  # as older configurations of CLIP have it, whatever their tokenizer
CONFIGS: Mapping[str, tuple[UNetConfig, int]] = {
    "nano": (UNetConfig.nano(), 32),
    "tiny": (UNetConfig.tiny(), 32),
    "sd15": (UNetConfig.sd15(), 77),
}
"""U-Nets by name, and the length of their texts in tokens."""


def random_unet(name: str, dtype: torch.dtype) -> UNet:
    """Make a U-Net of one of the ``CONFIGS``."""
    return _random(UNet, CONFIGS[name][0], dtype)


def random_vae(dtype: torch.dtype) -> VAE:
    """Make a VAE of Stable Diffusion 1.5's size."""
    return _random(VAE, VAEConfig.sd15(), dtype)


def random_text_encoder(dtype: torch.dtype) -> TextEncoder:
    """Make a text encoder of Stable Diffusion 1.5's size, for a tokenizer that ends texts with any token."""
    return _random(TextEncoder, replace(TextEncoderConfig.sd15(), eos_token_id=_ANY_EOS), dtype)


def _random(kind: type[_Network], config: Any, dtype: torch.dtype) -> _Network:
    """Make a network whose weights are the same in every precision: drawn in bfloat16, as PyTorch's layers draw them.

    A layer's are uniform up to 1/√fan-in; norms begin as they do.
    """
    with torch.device("meta"):
        network = kind(config)
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, Tensor] = {}
    for name, meta in network.state_dict().items():
        if meta.ndim < 2:
            value = torch.ones if name.endswith("weight") else torch.zeros
            weights[name] = value(meta.shape, dtype=dtype)
        else:
            bound = meta[0].numel() ** -0.5
            drawn = torch.empty(meta.shape, dtype=torch.bfloat16).uniform_(-bound, bound, generator=generator)
            weights[name] = drawn.to(dtype)
    network.load_state_dict(weights, assign=True)
    return network.eval().requires_grad_(False)


def diffusers_unet(unet: UNet) -> nn.Module:
    """Make diffusers' U-Net of the very same tensors."""
    from diffusers import UNet2DConditionModel  # pyright: ignore[reportPrivateImportUsage]

    return _twin(UNet2DConditionModel, unet)


def diffusers_vae(vae: VAE) -> nn.Module:
    """Make diffusers' VAE of the very same tensors."""
    from diffusers import AutoencoderKL  # pyright: ignore[reportPrivateImportUsage]

    return _twin(AutoencoderKL, vae)


def transformers_text_encoder(text_encoder: TextEncoder) -> nn.Module:
    """Make transformers' text encoder of the very same tensors."""
    from transformers import CLIPTextConfig, CLIPTextModel

    theirs = CLIPTextModel(CLIPTextConfig.from_dict(text_encoder.config_json()))
    theirs.load_state_dict(_named_as(theirs, text_encoder.state_dict()), assign=True)
    return theirs.eval().requires_grad_(False)


def _twin(kind: Any, network: Component) -> nn.Module:
    with torch.device("meta"):
        theirs = kind.from_config(network.config_json())
    theirs.load_state_dict(network.state_dict(), assign=True)
    return theirs.eval().requires_grad_(False)


def _named_as(module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name tensors as transformers' release that is there does: with ``text_model.`` before them, or without."""
    prefix = "text_model."
    if any(name.startswith(prefix) for name in module.state_dict()):
        return tensors
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
