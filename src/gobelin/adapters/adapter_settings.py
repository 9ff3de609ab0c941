"""Settings of an adapter that is trained: its kind, its size, its layers, and the layout that it is written in."""

from dataclasses import dataclass
from typing import Literal

from gobelin.errors import UsageError
from gobelin.validation import Count, PositiveNumber, validate_fields

Targets = Literal["attention", "transformer", "all"]
AdapterLayout = Literal["kohya", "diffusers", "peft"]


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The kind and size of an adapter, and the layers that it changes."""

    kind: Literal["lora", "loha", "lokr"] = "lora"
    """lora: a product of two matrices; loha: the Hadamard product of two such; lokr: a Kronecker product."""
    rank: Count = 16
    """Rank of the matrices, of convolutions too. It may exceed a layer's widths, as in kohya's, PEFT's and LyCORIS'
    adapters; a LoKr keeps its large matrix whole where the rank is half of its longer side or more."""
    alpha: PositiveNumber | None = None
    """The change is multiplied by alpha / rank; None: by 1, and so is that of a LoKr whose matrices are whole."""
    targets: Targets = "attention"
    """attention: queries, keys, values and outputs; transformer: all of the transformer blocks, their projections in
    and out and feed-forward layers too; all: residual blocks and samplers besides. A text encoder has no more than its
    transformer."""
    factor: Count | None = None
    """Of a LoKr, the size of its small matrix, or the next smaller divisor of a layer's widths; None: their largest
    divisors up to the square root."""

    def __post_init__(self) -> None:
        validate_fields(self)
        if self.factor is not None and self.kind != "lokr":
            raise UsageError(f"factor is {self.factor}, and the adapter a {self.kind}: only a lokr has a factor")

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank
