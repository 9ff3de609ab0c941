"""Use of a training cache: what a folder holds of pixels, latents and text embeddings, and how large it is."""

from dataclasses import dataclass
from pathlib import Path

from gobelin.data.row_cache import RowCache

CACHE_KINDS = ("pixels", "latents", "texts")
"""How the names of a cache's folders begin; what follows is the hash of what its rows depend on."""


@dataclass(frozen=True, kw_only=True)
class CacheUse:
    """The rows of one kind, model and preprocessing, and their size on disk."""

    rows: int
    bytes: int


def measure_cache(folder: Path) -> dict[str, CacheUse]:
    """Measure every folder of rows in a cache, by its name; raises :class:`DataError` for a damaged file."""
    found = [one for kind in CACHE_KINDS for one in sorted(folder.glob(f"{kind}-*")) if one.is_dir()]
    return {one.name: CacheUse(rows=len(RowCache(one)), bytes=_size(one)) for one in found}


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
