"""Changes of one layer's weight that adapters learn: LoRA, LoHa and LoKr, from few numbers to ΔW.

LoRA is Hu et al. 2021 (arXiv 2106.09685); LoHa is FedPara's Hadamard product (Hyeon-Woo et al. 2021, arXiv 2108.06098)
and LoKr a Kronecker product (Edalati et al. 2022, arXiv 2212.10650), both as LyCORIS (Yeh et al. 2023, arXiv
2309.14859) has them. Names and shapes of tensors are those of its ``lycoris/modules/{locon,loha,lokr}.py``.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from gobelin.errors import ModelError

Factors = tuple[Tensor, ...]
"""A matrix [out, in, …]: itself; a [out, rank] and b [rank, in, …], whose product it is; or, for Tucker's, a
[rank, out], b [rank, in] and the core [rank, rank, height, width]."""

_LORA = ("lora_up.weight", "lora_down.weight", "lora_mid.weight")
_HADA = {number: (f"hada_w{number}_a", f"hada_w{number}_b", f"hada_t{number}") for number in (1, 2)}
_LOKR_WHOLE = {1: "lokr_w1", 2: "lokr_w2"}
_LOKR = {1: ("lokr_w1_a", "lokr_w1_b"), 2: ("lokr_w2_a", "lokr_w2_b", "lokr_t2")}
DELTA_TENSORS = (*_LORA, *_HADA[1], *_HADA[2], *_LOKR_WHOLE.values(), *_LOKR[1], *_LOKR[2])
"""The names of every tensor that a delta can have, below the name of its layer."""


@dataclass(frozen=True, kw_only=True)
class WeightDelta(ABC):
    """The change ΔW of one layer's weight, by ``scale``, from tensors of a low rank."""

    kind: ClassVar[str]
    scale: float

    @property
    @abstractmethod
    def rank(self) -> int | None:
        """The rank that alpha is divided by; None where nothing of a low rank is left."""

    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Return the shape of :meth:`delta_weight` without computing it."""

    @abstractmethod
    def delta_weight(self) -> Tensor:
        """Compute ΔW in float32: [out, in] for a linear layer, [out, in, height, width] for a convolution.

        A convolution's LoHa or LoKr may be [out, in · height · width].
        """

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return its tensors by the names that kohya's sd-scripts and LyCORIS give them, without alpha."""

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Tell whether it changes a weight of that ``shape``; a linear layer counts as 1×1."""
        given, expected = (one + (1,) * (4 - len(one)) for one in (self.shape(), shape))
        return given == expected


@dataclass(frozen=True, kw_only=True)
class LoraDelta(WeightDelta):
    """LoRA's change: ΔW = scale · up · (mid ·) down.

    ``down`` is [rank, in, …], ``up`` [out, rank, …] and ``mid``, of convolutions alone, [rank, rank, height, width].
    """

    kind: ClassVar[str] = "LoRA"
    down: Tensor
    up: Tensor
    mid: Tensor | None = None

    @property
    def rank(self) -> int:
        return len(self.down)

    def shape(self) -> tuple[int, ...]:
        middle = self.down if self.mid is None else self.mid
        return (len(self.up), self.down.shape[1], *middle.shape[2:])

    def delta_weight(self) -> Tensor:
        down, up = self.down.float(), self.up.float()
        if self.mid is not None:
            return self.scale * torch.einsum("or,rshw,si->oihw", up.flatten(1), self.mid.float(), down.flatten(1))
        product = self.scale * up.flatten(1) @ down.flatten(1)
        return product.reshape(len(up), *down.shape[1:])

    def tensors(self) -> dict[str, Tensor]:
        return _named(_LORA, (self.up, self.down) if self.mid is None else (self.up, self.down, self.mid))


@dataclass(frozen=True, kw_only=True)
class LohaDelta(WeightDelta):
    """LoHa's change: ΔW = scale · w1 ⊙ w2, the product number by number of two matrices of a low rank."""

    kind: ClassVar[str] = "LoHa"
    w1: Factors
    w2: Factors

    @property
    def rank(self) -> int:
        return len(self.w1[1])

    def shape(self) -> tuple[int, ...]:
        return _shape(self.w1)

    def delta_weight(self) -> Tensor:
        return self.scale * _multiplied(self.w1) * _multiplied(self.w2)

    def tensors(self) -> dict[str, Tensor]:
        return _named(_HADA[1], self.w1) | _named(_HADA[2], self.w2)

    def fits(self, shape: tuple[int, ...]) -> bool:
        return super().fits(shape) or super().fits(_flattened(shape))


@dataclass(frozen=True, kw_only=True)
class LokrDelta(WeightDelta):
    """LoKr's change: ΔW = scale · w1 ⊗ w2, the Kronecker product of two matrices, each whole or of a low rank.

    Where both are whole there is no rank, and the scale is 1 whatever alpha says (``lokr.py``, "use scale = 1").
    """

    kind: ClassVar[str] = "LoKr"
    w1: Factors
    w2: Factors

    @property
    def rank(self) -> int | None:
        return next((len(factors[1]) for factors in (self.w1, self.w2) if len(factors) > 1), None)

    def shape(self) -> tuple[int, ...]:
        (rows, columns), (more_rows, more_columns, *kernel) = _shape(self.w1), _shape(self.w2)
        return (rows * more_rows, columns * more_columns, *kernel)

    def delta_weight(self) -> Tensor:
        w1, w2 = _multiplied(self.w1), _multiplied(self.w2)
        return self.scale * torch.kron(w1.reshape(*w1.shape, *(1,) * (w2.ndim - 2)), w2.contiguous())

    def tensors(self) -> dict[str, Tensor]:
        sides = ((1, self.w1), (2, self.w2))
        return {
            name: tensor
            for side, factors in sides
            for name, tensor in _named((_LOKR_WHOLE[side],) if len(factors) == 1 else _LOKR[side], factors).items()
        }

    def fits(self, shape: tuple[int, ...]) -> bool:
        return super().fits(shape) or super().fits(_flattened(shape))


def make_delta(path: Path, names: Mapping[str, str], tensors: Mapping[str, Tensor]) -> WeightDelta:
    """Make the delta of one layer, at scale 1, of ``tensors`` by their names in :data:`DELTA_TENSORS`.

    ``names`` has those in the file, and perhaps an alpha's. Raises :class:`ModelError` that names ``path`` and the
    tensors, where one is missing or too many, holds NaN, infinity or whole numbers, or where their shapes do not fit
    each other.
    """
    _check_complete(path, names)
    _check_numbers(path, names, tensors)
    delta = _assemble(tensors)
    if not _fit_each_other(delta):
        shapes = ", ".join(f"{names[role]!r} {list(tensor.shape)}" for role, tensor in tensors.items())
        raise ModelError(f"{path} holds tensors whose shapes have no common rank: {shapes}")
    return delta


def _alternatives() -> list[frozenset[str]]:
    """List the sets of tensors that one layer can have."""
    matrix = [(_LOKR_WHOLE[1],), _LOKR[1]], [(_LOKR_WHOLE[2],), _LOKR[2][:2], _LOKR[2]]
    hada = [frozenset(_HADA[1][:count] + _HADA[2][:count]) for count in (2, 3)]
    return [frozenset(_LORA[:2]), frozenset(_LORA), *hada, *(frozenset(w1 + w2) for w1, w2 in product(*matrix))]


_ALTERNATIVES = _alternatives()


def _check_complete(path: Path, names: Mapping[str, str]) -> None:
    """Raise :class:`ModelError` for the first tensor that is missing beside others of its layer, or too many there."""
    found = names.keys() - {"alpha"}
    nearest = min(_ALTERNATIVES, key=lambda one: (len(found - one), len(one - found)))
    if missing := nearest - found:
        raise ModelError(f"{path} lacks the {min(missing)} that goes with {min(names.values())!r}")
    if extra := found - nearest:
        first, other = names[min(extra)], min(names[role] for role in nearest)
        raise ModelError(f"{path} holds {first!r} beside {other!r}, which one layer cannot both have")


def _check_numbers(path: Path, names: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Raise :class:`ModelError` for whole numbers, NaN and infinity."""
    for role, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ModelError(f"{path}: {names[role]!r} is of whole numbers: quantized LoRAs are not read")
        if not torch.isfinite(tensor.sum(dtype=torch.float32)):
            raise ModelError(f"{path}: {names[role]!r} holds NaN or infinity: the file is damaged, or its training was")


def _assemble(tensors: Mapping[str, Tensor]) -> WeightDelta:
    """Put the tensors of one layer, which are complete, in their places."""
    if _LORA[0] in tensors:
        return LoraDelta(down=tensors[_LORA[1]], up=tensors[_LORA[0]], mid=tensors.get(_LORA[2]), scale=1.0)
    if _HADA[1][0] in tensors:
        w1, w2 = (tuple(tensors[name] for name in _HADA[side] if name in tensors) for side in (1, 2))
        return LohaDelta(w1=w1, w2=w2, scale=1.0)
    w1, w2 = (tuple(tensors[name] for name in (_LOKR_WHOLE[side], *_LOKR[side]) if name in tensors) for side in (1, 2))
    return LokrDelta(w1=w1, w2=w2, scale=1.0)


def _fit_each_other(delta: WeightDelta) -> bool:
    """Tell whether a delta's tensors can be multiplied with each other."""
    if isinstance(delta, LoraDelta):
        down, up, mid = delta.down, delta.up, delta.mid
        fits = _is_matrix(down) and _is_matrix(up) and up.shape[1] == len(down) and set(up.shape[2:]) <= {1}
        if fits and mid is not None:
            return mid.ndim == 4 and mid.shape[:2] == (len(down), len(down)) and set(down.shape[2:]) <= {1}
        return fits
    assert isinstance(delta, LohaDelta | LokrDelta)
    sides = (delta.w1, delta.w2)
    if not all(_have_a_rank(factors) for factors in sides):
        return False
    ranks = {len(factors[1]) for factors in sides if len(factors) > 1}
    if isinstance(delta, LohaDelta):
        return len(ranks) == 1 and _shape(delta.w1) == _shape(delta.w2)
    return len(ranks) <= 1 and len(_shape(delta.w1)) == 2


def _is_matrix(tensor: Tensor) -> bool:
    return tensor.ndim in (2, 4) and tensor.numel() > 0


def _have_a_rank(factors: Factors) -> bool:
    """Tell whether the factors of one matrix have the shapes that :data:`Factors` says."""
    if not all(_is_matrix(one) for one in factors):
        return False
    if len(factors) == 1:
        return True
    a, b, *core = factors
    if core:
        return a.ndim == b.ndim == 2 and core[0].ndim == 4 and core[0].shape[:2] == (len(a), len(a)) == (len(b), len(b))
    return a.ndim == 2 and a.shape[1] == len(b)


def _shape(factors: Factors) -> tuple[int, ...]:
    """Return the shape of the factors' product."""
    if len(factors) == 1:
        return tuple(factors[0].shape)
    a, b, *core = factors
    return (a.shape[1], b.shape[1], *core[0].shape[2:]) if core else (len(a), *b.shape[1:])


def _multiplied(factors: Factors) -> Tensor:
    """Multiply the factors of one matrix, in float32 (Tucker's: ``rebuild_tucker`` in ``functional/general.py``)."""
    if len(factors) == 1:
        return factors[0].float()
    a, b, *core = (one.float() for one in factors)
    if core:
        return torch.einsum("rshw,ro,si->oihw", core[0], a, b)
    return (a @ b.flatten(1)).reshape(len(a), *b.shape[1:])


def _flattened(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a convolution's weight as a matrix, [out, in · height · width]."""
    return (shape[0], torch.Size(shape[1:]).numel())


def _named(names: Collection[str], tensors: Factors) -> dict[str, Tensor]:
    return dict(zip(names, tensors, strict=False))
