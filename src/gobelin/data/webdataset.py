"""WebDataset: captioned images in tar shards, as img2dataset and the webdataset library write them, read in place.

A sample is the members of one key: a name up to the first dot of its last part. ``0001.jpg`` is its image, and the
caption is ``0001.txt``, ``0001.caption`` or ``0001.json``. Nothing is extracted: a shard's headers are read once, and
images by the byte at which they begin.
"""

import os
import re
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from gobelin.data.buckets import Preprocessing
from gobelin.data.captioned_files import (
    IMAGE_SUFFIXES,
    MAX_SIDECAR,
    NO_CAPTION,
    SECOND_IMAGE,
    SkippedImage,
    clean_captions,
    is_hidden,
    read_captions,
    sidecar_suffixes,
    unlisted,
)
from gobelin.data.image_folder import ImageFolderDataset
from gobelin.data.indexed_images import Candidate, IndexedImages, inspect_image, map_in_threads, read_part
from gobelin.data.pair_index import Pair, PairIndex, PairIndexWriter, Shard
from gobelin.errors import DataError

_SAMPLE = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
_COMPRESSED = (*(".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4"),)
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_CUT = "the tar is cut off, and what is whole in it is used"
_DAMAGED = "the tar is damaged, and what lies before that is used"
_MORE = "the tar goes on after its end, as joined tars do, and that is not read"
_TWICE = "its name stands in its tar a second time, and the first is used"
_NO_IMAGE = "a sample with a caption and no image"

_NOWHERE = -1  # the offset of an image that is a link, which is said already

_Places = dict[str, tuple[str, int, int]]  # of a sample's members by suffix: name, offset and size in bytes


class WebDataset(IndexedImages):
    """Read captioned images from one ``.tar``, or from all those of a folder and of those below it.

    Every image is opened once, after which ``advance`` is called with the bytes of tars so far and of all. With
    ``index``, a folder, tars whose name, size and time of change are as in the run before are not read again.
    ``caption_column`` is a key of the ``.json``; a ``.txt`` is then not read. Samples without an image or a
    caption, and images that cannot be read, are in ``skipped``; of a tar that is cut off, whole members are used. Other
    options and errors are those of :class:`~gobelin.data.image_folder.ImageFolderDataset`; compressed tars are refused.
    """

    def __init__(
        self,
        path: str | Path,
        size: int = 64,
        caption_column: str | None = None,
        advance: Callable[[int, int], None] = lambda done, total: None,
        index: Path | None = None,
        *,
        buckets: bool = False,
        fit: Literal["crop", "pad"] = "crop",
        background: str = "white",
    ):
        self.path = Path(path)
        self._column, self._advance = caption_column, advance
        preprocessing = Preprocessing(size=size, buckets=buckets, fit=fit, background=background)
        root = self.path if self.path.is_dir() else self.path.parent
        self._tars = [_shard(file, root) for file in list_tars(self.path)]
        super().__init__(root, self.path, preprocessing, index, kind="tars", caption_column=caption_column)
        del self._advance, self._tars

    def _is_current(self, earlier: PairIndex, options: dict[str, str | None]) -> bool:
        return earlier.options == options and earlier.shards() == self._tars

    def _fill(self, writer: PairIndexWriter, earlier: PairIndex | None) -> None:
        known = {} if earlier is None else {shard: number for number, shard in enumerate(earlier.shards())}
        skipped = {} if earlier is None else _rows_by_shard(earlier)
        done, total = 0, sum(shard.size for shard in self._tars)
        for shard in self._tars:
            number = writer.add_shard(shard)
            if earlier is not None and shard in known:
                for row in skipped.get(shard.name, ()):
                    writer.skip(earlier.skipped[row])
                for row in earlier.rows_of(known[shard]):
                    writer.add(replace(earlier[row], shard=number))
            else:
                self._read_shard(shard, number, writer, lambda offset, done=done: self._advance(done + offset, total))
            done += shard.size
            self._advance(done, total)

    def _read_shard(self, shard: Shard, number: int, writer: PairIndexWriter, advance: Callable[[int], None]) -> None:
        """List a tar's samples by their captions, and open their images."""
        file = self.root / shard.name
        samples, skipped = scan_tar(file, shard)
        candidates: list[Candidate] = []
        for key, places in samples.items():
            image = next((place for suffix, place in places.items() if suffix in IMAGE_SUFFIXES), None)
            if image is not None and image[1] == _NOWHERE:
                continue
            captions, reason = clean_captions(*_captions(file, places, self._column))
            if image is None and captions:
                skipped.append(SkippedImage(name=f"{shard.name}/{key}", reason=_NO_IMAGE))
            elif image is not None and not captions:
                skipped.append(SkippedImage(name=f"{shard.name}/{image[0]}", reason=reason))
            elif image is not None:
                name, offset, size = f"{shard.name}/{image[0]}", *image[1:]
                place = {"file": file, "shard": number, "offset": offset, "size": size, "time": shard.time}
                candidates.append(Candidate(name=name, captions=captions, **place))
        for one in skipped:
            writer.skip(one)
        for one, found in zip(candidates, map_in_threads(inspect_image, candidates), strict=True):
            if isinstance(found, Pair):
                writer.add(found)
            else:
                writer.skip(found)
            advance(one.offset)

    def _nothing(self) -> str:
        return (
            f"{self.source} has no captioned images: expected tars with an image, as 0001.jpg, and its caption, as "
            "0001.txt or 0001.json, for each key"
        )


def open_images(
    path: str | Path,
    size: int = 64,
    caption_column: str | None = None,
    *,
    require_captions: bool = True,
    **options: Any,
) -> IndexedImages:
    """Open captioned images: a tar or a folder of tars as :class:`WebDataset`, any other folder as an image folder.

    A folder that has both tars and images outside of them is refused, as one of the two would be left out. Without
    ``require_captions`` images of a folder need none; those of tars do. The other options are those of either class;
    raises as they do.
    """
    place = Path(path)
    as_folder = partial(ImageFolderDataset, require_captions=require_captions)
    if not place.is_dir():
        kind = WebDataset if place.is_file() else as_folder
        return kind(path, size, caption_column, **options)
    tar = next(_files(place, (".tar", *_COMPRESSED)), None)
    image = next(_files(place, IMAGE_SUFFIXES), None)
    if tar and image:
        raise DataError(
            f"{place} has tars and images, as {tar.relative_to(place)} and {image.relative_to(place)}: "
            "give a folder that has one of the two"
        )
    return (WebDataset if tar else as_folder)(path, size, caption_column, **options)


def list_tars(path: Path) -> list[Path]:
    """List the tars at a path, by name; raises :class:`DataError` where there are none, and for compressed ones."""
    if not path.is_dir() and not path.is_file():
        raise DataError(f"nothing at {path}: expected a tar, or a folder of tars, with captioned images")
    tars = list(_files(path, (".tar", *_COMPRESSED))) if path.is_dir() else [path]
    if not tars:
        raise DataError(f"{path} has no .tar: expected a tar, or a folder of tars, with captioned images")
    for tar in tars:
        try:
            with tar.open("rb") as opened:
                begins = opened.read(6)
        except OSError as error:
            raise DataError(f"{tar} cannot be read: {error.strerror}") from error
        packed = next((name for magic, name in _MAGIC.items() if begins.startswith(magic)), None)
        if packed or tar.name.lower().endswith(_COMPRESSED):
            raise DataError(f"{tar} is compressed{f' ({packed})' if packed else ''}: unpack it to a .tar first")
    return tars


def scan_tar(file: Path, shard: Shard) -> tuple[dict[str, _Places], list[SkippedImage]]:
    """Read a tar's headers: (for each key the places of its members by suffix, what cannot be used).

    Raises :class:`DataError` for a file that is no tar.
    """
    samples: dict[str, _Places] = {}
    skipped: list[SkippedImage] = []

    def skip(name: str, reason: str) -> None:
        skipped.append(SkippedImage(name=f"{shard.name}/{name}" if name else shard.name, reason=reason))

    if not shard.size:
        skip("", f"{_CUT} (it has no bytes)")
        return samples, skipped
    try:
        with tarfile.open(file, "r:") as tar:
            for member in _members(tar):
                if isinstance(member, str):
                    skip("", member)
                elif member.offset_data + member.size > shard.size:
                    skip("", f"{_CUT} ({member.name} is not whole)")
                    break
                elif reason := _add(samples, member):
                    skip(member.name, reason)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as a tar: {error}") from error
    return samples, skipped


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo | str]:
    """Read one header after the other, and at the end say if it is not the end."""
    try:
        while (member := tar.next()) is not None:
            tar.members = []  # pyright: ignore[reportAttributeAccessIssue] (or it keeps all)
            yield member
    except tarfile.TarError as error:
        if not tar.offset:
            raise
        yield f"{_CUT} (byte {tar.offset:,}: {error})"
        return
    except (ValueError, OverflowError) as error:  # a pax header whose numbers are none
        yield f"{_DAMAGED} (byte {tar.offset:,}: {error})"
        return
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    end = tar.fileobj.read(tarfile.BLOCKSIZE)
    if len(end) < tarfile.BLOCKSIZE:
        yield f"{_CUT} (it has no end mark)"
    elif any(end):
        yield f"{_DAMAGED} (byte {tar.offset:,})"
    elif any(any(block) for block in iter(partial(tar.fileobj.read, tarfile.RECORDSIZE), b"")):
        yield _MORE


def _add(samples: dict[str, _Places], member: tarfile.TarInfo) -> str:
    """Add a member to its sample; gives the reason where it cannot be used."""
    found = _SAMPLE.fullmatch(member.name)
    if member.isdir() or found is None or any(map(is_hidden, _parts(member.name))):
        return ""
    key, suffix = found[1].removeprefix("./"), f".{found[2].lower()}"
    is_image = suffix in IMAGE_SUFFIXES
    if not is_image and suffix not in sidecar_suffixes(None):
        return f"{SECOND_IMAGE} ({suffix})" if suffix.endswith(IMAGE_SUFFIXES) else ""
    if not member.isreg() or member.issparse():
        kind = "a link" if member.islnk() or member.issym() else "a sparse file" if member.issparse() else "no file"
        if is_image:
            samples.setdefault(key, {}).setdefault(suffix, (member.name, _NOWHERE, 0))
        return f"{kind} in a tar, and not its content" if is_image else ""
    places = samples.setdefault(key, {})
    if suffix in places:
        return _TWICE
    if is_image and any(other in IMAGE_SUFFIXES for other in places):
        return f"{SECOND_IMAGE} ({suffix})"
    places[suffix] = (member.name, member.offset_data, member.size)
    return ""


def _parts(name: str) -> list[str]:
    return [part for part in name.split("/") if part not in (".", "..")]


def _captions(file: Path, places: _Places, column: str | None) -> tuple[tuple[str, ...], str]:
    """Read the caption of a sample: (captions, the reason where there is none)."""
    suffix = next((one for one in sidecar_suffixes(column) if one in places), None)
    if suffix is None:
        return (), NO_CAPTION
    name, offset, size = places[suffix]
    return read_captions(name, read_part(file, offset, min(size, MAX_SIDECAR + 1)), column)


def _rows_by_shard(earlier: PairIndex) -> dict[str, list[int]]:
    """Group what cannot be used by the tar whose name it begins with."""
    names = {shard.name for shard in earlier.shards()}
    rows: defaultdict[str, list[int]] = defaultdict(list)
    for row, one in enumerate(earlier.skipped):
        parts = one.name.split("/")
        rows[next(start for end in range(len(parts)) if (start := "/".join(parts[: end + 1])) in names)].append(row)
    return rows


def _shard(file: Path, root: Path) -> Shard:
    said = file.stat()
    return Shard(name=file.relative_to(root).as_posix(), size=said.st_size, time=said.st_mtime_ns)


def _refuse(error: OSError) -> None:
    raise unlisted(error) from error


def _files(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Walk the files with one of some suffixes, in a folder and those below it, by name, but hidden ones."""
    for place, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        yield from (
            Path(place) / name
            for name in sorted(names)
            if name.lower().endswith(suffixes) and not is_hidden(name) and not (Path(place) / name).is_dir()
        )
