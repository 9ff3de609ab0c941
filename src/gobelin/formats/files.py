"""JSON and text files: read with errors that name the file, written atomically, through a temporary name."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gobelin.errors import ModelError

_MAX_JSON = 6_000_000  # bytes; the longest of a model, CLIP's tokenizer.json, has some 3 million
_LFS_POINTER = "version https://git-lfs"


def read_text(file: Path) -> str:
    """Read a text file in UTF-8, with or without a byte order mark.

    Raises :class:`ModelError` for what Git leaves in the place of a large file, and the errors of reading otherwise.
    """
    text = file.read_text(encoding="utf-8-sig")
    if text.startswith(_LFS_POINTER):
        raise ModelError(f"{file} is a Git LFS pointer, which stands for the file itself: fetch that with git lfs pull")
    return text


def refuse_broken_link(file: Path) -> None:
    """Raise :class:`ModelError` for a link to a file that is not there, such as the Hub's cache may hold."""
    if file.is_symlink() and not file.exists():
        raise ModelError(f"{file} is a link to {file.readlink()}, which is not there: get that file again")


def is_there(file: Path) -> bool:
    """Tell whether there is a file; raises :class:`ModelError` for a broken link, which is not the same as none."""
    refuse_broken_link(file)
    return file.is_file()


def read_json(file: Path) -> dict:
    """Read the object in a JSON file; raises :class:`ModelError` that names the file where there is none."""
    refuse_broken_link(file)
    try:
        if file.stat().st_size > _MAX_JSON:
            raise ModelError(f"{file} has more than {_MAX_JSON:,} bytes, and no configuration is as long")
        text = read_text(file)
    except FileNotFoundError:
        raise ModelError(f"no file at {file}: is this a model folder?") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read as JSON: {error}") from error
    return parse_json(text, str(file))


def parse_json(text: str, source: str) -> dict:
    """Read the object in a JSON text; raises :class:`ModelError` that names its ``source`` where there is none."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{source} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{source} holds a {type(content).__name__}, expected an object")
    return content


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(file: Path, content: object) -> None:
    """Write a JSON file atomically, indented by two spaces, in UTF-8."""
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Atomic write: yield a temporary path beside ``file`` that replaces it when the block ends without an error.

    What was written is on disk (fsync) before it takes the name; after an error the old file stands as it was.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(file)
        sync_folder(file.parent)
    finally:
        temporary.unlink(missing_ok=True)


def share_files(one: str | Path, other: str | Path) -> bool:
    """Tell whether files can be in both of two folders: whether they are the same, or one in the other."""
    one, other = Path(one).resolve(), Path(other).resolve()
    return one.is_relative_to(other) or other.is_relative_to(one)


def sync_folder(folder: Path) -> None:
    """Flush a folder to disk (fsync), so that a rename in it survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
