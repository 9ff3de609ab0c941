"""A layer's result and gradients in bfloat16, by a kernel and by torch, beside float64."""

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn

ROUNDING = torch.finfo(torch.bfloat16).eps


def there_and_back(layer: Callable[..., Tensor], x: Tensor, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """The result and the gradients of input and parameters, of ``dtype``; parameters are float32 at least."""
    if isinstance(layer, nn.Module) and dtype == torch.float64:
        layer = deepcopy(layer).double()
    x = x.detach().to(dtype).requires_grad_()
    out = layer(x)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).bfloat16().to(dtype)
    parameters = list(layer.parameters()) if isinstance(layer, nn.Module) else []
    return [out.detach(), *torch.autograd.grad(out, [x, *parameters], grad)]


def assert_near(layer: Callable[..., Tensor], x: Tensor, plain: Callable[..., Tensor]) -> None:
    """No farther from float64 than rounding to bfloat16, nor than torch's own way."""
    exact = there_and_back(layer, x, torch.float64)
    for mine, theirs, truth in zip(there_and_back(layer, x), there_and_back(plain, x), exact, strict=True):
        assert mine.shape == truth.shape
        distance = (mine.double() - truth).norm()
        assert distance <= ROUNDING * truth.norm() + 1e-6
        assert distance <= 1.1 * (theirs.double() - truth).norm() + 1e-5 * truth.norm() + 1e-6
