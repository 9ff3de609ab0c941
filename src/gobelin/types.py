"""Tensor aliases: one name, one shape, one range, wherever a tensor of that kind appears.

The letters are jaxtyping's axis names: ``h`` and ``w`` are those of latents, ``height`` and ``width`` those of pixels.
"""

from jaxtyping import Bool, Float
from torch import Tensor

Images = Float[Tensor, "batch 3 height width"]
"""RGB images in [-1, 1]."""
Latents = Float[Tensor, "batch channels h w"]
"""Latents, clean or noisy; clean ones have about unit variance."""
TextEmbeddings = Float[Tensor, "batch length width"]
"""The text encoder's output: 77 × 768 a prompt in Stable Diffusion 1.5, or several times 77."""
TextMask = Bool[Tensor, "batch length"]
"""True where a token may be attended to."""
Mask = Float[Tensor, "batch 1 height width"]
"""1 where an image is inpainted, 0 where it stays."""
