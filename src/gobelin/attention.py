"""Scaled dot-product attention: the one operation by which words reach pixels.

Every attention in Gobelin, in the U-Net, the VAE and the text encoder, goes through :func:`attention`.
"""

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def attention(
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch heads keys width"],
    value: Float[Tensor, "batch heads keys width"],
    mask: Bool[Tensor, "batch #heads #queries keys"] | None = None,
    causal: bool = False,
) -> Float[Tensor, "batch heads queries width"]:
    """softmax(Q Kᵀ / √width) V, per head (Vaswani et al. 2017, equation 1).

    ``mask`` is True where a query may attend to a key: the field's convention, and the opposite of a
    ``masked_fill(mask, -inf)``. ``causal`` lets a query attend to itself and to what stands before it.
    """
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
