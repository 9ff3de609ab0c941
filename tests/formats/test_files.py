from pathlib import Path

import pytest

from gobelin.errors import ModelError
from gobelin.formats.files import read_json, replacing, write_json, write_text


def test_a_file_takes_its_place_when_the_block_ends(tmp_path: Path) -> None:
    file = tmp_path / "new" / "folder" / "note.txt"
    with replacing(file) as temporary:
        temporary.write_text("whole")
        assert not file.exists()
        assert temporary.parent == file.parent
    assert file.read_text() == "whole"
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("old", [None, "old"])
def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(old: str | None, tmp_path: Path) -> None:
    file = tmp_path / "note.txt"
    if old is not None:
        file.write_text(old)

    def write_half() -> None:
        with replacing(file) as temporary:
            temporary.write_text("hal")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert [(path, path.read_text()) for path in tmp_path.iterdir()] == ([(file, old)] if old else [])


def test_a_block_that_writes_nothing_is_an_error_and_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "note.txt"
    file.write_text("old")
    with pytest.raises(FileNotFoundError), replacing(file):
        pass
    assert file.read_text() == "old"


def test_json_comes_back_and_reads_as_text(tmp_path: Path) -> None:
    content = {"prompt": "ein grüner Kreis 🟢", "sizes": [1, 2.5, None], "nested": {"a": True}}
    file = tmp_path / "config.json"
    write_json(file, content)
    assert read_json(file) == content
    assert "grüner Kreis 🟢" in file.read_text(encoding="utf-8")
    assert file.read_text(encoding="utf-8").endswith("}\n")


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert read_json(file) == {"a": 1}


def test_text_is_written_as_it_is(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "zwei\nZeilen ü")
    assert (tmp_path / "a.txt").read_bytes() == "zwei\nZeilen ü".encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"no file at .*config\.json: is this a model folder\?"),
        (b'{"a": ', r"config\.json cannot be read as JSON"),
        (b"\xff\xfe", r"config\.json cannot be read as JSON"),
        (b"[1]", r"config\.json holds a list, expected an object"),
    ],
)
def test_a_file_without_a_json_object_is_named(content: bytes | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        read_json(file)


def test_a_folder_in_the_place_of_a_json_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        read_json(tmp_path)


def test_who_reads_the_old_file_meanwhile_reads_all_of_it(tmp_path: Path) -> None:
    file = tmp_path / "note.txt"
    file.write_text("old")
    with file.open() as reader:
        write_text(file, "new and longer")
        assert reader.read() == "old"
    assert file.read_text() == "new and longer"
