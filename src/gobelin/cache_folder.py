"""The user's cache folder: what is made once and kept, and read only where nobody else could have written it."""

import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DIGEST_BYTES = 32
"""A hashed file ends with the SHA-256 of what is before."""


def cache_folder(name: str) -> Path:
    """Find ``gobelin/<name>`` of ``$XDG_CACHE_HOME`` or ``~/.cache``, made where it is not there.

    Raises OSError where it cannot be made, or where somebody else could change it.
    """
    named = os.environ.get("XDG_CACHE_HOME", "")
    cache = Path(named) if os.path.isabs(named) else Path(os.path.expanduser("~")) / ".cache"
    if not cache.is_absolute():
        raise FileNotFoundError("there is no home folder")
    for folder in (cache, cache / "gobelin", cache / "gobelin" / name):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not is_safe(folder):
            raise PermissionError(f"{folder} can be written to by others")
    return folder


def is_safe(path: Path) -> bool:
    """Tell whether a path is the user's own, no link, and nobody else may write there."""
    status = path.lstat()
    own = not hasattr(os, "getuid") or status.st_uid == os.getuid()
    return not stat.S_ISLNK(status.st_mode) and own and not status.st_mode & 0o022


def is_whole(file: Path) -> bool:
    """Tell whether a hashed file is there, safe, and as it was written."""
    if not file.is_file() or not is_safe(file):
        return False
    digest = hashlib.sha256()
    left = file.stat().st_size - DIGEST_BYTES
    with file.open("rb") as stream:
        while left > 0 and (part := stream.read(min(left, 2**24))):
            digest.update(part)
            left -= len(part)
        return left == 0 and stream.read() == digest.digest()


@contextmanager
def hashed(file: Path) -> Iterator[Path]:
    """Hashed write: yield a path in a folder of its own, which becomes ``file``, with its hash, when the block ends."""
    with tempfile.TemporaryDirectory(prefix=".making-", dir=file.parent) as folder:
        made = Path(folder) / file.name
        yield made
        with made.open("r+b") as stream:
            stream.write(hashlib.file_digest(stream, "sha256").digest())  # which has read to the end
        made.chmod(0o700)
        made.replace(file)


def keep_newest(folder: Path, most_bytes: int) -> None:
    """Remove the files of a folder that were used longest ago, until the rest are no more than ``most_bytes``."""
    files = sorted((file for file in folder.iterdir() if file.is_file()), key=lambda file: -file.stat().st_mtime)
    total = 0
    for file in files:
        total += file.stat().st_size
        if total > most_bytes:
            file.unlink(missing_ok=True)
