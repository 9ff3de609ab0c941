"""The files of ONNX Runtime Web, of one version whose contents are known: given, kept from before, or got by npm."""

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from gobelin.cache_folder import cache_folder
from gobelin.errors import ModelError, UsageError

VERSION = "1.30.0"
PACKAGE = f"onnxruntime-web@{VERSION}"
SCRIPT, PROGRAM = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
_SHA256 = {
    SCRIPT: "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    PROGRAM: "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
_ARCHIVES = (".tgz", ".tar.gz")


@dataclass(frozen=True, kw_only=True)
class RuntimeFiles:
    """The runtime's ``script``, a module of JavaScript, and its ``program`` in WebAssembly."""

    script: bytes = field(repr=False)
    program: bytes = field(repr=False)


def find_runtime(given: Path | None = None) -> RuntimeFiles:
    """Find the runtime: the package ``given`` as a folder or as npm's .tgz, or what is in the user's cache folder.

    Where there is none, npm gets the package, once, which is said on standard error. Raises :class:`UsageError` where
    it cannot be found, and :class:`ModelError` for files that are not those of this version.
    """
    if given is not None:
        return _checked(_read(given), str(given))
    folder = cache_folder("onnxruntime-web") / VERSION
    if not all((folder / name).is_file() for name in _SHA256):
        _get_by_npm(folder)
    return _checked({name: (folder / name).read_bytes() for name in _SHA256}, str(folder))


def _checked(contents: dict[str, bytes], source: str) -> RuntimeFiles:
    for name, content in contents.items():
        if hashlib.sha256(content).hexdigest() != _SHA256[name]:
            raise ModelError(f"{source}: {name} is not that of {PACKAGE}: give that version, or remove the damaged one")
    return RuntimeFiles(script=contents[SCRIPT], program=contents[PROGRAM])


def _read(source: Path) -> dict[str, bytes]:
    """Read the files of the package: a folder that holds them or its ``dist``, or npm's archive."""
    if source.is_file() and source.name.endswith(_ARCHIVES):
        return _read_archive(source)
    for folder in (source, source / "dist", source / "node_modules" / "onnxruntime-web" / "dist"):
        if all((folder / name).is_file() for name in _SHA256):
            return {name: (folder / name).read_bytes() for name in _SHA256}
    raise UsageError(f"{source} does not hold {PACKAGE}: give the folder of that package, or the .tgz of npm pack")


def _read_archive(file: Path) -> dict[str, bytes]:
    """Read the two files out of the archive; nothing of it is unpacked."""
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(file, "r:gz") as archive:
            for name in _SHA256:
                stream = archive.extractfile(f"package/dist/{name}")
                if stream is not None:
                    contents[name] = stream.read()
    except (tarfile.TarError, KeyError, OSError, EOFError) as error:
        raise ModelError(f"{file} cannot be read as {PACKAGE}: {error}") from error
    return contents


def _get_by_npm(folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise UsageError(
            f"the page needs {PACKAGE}, which is not in {folder}, and npm, which would get it, is not installed: "
            "install npm, or give the package's folder or its .tgz as --runtime"
        )
    print(f"gobelin: npm gets {PACKAGE} (33 MB), which is then kept in {folder}", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="gobelin-") as temporary:
        command = [npm, "pack", PACKAGE, "--silent", "--pack-destination", temporary]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        archives = list(Path(temporary).glob("*.tgz"))
        if done.returncode or len(archives) != 1:
            reason = (done.stderr.strip().splitlines() or ["it wrote no archive"])[-1]
            raise UsageError(f"npm could not get {PACKAGE}: {reason[:200]}; give the package's .tgz as --runtime")
        contents = _read_archive(archives[0])
        _checked(contents, PACKAGE)
        folder.mkdir(exist_ok=True)
        for name, content in contents.items():
            made = Path(temporary) / name
            made.write_bytes(content)
            shutil.move(made, folder / name)
