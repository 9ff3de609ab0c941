"""What is compiled is kept, shared by processes, and not trusted where somebody else could have written it."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gobelin.kernels import compiled
from gobelin.kernels.compiled import load_library


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder, which is not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gobelin" / "kernels"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of C++, that nothing was loaded of: what a process has loaded, it takes for the file of that name."""
    file = tmp_path / "answer.cpp"
    file.write_text('#include "number.hpp"\nextern "C" int answer() { return number(); }\n')
    (tmp_path / "number.hpp").write_text("int number() { return 42; }\n")
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
        if load(file) is None:
            pytest.skip("needs a C++ compiler")
    return file


def load(source: Path) -> ctypes.CDLL | None:
    return load_library(source, [source.with_name("number.hpp")])


def answer(source: Path) -> int:
    library = load(source)
    assert library is not None
    return library.answer()


@pytest.mark.parametrize("named", ["g++ 'x", "/nowhere/c++", " "])
def test_a_compiler_that_cannot_be_run_is_none(source: Path, monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    monkeypatch.setenv("CXX", named)
    assert load(source) is None


def test_a_compiler_of_any_name_is_run(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = os.fsencode(tmp_path) + b"/c\xff"
    os.symlink(shutil.which("c++") or shutil.which("g++") or "", name)
    monkeypatch.setenv("CXX", os.fsdecode(name))
    assert answer(source) == 42


def test_without_a_home_every_process_compiles_for_itself(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as of a user that the system does not know
    assert answer(source) == 42


@pytest.mark.parametrize("place", ["cache", "cache/gobelin"])
def test_a_folder_that_others_write_to_is_not_used(source: Path, tmp_path: Path, place: str) -> None:
    folder = tmp_path / place
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert answer(source) == 42
    assert not list(folder.rglob("*.so"))


def test_a_link_in_place_of_the_folder_is_not_followed(source: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "cache" / "gobelin").symlink_to(tmp_path / "other")
    assert answer(source) == 42
    assert not list((tmp_path / "other").iterdir())


def compilations(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The libraries that are compiled from now on."""
    done = []

    def compile_(compiler: list[str], source: Path, library: Path) -> None:
        done.append(library)
        really(compiler, source, library)

    really = compiled._compile
    monkeypatch.setattr(compiled, "_compile", compile_)
    return done


def test_a_library_is_compiled_once_and_again_when_a_file_of_it_changes(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = compilations(monkeypatch)
    assert [answer(source), answer(source)] == [42, 42]
    assert len(done) == 1
    assert list(cache.iterdir()) == done
    assert cache.stat().st_mode & 0o777 == cache.parent.stat().st_mode & 0o777 == 0o700
    source.with_name("number.hpp").write_text("int number() { return 43; }\n")
    assert answer(source) == 43
    assert len(set(done)) == 2


def place(source: Path, cache: Path) -> Path:
    """Where the library will be."""
    cache.mkdir(mode=0o700, parents=True)
    cache.parent.chmod(0o700)
    return cache / compiled._library_name(
        [*next(compiled._compilers()), *compiled.FLAGS], source, [source.with_name("number.hpp")]
    )


@pytest.mark.parametrize("damage", ["empty", "half", "a byte"])
def test_a_damaged_library_is_compiled_again(damage: str, source: Path, cache: Path, tmp_path: Path) -> None:
    library = place(source, cache)
    whole = (next(tmp_path.glob("elsewhere/*/*/*.so"))).read_bytes()
    assert hashlib.sha256(whole[:-32]).digest() == whole[-32:]
    library.write_bytes({"empty": b"", "half": whole[: len(whole) // 2], "a byte": b"?" + whole[1:]}[damage])
    assert answer(source) == 42
    assert library.read_bytes() == whole


def test_a_file_that_is_whole_and_cannot_be_loaded_is_done_without(source: Path, cache: Path) -> None:
    library = place(source, cache)
    text = b"text" + hashlib.sha256(b"text").digest()
    library.write_bytes(text)
    assert answer(source) == 42
    assert library.read_bytes() == text


@pytest.mark.parametrize("where", ["kernels", "gobelin", "library"])
def test_what_others_can_write_to_is_not_loaded(
    where: str, source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = compilations(monkeypatch)
    load(source)
    library = done.pop()
    {"kernels": cache, "gobelin": cache.parent, "library": library}[where].chmod(0o777)
    assert answer(source) == 42
    assert len(done) == 1
    assert (done[0] == library) == (where == "library")
    assert library.stat().st_mode & 0o777 == 0o700
    assert where == "library" or not done[0].parent.exists()


def test_what_belongs_to_others_is_not_loaded(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = compilations(monkeypatch)
    load(source)
    library = done.pop()
    monkeypatch.setattr(os, "getuid", lambda: library.stat().st_uid + 1)
    assert answer(source) == 42
    assert [folder.parent == library.parent for folder in done] == [False]


def test_a_home_that_cannot_be_written_to_takes_a_temporary_folder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
    assert answer(source) == 42


def test_without_a_compiler_that_works_there_is_no_library(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source.write_text("this is no C++")
    assert load(source) is None
    source.write_text('extern "C" int answer() { return 42; }\n')
    for compiler in ("false", "no-such-compiler", "true"):
        monkeypatch.setenv("CXX", compiler)
        assert load(source) is None
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    assert load(source) is None


def test_the_compiler_is_the_one_that_is_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = next(compiled._compilers())[0]
    script = tmp_path / "my compiler"
    script.write_text(f'#!/bin/sh\necho "$@" >> "{tmp_path}/called"\nexec {shutil.which(found)} "$@"\n')
    script.chmod(0o700)
    monkeypatch.setenv("CXX", f"'{script}' -DHERE")
    assert answer(source) == 42
    assert all(line.startswith("-DHERE") for line in (tmp_path / "called").read_text().splitlines())


def test_processes_and_threads_may_compile_at_once(source: Path, cache: Path) -> None:
    program = (
        "import sys, importlib.util as u; from pathlib import Path\n"
        "spec = u.spec_from_file_location('compiled', sys.argv[1]); m = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(m); print(m.load_library(Path(sys.argv[2]), [Path(sys.argv[3])]).answer())"
    )
    command = [sys.executable, "-c", program, compiled.__file__, str(source), str(source.with_name("number.hpp"))]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(answer, [source] * 3)) == [42] * 3
    assert [process.communicate()[0].strip() for process in processes] == ["42"] * 3
    assert len(list(cache.iterdir())) == 1
