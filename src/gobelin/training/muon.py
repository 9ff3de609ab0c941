"""Muon: steps of equal length in every direction that a matrix can move.

Keller Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks", whose coefficients these are. A
kernel [out, in, height, width] is a matrix [out, in · height · width]; torch's own ``torch.optim.Muon`` takes none.
"""

import torch
from torch import Tensor, nn

STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal, and scaled to the size that an AdamW step has (Liu et al. 2025, arXiv 2502.16982).

    So a learning rate means what it means for AdamW. Parameters are matrices or kernels.
    """

    def __init__(self, params: object, lr: float, weight_decay: float = 0.0, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})  # type: ignore[arg-type]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step, with Nesterov's momentum."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter.grad)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                direction = parameter.grad.lerp(state["momentum"], group["momentum"]).flatten(1)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                step = orthogonal(direction) * (0.2 * max(direction.shape) ** 0.5)
                parameter.add_(step.view_as(parameter), alpha=-group["lr"])


def orthogonal(matrix: Tensor) -> Tensor:
    """The matrix with the same singular vectors and singular values of about 1 (0.7 to 1.2), by Newton and Schulz.

    All factors are polynomials of the first Gram matrix, so that the steps need nothing larger than it. They are taken
    in float32: the Gram matrix of a matrix of low rank explodes in less.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    wide = (matrix.T if tall else matrix).float()
    wide = wide / wide.norm().clamp(min=1e-7)
    gram = wide @ wide.T
    product = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for _ in range(STEPS):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        product = factor @ product
        gram = factor @ gram @ factor
    wide = (product @ wide).to(matrix.dtype)
    return wide.T if tall else wide


def takes(module: nn.Module) -> set[str]:
    """The names of the parameters that Muon is for: matrices and kernels between hidden layers.

    Embeddings, and layers that begin or end in few channels, are better off with AdamW.
    """
    embeddings = {
        f"{name}.{part}".lstrip(".")
        for name, child in module.named_modules()
        if isinstance(child, nn.Embedding)
        for part, _ in child.named_parameters(recurse=False)
    }
    return {
        name
        for name, parameter in module.named_parameters()
        if parameter.ndim >= 2 and min(parameter.shape[:2]) >= 16 and name not in embeddings
    }
