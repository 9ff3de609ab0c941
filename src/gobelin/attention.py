"""Scaled dot-product attention: the one operation by which words reach pixels.

Every attention in Gobelin, in the U-Net, the VAE and the text encoder, goes through :func:`attention`.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def attention(
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch heads keys width"],
    value: Float[Tensor, "batch heads keys width"],
    mask: Bool[Tensor, "#batch #heads #queries keys"] | None = None,
    causal: bool = False,
) -> Float[Tensor, "batch heads queries width"]:
    """softmax(Q Kᵀ / √width) V, per head (Vaswani et al. 2017, equation 1).

    ``mask`` is True where a query may attend to a key: the field's convention, and the opposite of a
    ``masked_fill(mask, -inf)``. ``causal`` lets a query attend to itself and to what stands before it.
    """
    if _trains_in_bfloat16_on_cpu(query) and mask is None and not causal:
        return torch.softmax(query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2), dim=-1) @ value
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)


def _trains_in_bfloat16_on_cpu(query: Tensor) -> bool:
    """Where the fused kernel and its backward are slow: the plain product made a nano step 1.5 times as fast."""
    return query.requires_grad and query.dtype == torch.bfloat16 and query.device.type == "cpu"
