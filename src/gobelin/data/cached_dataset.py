"""A dataset read once for training: its images on disk as pixels, if they fit, and its captions."""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from gobelin.data.dataset import Dataset
from gobelin.data.pair_columns import ColumnFile, StringWriter, map_strings, string_files
from gobelin.data.row_cache import Hashes, RowCache, content_hash, fill, hash_array
from gobelin.data.scene_dataset import SceneDataset
from gobelin.errors import DataError
from gobelin.formats.files import read_json, write_json

MAX_CACHED_BYTES = 4 * 2**30  # 350,000 images of 64×64
_DRAWN_TOGETHER = 4096  # scenes in a shard: 50 MB at 64×64


class CachedDataset:
    """Read the images of ``dataset`` once, and keep them as pixels in ``folder``; what is there is used again.

    Pixels are kept while all of them take at most 4 GiB; beyond that each image is read again when it is used, by
    ``workers`` threads. Captions and hard negatives of what is drawn are kept too. Nothing stays in memory.
    ``advance`` is called with the images done and all of them.
    """

    def __init__(
        self,
        dataset: Dataset,
        folder: Path,
        workers: int = 1,
        advance: Callable[[int, int], None] = lambda done, total: None,
    ):
        self.dataset = dataset
        self.size, self.sizes, self.bucket_index = dataset.size, dataset.sizes, dataset.bucket_index
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="images")
        self._pixels = None
        self._texts = None
        self.folder: Path | None = None  # of the pixels, where they are kept
        counts = np.bincount(self.bucket_index, minlength=len(self.sizes))
        pixels = sum(height * width * int(count) for (height, width), count in zip(self.sizes, counts, strict=True))
        if 3 * pixels <= MAX_CACHED_BYTES:
            self.folder = folder / f"pixels-{content_hash(dataset.preprocessing_key).hex()}"
            self._pixels = RowCache(self.folder)
            if isinstance(dataset, SceneDataset):
                self._draw(dataset, folder / f"captions-{dataset.fingerprint[:32]}", self._pixels, advance)
            else:
                self._read(self._pixels, advance)

    def _read(self, pixels: RowCache, advance: Callable[[int, int], None]) -> None:
        """Read the images that are not there yet."""
        for bucket in np.unique(self.bucket_index):
            rows = np.flatnonzero(self.bucket_index == bucket)
            compute = partial(self._read_rows, rows)
            fill(pixels, self.hashes[rows], compute, advance=advance)

    def _read_rows(self, rows: Int[np.ndarray, " images"], positions: Int[np.ndarray, " batch"]) -> dict[str, Tensor]:
        return {"pixels": self._decode(rows[positions].tolist())}

    def _draw(self, scenes: SceneDataset, texts: Path, pixels: RowCache, advance: Callable[[int, int], None]) -> None:
        """Draw every scene, for its pixels, its caption and its hard negatives, unless that was done before."""
        head = texts.with_suffix(".json")
        if not head.is_file():
            with ExitStack() as files:
                texts.parent.mkdir(parents=True, exist_ok=True)
                columns = [files.enter_context(ColumnFile(file)) for file in string_files(texts)]
                writer = StringWriter(*columns)
                for start in range(0, len(scenes), _DRAWN_TOGETHER):
                    rows = range(start, min(start + _DRAWN_TOGETHER, len(scenes)))
                    entries = []
                    for row in rows:
                        entries.append(scenes[row])
                        writer.append(json.dumps([entries[-1].captions, entries[-1].negatives]))
                        advance(row + 1, len(scenes))
                    drawn = torch.from_numpy(np.stack([entry.image for entry in entries]))
                    pixels.append(self.hashes[rows], [{"pixels": drawn}])
                for column in columns:
                    column.finish(sync=True)
            write_json(head, {"count": writer.count, "bytes": writer.end})
            pixels.refresh()
        kept = read_json(head)
        self._texts = map_strings(texts, kept["count"], kept["bytes"])

    def __len__(self) -> int:
        return len(self.dataset)

    @cached_property
    def hashes(self) -> Hashes:
        """The hash of each image, by which its row is found in a cache."""
        return hash_array(content_hash(one) for one in self.dataset.hashes)

    def images(self, indices: Sequence[int]) -> Float[Tensor, "batch 3 height width"]:
        """Load images of one bucket in [-1, 1], on the CPU."""
        pixels = (
            self._decode(indices)
            if self._pixels is None
            else self._pixels.read(self.hashes[np.asarray(indices)])["pixels"]
        )
        return pixels.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1

    def captions(self, index: int) -> tuple[str, ...]:
        """Read the captions of an image."""
        return self.dataset.captions(index) if self._texts is None else tuple(json.loads(self._texts[index])[0])

    def negatives(self, index: int) -> tuple[str, ...]:
        """Read the hard negatives of an image, if its source knows any."""
        if self._texts is not None:
            return tuple(json.loads(self._texts[index])[1])
        return self.dataset[index].negatives if isinstance(self.dataset, SceneDataset) else ()

    def _decode(self, indices: Sequence[int]) -> UInt8[Tensor, "batch height width 3"]:
        """Read images of one bucket from their files."""
        return torch.from_numpy(np.stack(list(self._pool.map(self._decode_one, indices))))

    def _decode_one(self, index: int) -> UInt8[np.ndarray, "height width 3"]:
        try:
            return self.dataset[index].image
        except (OSError, DataError) as error:
            raise DataError(f"image {index} could be read when training began, and now cannot: {error}") from error
