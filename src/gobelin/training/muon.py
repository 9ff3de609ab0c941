"""Muon optimizer: momentum, orthogonalised, so that a step has equal length in every direction of a matrix.

Keller Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". A convolution kernel
[out, in, height, width] is treated as a matrix [out, in · height · width]; ``torch.optim.Muon`` takes no kernels.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

_NEWTON_SCHULZ_STEPS = 5  # Jordan's: singular values land in 0.7 to 1.2, which is near enough to 1 for training
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's: the steepest at 0 that keep them in that range
_ADAMW_RMS = 0.2  # root mean square of AdamW's usual step, in learning rates (Liu et al. 2025)
_MIN_WIDTH = 16  # leaves the 3, 4 or 8 channels of images and latents to AdamW


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay, for matrices and convolution kernels.

    Steps are scaled to the root mean square of AdamW's (Liu et al. 2025, arXiv 2502.16982), so that one learning rate
    serves both.
    """

    def __init__(self, params: object, lr: float, weight_decay: float = 0.0, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})  # type: ignore[arg-type]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter.grad)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                direction = parameter.grad.lerp(state["momentum"], group["momentum"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(_step(direction), alpha=-group["lr"])


def _step(direction: Tensor) -> Tensor:
    """Orthogonalise a matrix or kernel, scaled to AdamW's size; one in shards is gathered, as a shard tells nothing."""
    if isinstance(direction, DTensor):
        # Every process computes the same whole, so that taking its shard of it again moves nothing.
        whole = _step(direction.full_tensor())
        copies = DTensor.from_local(whole, direction.device_mesh, [Replicate()], run_check=False)
        return copies.redistribute(placements=direction.placements)
    matrix = direction.flatten(1)
    # An orthogonal matrix [m, n] has root mean square 1 / √max(m, n) ("Muon for tiny's U-Net").
    return (newton_schulz(matrix) * (_ADAMW_RMS * max(matrix.shape) ** 0.5)).view_as(direction)


def newton_schulz(matrix: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    """Orthogonalise a matrix by Newton-Schulz iteration: the same singular vectors, singular values of 0.7 to 1.2.

    All factors are polynomials of the first Gram matrix, so the iteration runs on that alone, a fifth to a third faster
    ("Two processes, one thread each; Muon by Gram matrices"). It runs in float32: in bfloat16 the Gram matrix of a
    matrix of low rank diverges.
    """
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    wide = (matrix.T if tall else matrix).float()
    wide = wide / wide.norm().clamp(min=1e-7)
    gram = wide @ wide.T
    product = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        product = factor @ product
        gram = factor @ gram @ factor
    wide = (product @ wide).to(matrix.dtype)
    return wide.T if tall else wide


def muon_parameters(module: nn.Module) -> set[str]:
    """Name the parameters to train with Muon: matrices and kernels between hidden layers.

    Embeddings, vectors, and layers with fewer than 16 input or output channels are left to AdamW, as Jordan advises.
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
        if parameter.ndim >= 2 and min(parameter.shape[:2]) >= _MIN_WIDTH and name not in embeddings
    }
