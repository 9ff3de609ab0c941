"""The rows of a benchmark: what is measured, at which sizes, by name. Importing them imports no PyTorch."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from gobelin.validation import refuse_unknown

if TYPE_CHECKING:
    from gobelin.bench.workload import BenchPrecision

RowKind = Literal["unet", "trace", "vae", "text", "picture", "train", "start", "memory", "growth"]
_Precisions = tuple["BenchPrecision", ...]
_BOTH: _Precisions = ("bfloat16", "float32")


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One thing that is measured: its kind, and the sizes that the kind needs.

    A row is also chosen by the name of its group, or of its kind; one that is ``hidden`` by its own alone. Its
    ``precisions`` are in the order in which the model paints fastest, where the machine has them.
    """

    name: str
    text: str
    kind: RowKind
    group: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    precisions: _Precisions = _BOTH
    hidden: bool = False

    def measured_in(self, there: "Collection[BenchPrecision]") -> _Precisions:
        """List the row's precisions among those that are ``there``; of a growth curve's, the first."""
        found: list[BenchPrecision] = [one for one in self.precisions if one in there]
        return tuple(found[:1] if self.kind == "growth" else found)


def _unet(name: str, side: int, batch: int, **more: Any) -> BenchRow:
    text = f"U-Net of Stable Diffusion 1.5, latents {side}×{side}, batch {batch}"
    sizes = {"model": "sd15", "side": side, "batch": batch}
    return BenchRow(**{"name": name, "text": text, "kind": "unet", "group": "sd15", "sizes": sizes, **more})


def _tiny(name: str, batch: int) -> BenchRow:
    text = f"U-Net of the model that ships, latents 16×16, batch {batch}"
    return _unet(name, 16, batch, text=text, group="tiny", sizes={"model": "tiny", "side": 16, "batch": batch})


def _picture(name: str, text: str, model: str, batch: int) -> BenchRow:
    sizes = {"model": model, "batch": batch, "steps": 20}
    return BenchRow(name=name, text=text, kind="picture", group=model, sizes=sizes)


def _train(name: str, text: str, group: str, **sizes: Any) -> BenchRow:
    return BenchRow(name=name, text=text, kind="train", group=group, sizes=sizes)


def _growth(along: str, text: str, values: tuple[int, ...], model: str, side: int, batch: int) -> BenchRow:
    precisions: _Precisions = (
        ("float32", "bfloat16") if model == "tiny" else _BOTH
    )  # as gobelin.checkpoint.fastest_dtype
    sizes = {"along": along, "values": values, "sizes": {"model": model, "side": side, "batch": batch}}
    return BenchRow(
        name=f"growth-{along}", text=text, kind="growth", group="growth", sizes=sizes, precisions=precisions
    )


_LISTED = (
    _unet("unet-64", 64, 1),
    _unet("unet-32", 32, 1),
    _tiny("tiny-unet-1", 1),
    _tiny("tiny-unet-8", 8),
    _tiny("tiny-unet-64", 64),
    _picture("tiny-picture-1", "guided image of the model that ships, 20 steps", "tiny", 1),
    _picture("tiny-picture-8", "eight guided images of the model that ships, 20 steps", "tiny", 8),
    BenchRow(
        name="start-up",
        text="a fresh process until the model that ships has painted one step",
        kind="start",
        group="tiny",
        precisions=("float32",),
    ),
    BenchRow(
        name="text",
        text="text encoder of Stable Diffusion 1.5, a prompt and an empty one",
        kind="text",
        group="sd15",
    ),
    BenchRow(
        name="vae-64",
        text="VAE of Stable Diffusion 1.5, decoding an image of 512×512",
        kind="vae",
        group="sd15",
        sizes={"side": 64},
    ),
    BenchRow(
        name="trace-64",
        text="guided U-Net pass of Stable Diffusion 1.5, latents 64×64, with the maps of its words",
        kind="trace",
        group="sd15",
        sizes={"model": "sd15", "side": 64},
    ),
    BenchRow(
        name="tiny-trace",
        text="guided U-Net pass of the model that ships, latents 16×16, with the maps of its words",
        kind="trace",
        group="tiny",
        sizes={"model": "tiny", "side": 16},
    ),
    _train(
        *("train-tiny", "optimizer step of the U-Net of the model that ships, batch 64", "tiny"),
        model="tiny",
        side=16,
        batch=64,
    ),
    BenchRow(
        name="memory-64",
        text="peak memory of a fresh process: opening the U-Net of Stable Diffusion 1.5, one pass at 64×64",
        kind="memory",
        group="sd15",
        sizes={"side": 64},
    ),
    _unet("unet-64-batch-2", 64, 2),
    _unet("unet-64-batch-4", 64, 4),
    _unet("unet-96", 96, 1),
    _picture("picture-512", "guided image of 512×512, Stable Diffusion 1.5, 20 steps, all in all", "sd15", 1),
    _train(
        *("train-lora-32", "optimizer step of a LoRA of Stable Diffusion 1.5, latents 32×32, batch 1", "sd15"),
        model="sd15",
        side=32,
        batch=1,
        lora=True,
    ),
    _train(
        *("train-full-32", "optimizer step of Stable Diffusion 1.5's U-Net, latents 32×32, batch 1", "sd15"),
        model="sd15",
        side=32,
        batch=1,
        apart=True,
    ),
    _growth("side", "U-Net of Stable Diffusion 1.5, growing latents", (16, 32, 48, 64, 96), "sd15", 64, 1),
    _growth("batch", "U-Net of Stable Diffusion 1.5, latents 32×32, growing batch", (1, 2, 4, 8), "sd15", 32, 1),
    _growth("threads", "U-Net of Stable Diffusion 1.5, latents 32×32", (1, 2, 4, 8, 16, 32), "sd15", 32, 1),
    _growth(
        *("processes", "U-Net of the model that ships, batch 8, in processes of one thread", (1, 2, 4, 8, 16, 32)),
        *("tiny", 16, 8),
    ),
    _unet(
        *("unet-nano", 16, 1),
        text="a very small U-Net",
        group="nano",
        sizes={"model": "nano", "side": 16, "batch": 1},
        hidden=True,
    ),
)
ROWS = {row.name: row for row in _LISTED}


def find_rows(names: Sequence[str]) -> list[BenchRow]:
    """Find rows by their names, groups or kinds, all for none, each once and in their own order.

    Raises :class:`UsageError` with the nearest name for one that is unknown.
    """
    several = dict.fromkeys(name for row in ROWS.values() if not row.hidden for name in (row.group, row.kind))
    refuse_unknown(names, [*ROWS, *several], what="row")
    return [
        row
        for row in ROWS.values()
        if row.name in names or (not row.hidden and (not names or row.group in names or row.kind in names))
    ]
