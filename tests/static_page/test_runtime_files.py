"""ONNX Runtime Web's files: taken from a folder or an archive, kept, got by npm; refused where they are others."""

import io
import stat
import tarfile
from pathlib import Path

import pytest
from tests.conftest import sentence_of

from gobelin.static_page import find_runtime, runtime_files
from gobelin.static_page.runtime_files import PACKAGE, PROGRAM, SCRIPT, VERSION

CONTENTS = {SCRIPT: b"export {};", PROGRAM: b"\0asm"}
OTHER = {SCRIPT: b"export {};", PROGRAM: b"\0asn"}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Files of a few bytes, and a cache folder and a path of programs that are empty."""
    from hashlib import sha256

    hashes = {name: sha256(content).hexdigest() for name, content in CONTENTS.items()}
    monkeypatch.setattr(runtime_files, "_SHA256", hashes)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def filled(folder: Path, contents: dict[str, bytes] = CONTENTS) -> Path:
    folder.mkdir(parents=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


def archive(file: Path, contents: dict[str, bytes] = CONTENTS) -> Path:
    with tarfile.open(file, "w:gz") as made:
        for name, content in contents.items():
            entry = tarfile.TarInfo(f"package/dist/{name}")
            entry.size = len(content)
            made.addfile(entry, io.BytesIO(content))
    return file


@pytest.mark.parametrize("inner", ["", "dist", "node_modules/onnxruntime-web/dist"])
def test_a_folder_is_taken(tmp_path: Path, inner: str) -> None:
    filled(tmp_path / "given" / inner)
    found = find_runtime(tmp_path / "given")
    assert (found.script, found.program) == (CONTENTS[SCRIPT], CONTENTS[PROGRAM])


def test_an_archive_is_taken(tmp_path: Path) -> None:
    assert find_runtime(archive(tmp_path / "package.tgz")).program == CONTENTS[PROGRAM]


def test_others_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.tgz").write_bytes(b"no archive")
    for given, said in (
        (filled(tmp_path / "other", OTHER), f"{PROGRAM} is not that of {PACKAGE}"),
        (archive(tmp_path / "other.tgz", OTHER), f"{PROGRAM} is not that of {PACKAGE}"),
        (archive(tmp_path / "half.tgz", {SCRIPT: CONTENTS[SCRIPT]}), f"cannot be read as {PACKAGE}"),
        (tmp_path / "broken.tgz", f"cannot be read as {PACKAGE}"),
        (tmp_path / "empty", f"does not hold {PACKAGE}"),
        (tmp_path / "nowhere", f"does not hold {PACKAGE}"),
    ):
        sentence = sentence_of(lambda given=given: find_runtime(given))
        assert sentence is not None
        assert said in sentence


def test_without_npm_it_is_said_what_to_do() -> None:
    with pytest.raises(
        Exception, match=r"npm, which would get it, is not installed: install npm, or give .* --runtime"
    ):
        find_runtime()


def put_npm(folder: Path, script: str) -> None:
    folder.mkdir()
    npm = folder / "npm"
    npm.write_text(f"#!/bin/sh\n{script}\n")
    npm.chmod(npm.stat().st_mode | stat.S_IXUSR)


def test_npm_gets_it_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = archive(tmp_path / "source.tgz")
    put_npm(tmp_path / "bin", f'test "$2" = {PACKAGE} && /bin/cp {source} "$5/onnxruntime-web-{VERSION}.tgz"')
    assert find_runtime().program == CONTENTS[PROGRAM]
    assert f"npm gets {PACKAGE}" in capsys.readouterr().err
    (tmp_path / "bin" / "npm").unlink()
    assert find_runtime().program == CONTENTS[PROGRAM]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("script", ["echo 'npm error: no network' >&2; exit 1", "exit 0"])
def test_npm_that_fails_is_said(tmp_path: Path, script: str) -> None:
    put_npm(tmp_path / "bin", script)
    with pytest.raises(Exception, match=r"npm could not get .* give the package's \.tgz as --runtime"):
        find_runtime()


def test_what_npm_gets_is_checked_before_it_is_kept(tmp_path: Path) -> None:
    source = archive(tmp_path / "source.tgz", OTHER)
    put_npm(tmp_path / "bin", f'/bin/cp {source} "$5/onnxruntime-web-{VERSION}.tgz"')
    with pytest.raises(Exception, match=f"{PROGRAM} is not that of"):
        find_runtime()
    assert not (tmp_path / "cache" / "gobelin" / "onnxruntime-web" / VERSION).exists()
