"""A convolution by a weight that is packed ahead of time, for the size of the map that comes in."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


class PackedConvolution:
    """A convolution without gradients, whose weight lies as oneDNN reads it for maps of the last size that came in.

    That order depends on the size. A weight in another one is put in order at every call, which on a CPU with AVX2
    takes up to fifty times as long as the convolution. To pack it anew from the layer's own takes as long as two.

    ``weight_of`` returns the layer's own weight, and ``sizes`` are padding, stride, dilation and groups.
    """

    def __init__(self, weight_of: Callable[[], Tensor], *sizes: tuple[int, ...] | int):
        self._weight_of = weight_of
        self._sizes = sizes
        self._packed: tuple[torch.Size, Tensor] | None = None

    def __call__(
        self, hidden: Float[Tensor, "batch in height width"], bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, "batch out _height _width"]:
        """Convolve a map."""
        packed = self._packed
        if packed is None or packed[0] != hidden.shape:
            weight = self._weight_of().contiguous().to_mkldnn()
            ordered = torch.ops.aten.mkldnn_reorder_conv2d_weight(weight, *self._sizes, list(hidden.shape))
            packed = self._packed = hidden.shape, ordered  # by one write: other threads may convolve, too
        return torch.ops.mkldnn._convolution_pointwise(hidden, packed[1], bias, *self._sizes, "none", [], "")
