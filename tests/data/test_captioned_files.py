"""Folders as people have them: captions are found, or it is said why not; nothing is passed over in silence."""

import json
import os
from pathlib import Path

import pyarrow as arrow
import pytest
from PIL import Image
from pyarrow import parquet

from gobelin.data import ImageFolderDataset
from gobelin.data.captioned_files import CaptionedFile, SkippedImage, iterate_captioned_files
from gobelin.data.image_folder import read_image
from gobelin.data.webdataset import open_images
from gobelin.errors import DataError


def image(file: Path, size: tuple[int, int] = (8, 8), **options) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "teal").save(file, **options)
    return file


def listed(folder: Path, column: str | None = None) -> tuple[list[CaptionedFile], list[SkippedImage]]:
    every = list(iterate_captioned_files(folder, column))
    return [one for one in every if isinstance(one, CaptionedFile)], [
        one for one in every if isinstance(one, SkippedImage)
    ]


def found(folder: Path, column: str | None = None) -> dict[str, tuple[str, ...]]:
    files, skipped = listed(folder, column)
    assert not skipped, skipped
    return {one.file.relative_to(folder).as_posix(): one.captions for one in files}


def reasons(folder: Path) -> dict[str, str]:
    return {one.name: one.reason for one in listed(folder)[1]}


def metadata(folder: Path, *lines: dict | str, name: str = "metadata.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


@pytest.mark.parametrize("name", ["a.txt", "a.caption", "a.png.txt", "a.png.caption", "a.TXT", "a.CAPTION"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_caption_lies_beside_its_image(name: str, encoding: str, tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    (tmp_path / name).write_text("  a cät\r\n of cats ", encoding=encoding)
    assert found(tmp_path) == {"a.png": ("a cät of cats",)}


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_caption_in_another_encoding_is_not_learned(encoding: str, tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("un café", encoding=encoding)
    assert reasons(tmp_path) == {"a.png": "its caption is not UTF-8 text (a.txt)"}


@pytest.mark.parametrize(
    "suffix", ["png", "PNG", "jpg", "JpEg", "jfif", "webp", "avif", "bmp", "gif", "tif", "tiff", "tga", "ppm"]
)
def test_every_kind_of_image_is_read(suffix: str, tmp_path: Path) -> None:
    kind = {"jfif": "jpeg", "jpg": "jpeg"}.get(suffix.lower(), suffix.lower()).replace("tiff", "tif")
    image(tmp_path / f"a.{suffix}", format={"tif": "TIFF"}.get(kind, kind.upper()))
    (tmp_path / "a.txt").write_text("teal")
    dataset = ImageFolderDataset(tmp_path, 8)
    assert abs(dataset[0].image.astype(int) - (0, 128, 128)).max() < 12


def test_images_of_other_kinds_are_said(tmp_path: Path) -> None:
    (tmp_path / "a.HEIC").write_bytes(b"x")
    (tmp_path / "notes.md").write_text("no image")
    assert reasons(tmp_path)["a.HEIC"].startswith(".heic is not one of .png .jpg")
    assert len(reasons(tmp_path)) == 1


def test_what_the_system_hides_is_no_image(tmp_path: Path) -> None:
    for name in (".hidden.png", "._a.png", ".ipynb_checkpoints/a-checkpoint.png", "__MACOSX/a.png", "a.png"):
        image(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text("teal")
    assert found(tmp_path) == {"a.png": ("teal",)}


def test_links_to_images_are_taken_and_broken_ones_said(tmp_path: Path) -> None:
    real = image(tmp_path / "elsewhere" / "real.png")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, target in (("good", real), ("bad", tmp_path / "gone.png")):
        (folder / f"{name}.png").symlink_to(target)
        (folder / f"{name}.txt").write_text("teal")
    (folder / "loop").symlink_to(folder)
    (folder / "plain.png").symlink_to(real)
    files, skipped = listed(folder)
    assert [one.file.name for one in files] == ["good.png"]
    assert {one.name: one.kind for one in skipped} == {
        "bad.png": "a link to a file that is not there",
        "plain.png": "no caption",
    }
    (folder / "plain.png").unlink()
    metadata(folder, {"file_name": "good.png", "text": "a"}, {"file_name": "bad.png", "text": "b"})
    dataset = ImageFolderDataset(folder, 8)
    assert len(dataset) == 1
    assert "not there" in {one.name: one.reason for one in dataset.skipped}["bad.png"]


@pytest.mark.parametrize(
    ("line", "captions"),
    [
        ({"text": "a cat"}, ("a cat",)),
        ({"caption": "a cat", "id": 3}, ("a cat",)),
        ({"prompt": "a cat"}, ("a cat",)),
        ({"prompt": "no", "text": "a cat"}, ("a cat",)),
        ({"text": ["a cat", " an  animal", ""]}, ("a cat", "an animal")),
    ],
)
def test_captions_stand_in_one_of_three_columns(line: dict, captions: tuple[str, ...], tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    metadata(tmp_path, {"file_name": "a.png", **line})
    assert found(tmp_path) == {"a.png": captions}


def test_a_named_column_is_not_looked_for_in_plain_texts(tmp_path: Path) -> None:
    """Its captions would be others than those that were asked for."""
    for name in ("a", "b"):
        image(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("a text")
    (tmp_path / "b.json").write_text('{"title": "a title", "caption": "another"}')
    assert found(tmp_path) == {"a.png": ("a text",), "b.png": ("a text",)}
    files, skipped = listed(tmp_path, "title")
    assert [one.captions for one in files] == [("a title",)]
    assert [str(one.reason) for one in skipped] == ["no caption (looked for a.json)"]


def test_another_column_is_named(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    metadata(tmp_path, {"file_name": "a.png", "text": "no", "deutsch": "eine Katze"})
    assert found(tmp_path, "deutsch") == {"a.png": ("eine Katze",)}
    with pytest.raises(DataError, match=r"line 1 has no 'deutsh' .*did you mean 'deutsch'"):
        listed(tmp_path, "deutsh")


def test_csv_is_read_as_it_is_quoted(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    image(tmp_path / "b.png")
    rows = 'file_name,caption\na.png,"a ""big"" cat, black"\nb.png,"two\nlines"\n'
    (tmp_path / "metadata.csv").write_text("\ufeff" + rows, encoding="utf-8")
    assert found(tmp_path) == {"a.png": ('a "big" cat, black',), "b.png": ("two lines",)}
    (tmp_path / "metadata.csv").write_text("file_name,caption\na.png,a cat, black\n")
    with pytest.raises(DataError, match=r"metadata.csv, line 2 has other columns than"):
        listed(tmp_path)


def test_parquet_is_read(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    table = arrow.table({"file_name": ["a.png"], "text": [["a cat", "an animal"]]})
    parquet.write_table(table, tmp_path / "metadata.parquet")
    assert found(tmp_path) == {"a.png": ("a cat", "an animal")}
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"metadata.parquet cannot be read as Parquet"):
        listed(tmp_path)


def test_metadata_counts_for_its_folder_and_those_below(tmp_path: Path) -> None:
    for name in ("train/a.png", "train/deep/b.png", "test/c.png", "d.png"):
        image(tmp_path / name)
    metadata(tmp_path / "train", {"file_name": "deep/b.png", "text": "b"}, {"file_name": "a.png", "text": "a"})
    metadata(tmp_path / "test", "file_name,text", "c.png,c", name="metadata.csv")
    (tmp_path / "d.txt").write_text("d")
    assert found(tmp_path) == {"test/c.png": ("c",), "train/deep/b.png": ("b",), "train/a.png": ("a",), "d.png": ("d",)}
    image(tmp_path / "train" / "deep" / "e.png")
    assert reasons(tmp_path) == {"train/deep/e.png": "not listed in train/metadata.jsonl"}
    metadata(tmp_path / "test", {"file_name": "c.png", "text": "c"})
    with pytest.raises(DataError, match=r"has metadata.csv and metadata.jsonl: keep one"):
        listed(tmp_path)


def test_files_that_metadata_names_besides_are_no_images_left_out(tmp_path: Path) -> None:
    for name in ("a.png", "masks/a.png", "b.png", "c.png", "d.png"):
        image(tmp_path / name)
    metadata(tmp_path, {"file_name": "a.png", "text": "a", "mask_file_name": "masks/a.png"})
    assert set(reasons(tmp_path)) == {"b.png", "c.png", "d.png"}
    assert len(ImageFolderDataset(tmp_path, 8)) == 1, "which are said, and no reason to refuse the folder"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ({"text": "a cat"}, 'expected a "file_name" and a "text"'),
        ({"file_name": 3, "text": "a cat"}, 'expected a "file_name"'),
        ({"file_name": "a.png", "label": "a cat"}, "has no 'text' or 'caption' or 'prompt' for the caption; it has"),
        ({"file_name": "a.png", "text": {"en": "a cat"}}, "'text' is {'en': 'a cat'}, expected a caption"),
        ({"file_name": "a.png", "text": ["a", 1]}, "expected a caption, or a list of captions"),
        ('{"file_name": "a.png", "text": NaN}', "'text' is nan, expected a caption"),
        ({"file_name": "../a.png", "text": "a"}, "'../a.png' lies outside the folder"),
        ({"file_name": "/etc/x.png", "text": "a"}, "lies outside the folder"),
        ({"file_name": "a.png\0", "text": "a"}, "lies outside the folder"),
        ("['a.png', 'a cat']", "is not JSON"),
        ('["a.png"]', "is ['a.png']: expected an object like"),
        (
            '{"file_name": "a.png", "text": "a"}\n{"file_name": "a.png", "text": "b"}',
            "is listed a second time",
        ),
    ],
)
def test_metadata_that_means_nothing_is_refused_by_its_line(line: dict | str, sentence: str, tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    metadata(tmp_path, line)
    with pytest.raises(DataError) as error:
        listed(tmp_path)
    assert sentence in str(error.value)
    assert "metadata.jsonl, line" in str(error.value)


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("", "no caption"),
        (None, "no caption"),
        ([], "no caption"),
        ("a\0cat", "a caption with a NUL character"),
        ("a \ud800 cat", "a caption with half a character"),
        ("x" * 10_001, "a caption of more than 10,000 characters (10,001)"),
    ],
)
def test_captions_that_cannot_be_learned_are_said(caption: object, reason: str, tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    metadata(tmp_path, {"file_name": "a.png", "text": caption})
    assert reasons(tmp_path) == {"a.png": reason}


def test_a_large_jpeg_is_decoded_small(tmp_path: Path) -> None:
    """As scaling down from the whole decoding gives, to a few levels; turned and cropped alike."""
    gradient = Image.linear_gradient("L").resize((2048, 1536)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    gradient.save(tmp_path / "a.jpg", exif=exif, quality=95)
    with Image.open(tmp_path / "a.jpg") as opened:
        opened.load()
        whole = opened.rotate(-90, expand=True)
    whole.save(tmp_path / "a.png")
    small, exact = (read_image(tmp_path / f"a.{suffix}", 64).astype(int) for suffix in ("jpg", "png"))
    assert abs(small - exact).max() <= 3


def test_img2datasets_files_are_read(tmp_path: Path) -> None:
    """Folders of 00000/000000001.jpg with .txt and .json, and beside them what the download says of itself."""
    for number in range(4):
        stem = image(tmp_path / "00000" / f"{number:09}.jpg").with_suffix("")
        stem.with_suffix(".json").write_text(
            json.dumps({"caption": f"json {number}", "url": "x", "alt": f"alt {number}"})
        )
        if number % 2:
            stem.with_suffix(".txt").write_text(f"text {number}")
    (tmp_path / "00000_stats.json").write_text('{"failed_to_download": 3}')
    (tmp_path / "00000.parquet").write_bytes(b"PAR1")
    assert list(found(tmp_path).values()) == [("json 0",), ("text 1",), ("json 2",), ("text 3",)]
    assert list(found(tmp_path, "alt").values()) == [(f"alt {number}",) for number in range(4)]
    assert ImageFolderDataset(tmp_path, 8).names[0] == "00000/000000000.jpg"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "its caption is not JSON (a.json)"),
        ('{"url": "x"}', "no 'text' or 'caption' or 'prompt' in its JSON (a.json)"),
        ("[1]", "no 'text' or 'caption' or 'prompt' in its JSON (a.json)"),
        ('{"caption": {}}', "its caption is no text (a.json)"),
        ('{"caption": null}', "its caption is empty (a.json)"),
        (" " * 4_000_001, "its caption file has more than 4,000,000 bytes (a.json)"),
    ],
)
def test_json_that_has_no_caption_is_said(content: str, reason: str, tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    (tmp_path / "a.json").write_text(content)
    assert reasons(tmp_path) == {"a.png": reason}


def test_texts_without_an_image_are_said_and_refuse_nothing(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    for name in ("a.txt", "README.txt", "gone.caption", "more.txt"):
        (tmp_path / name).write_text("text")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "only.txt").write_text("no image in this folder")
    assert reasons(tmp_path) == dict.fromkeys(
        ("README.txt", "gone.caption", "more.txt"), "a text without an image beside it"
    )
    assert len(ImageFolderDataset(tmp_path, 8)) == 1


def test_one_image_by_two_paths_is_one(tmp_path: Path) -> None:
    image(tmp_path / "deep" / "a.png")
    image(tmp_path / "b.png")
    metadata(tmp_path, {"file_name": "deep/../b.png", "text": "b"}, {"file_name": "./deep//a.png", "text": "a"})
    assert found(tmp_path) == {"b.png": ("b",), "deep/a.png": ("a",)}
    metadata(tmp_path, {"file_name": "b.png", "text": "b"}, {"file_name": "deep/../b.png", "text": "b"})
    with pytest.raises(DataError, match=r"line 2: 'deep/\.\./b\.png' is listed a second time"):
        listed(tmp_path)


def test_a_folder_by_another_path_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image(tmp_path / "images" / "a.png")
    (tmp_path / "x").mkdir()
    metadata(tmp_path / "images", {"file_name": "a.png", "text": "a"})
    monkeypatch.chdir(tmp_path / "images")
    for path in (Path("."), tmp_path / "x" / ".." / "images", Path("../images")):
        files, skipped = listed(path)
        assert ([one.file.resolve() for one in files], skipped) == ([tmp_path / "images" / "a.png"], [])


def test_large_metadata_is_read_line_by_line(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}\n' * 2 + "broken\n")
    every = iterate_captioned_files(tmp_path)
    assert next(every) == CaptionedFile(file=tmp_path / "a.png", captions=("a",))


def test_a_folder_that_cannot_be_listed_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "closed").mkdir()
    scan = os.scandir

    def refuse(folder: Path | str):
        if Path(folder).name == "closed":
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    for read in (listed, open_images):
        with pytest.raises(DataError, match=r"closed cannot be listed \(Permission denied\): its images would be left"):
            read(tmp_path)


def test_metadata_that_is_no_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").mkdir()
    with pytest.raises(DataError, match=r"metadata\.jsonl cannot be read: Is a directory"):
        listed(tmp_path)


def test_metadata_that_comes_too_late_for_a_folder_is_refused(tmp_path: Path) -> None:
    """An image that stands beside its caption is not learned a second time by metadata of another folder."""
    image(tmp_path / "m" / "a.png")
    (tmp_path / "m" / "a.txt").write_text("a")
    metadata(tmp_path / "captions", {"file_name": "../m/a.png", "text": "from elsewhere"})
    assert found(tmp_path) == {"m/a.png": ("from elsewhere",)}
    (tmp_path / "captions").rename(tmp_path / "z")
    with pytest.raises(DataError, match=r"line 1: '\.\./m/a\.png' was listed before this file was read: move it up"):
        listed(tmp_path)


def test_masks_by_any_path_are_no_images_left_out(tmp_path: Path) -> None:
    for name in ("a.png", "masks/a.png"):
        image(tmp_path / name)
    metadata(tmp_path, {"file_name": "a.png", "text": "a", "mask_file_name": "deep/../masks/a.png"})
    assert found(tmp_path) == {"a.png": ("a",)}
