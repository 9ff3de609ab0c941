"""C++ that is compiled at its first use, and kept in the user's cache folder.

A library is code that will run: it is only read from a folder that nobody else can write to, and ends with its hash.
"""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gobelin.cache_folder import cache_folder, hashed, is_whole

# Nothing depends on the machine that compiles: homes are shared.
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared")
_PATIENCE = 120  # seconds for a compilation, which takes two


def load_library(source: Path, includes: Sequence[Path] = (), flags: Sequence[str] = ()) -> ctypes.CDLL | None:
    """Load the library of a C++ ``source``, compiled anew unless it was before; None where that is not possible.

    ``includes`` are the files that it includes, ``flags`` those of the compiler beside those of every kernel. The
    library is kept in ``gobelin/kernels`` of ``$XDG_CACHE_HOME`` or ``~/.cache``, or, where that folder is not safe or
    not writable, compiled into a temporary one by every process.
    """
    for compiler in _compilers():
        for open_folder in (_kept_folder, _temporary_folder):
            try:
                with open_folder() as folder:
                    library = folder / _library_name([*compiler, *FLAGS, *flags], source, includes)
                    if not is_whole(library):
                        _compile([*compiler, *FLAGS, *flags], source, library)
                    return ctypes.CDLL(str(library))
            except subprocess.SubprocessError:
                break  # another folder would not help
            except OSError:
                continue
    return None


def _compilers() -> Iterator[list[str]]:
    """List the compilers that there are, as commands: ``$CXX`` alone where it is set."""
    named = os.environ.get("CXX")
    try:
        commands = [shlex.split(named)] if named else [["c++"], ["g++"], ["clang++"]]
    except ValueError:  # quotes that are not closed
        return
    for command in commands:
        if command and shutil.which(command[0]):
            yield command


def _library_name(command: list[str], source: Path, includes: Sequence[Path]) -> str:
    """Name a library by everything that it is made of and with; to ask a compiler its version takes 20 ms a start."""
    compiler = Path(shutil.which(command[0]) or command[0]).resolve()
    found = compiler.stat()
    made_by = f"{compiler} {found.st_size} {found.st_mtime_ns} {' '.join(command)}"
    parts = [*(file.read_bytes() for file in (source, *includes)), os.fsencode(made_by)]
    digests = b"".join(hashlib.sha256(part).digest() for part in parts)
    return f"{source.stem}-{hashlib.sha256(digests).hexdigest()[:32]}.so"


@contextmanager
def _kept_folder() -> Iterator[Path]:
    """Open the cache folder; raises OSError where it cannot be made, or where somebody else could change it."""
    yield cache_folder("kernels")


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """Open a folder that is gone afterwards; a library that was loaded from it stays."""
    with tempfile.TemporaryDirectory(prefix="gobelin-") as folder:
        yield Path(folder)


def _compile(command: list[str], source: Path, library: Path) -> None:
    """Compile a source into a library, which appears whole, and with its hash at the end, where ELF ignores it.

    Raises SubprocessError for a compiler that fails, OSError for a folder that cannot be written to.
    """
    with hashed(library) as made:
        command = [*command, str(source), "-o", str(made)]
        subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=_PATIENCE)
