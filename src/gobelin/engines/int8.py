"""The int8 engine: the eager one, with a U-Net that multiplies whole numbers of 8 bits on a CPU."""

import warnings
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch

from gobelin.engine_names import EngineName
from gobelin.engines.eager import EagerEngine, PreparedUNet
from gobelin.engines.engine import NoisePredictor, PaintingNetworks
from gobelin.engines.int8_weights import can_multiply_int8, pack_in_int8
from gobelin.engines.packed_weights import PackedWeights
from gobelin.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Int8Engine(EagerEngine):
    """Run a U-Net's linear layers and convolutions in int8 (:mod:`gobelin.engines.int8_weights`), the rest in bfloat16.

    Attention is the eager engine's, edits and traces included, and so is the VAE, whose rounding would be seen in every
    pixel. What gradients are asked of goes by the weights themselves.
    """

    name: ClassVar[EngineName] = "int8"
    _int8_weights: PackedWeights = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "_int8_weights", PackedWeights(self.model.unet, pack_in_int8))

    @classmethod
    def of(cls, model: PaintingNetworks) -> Self:
        """Make an engine; raises :class:`UsageError` for networks elsewhere than on the CPU, and not in bfloat16."""
        unet = model.unet
        if unet.device.type != "cpu":
            raise UsageError(f"the engine {cls.name} runs on the CPU, and the model is on {unet.device}: move it")
        if unet.dtype != torch.bfloat16:
            said = str(unet.dtype).removeprefix("torch.")
            raise UsageError(
                f"the engine {cls.name} runs models in bfloat16, and this one is in {said}: give that dtype"
            )
        return cls(model=model)

    @property
    def unet(self) -> NoisePredictor:
        """The U-Net, its weights rounded as they are now; as the eager engine's where there is no memory for them."""
        rounded = PreparedUNet(self.model.unet, self._int8_weights).updated()
        if self._int8_weights:
            return rounded
        warnings.warn(f"there is no memory for the weights of the engine {self.name}: it is as eager", stacklevel=2)
        return super().unet


def require_int8() -> None:
    """Raise :class:`UsageError` where the CPU, or PyTorch, does not multiply int8."""
    if not can_multiply_int8():
        raise UsageError("the engine int8 needs a CPU with AVX-512's VNNI and BF16, and PyTorch with oneDNN: use eager")
