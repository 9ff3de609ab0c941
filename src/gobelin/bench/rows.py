"""The rows of a benchmark: what is measured, at which sizes, by name. Importing them imports no PyTorch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gobelin.validation import refuse_unknown

RowKind = Literal["unet", "trace", "vae", "text", "picture", "train", "start", "memory", "growth"]
BOTH = ("bfloat16", "float32")


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One thing that is measured: its kind, and the sizes that the kind needs.

    A row of a group is also chosen by the group's name; one that is ``hidden`` by its own alone.
    """

    name: str
    text: str
    kind: RowKind
    group: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    precisions: tuple[str, ...] = BOTH
    hidden: bool = False


def _rows(*rows: BenchRow) -> dict[str, BenchRow]:
    return {row.name: row for row in rows}


def _unet(name: str, text: str, model: str, side: int, batch: int, **more: Any) -> BenchRow:
    sizes = {"model": model, "side": side, "batch": batch}
    group = "tiny" if model == "tiny" else "unet"
    return BenchRow(**{"name": name, "text": text, "kind": "unet", "group": group, "sizes": sizes, **more})


_SD15 = "U-Net of Stable Diffusion 1.5"
ROWS = _rows(
    _unet("unet-64", f"{_SD15}, latents 64×64, batch 1", "sd15", 64, 1),
    _unet("unet-nano", "a small U-Net, for tests", "nano", 16, 1, hidden=True),
)


def find_rows(names: Sequence[str]) -> list[BenchRow]:
    """Find rows by their names or their groups', all that are not hidden for none, each once and in their own order.

    Raises :class:`UsageError` with the nearest name for one that is unknown.
    """
    groups = list(dict.fromkeys(row.group for row in ROWS.values()))
    refuse_unknown(names, [*ROWS, *groups], what="row")
    return [
        row
        for row in ROWS.values()
        if row.name in names or (not row.hidden and (not names or row.group in names))
    ]
