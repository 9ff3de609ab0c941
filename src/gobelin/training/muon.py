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
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            steps = _steps([self._direction(parameter, group["momentum"]) for parameter in parameters])
            for parameter, step in zip(parameters, steps, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(step, alpha=-group["lr"])

    def _direction(self, parameter: Tensor, momentum: float) -> Tensor:
        """Add the gradient to the momentum; returns Nesterov's direction."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter.grad)
        state["momentum"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(state["momentum"], momentum)


def _steps(directions: list[Tensor]) -> list[Tensor]:
    """Orthogonalise matrices and kernels, scaled to AdamW's size; those of one shape together."""
    steps: dict[int, Tensor] = {}
    by_shape: dict[torch.Size, list[int]] = {}
    for number, direction in enumerate(directions):
        if isinstance(direction, DTensor):
            steps[number] = _sharded_step(direction)
        else:
            by_shape.setdefault(direction.shape, []).append(number)
    for shape, numbers in by_shape.items():
        matrices = torch.stack([directions[number].flatten(1) for number in numbers])
        # An orthogonal matrix [m, n] has root mean square 1 / √max(m, n) ("Muon for tiny's U-Net").
        made = newton_schulz(matrices) * (_ADAMW_RMS * max(matrices.shape[1:]) ** 0.5)
        steps.update(zip(numbers, made.reshape(-1, *shape), strict=True))
    return [steps[number] for number in range(len(directions))]


def _sharded_step(direction: DTensor) -> DTensor:
    """Gather the shards, as one tells nothing: every process computes the whole, and takes its shard of it again."""
    (whole,) = _steps([direction.full_tensor()])
    copies = DTensor.from_local(whole, direction.device_mesh, [Replicate()], run_check=False)
    return copies.redistribute(placements=direction.placements)


def newton_schulz(matrices: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch m n"]:
    """Orthogonalise matrices by Newton-Schulz iteration: the same singular vectors, singular values of 0.7 to 1.2.

    All factors are polynomials of the first Gram matrix, so the iteration runs on that alone, a fifth to a third faster
    ("Two processes, one thread each; Muon by Gram matrices"). It runs in float32: in bfloat16 the Gram matrix of a
    matrix of low rank diverges.
    """
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    wide = (matrices.mT if tall else matrices).float()
    wide = wide / wide.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    gram = wide @ wide.mT
    product: Tensor | None = None
    for step in range(_NEWTON_SCHULZ_STEPS):
        factor = b * gram + c * (gram @ gram)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else factor @ product
        if step + 1 < _NEWTON_SCHULZ_STEPS:
            gram = factor @ gram @ factor
    assert product is not None
    wide = (product @ wide).to(matrices.dtype)
    return wide.mT if tall else wide


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
