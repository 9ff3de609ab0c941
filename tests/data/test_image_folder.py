"""A folder of captioned images: what is found, what is skipped and why, what is refused."""

import gc
import hashlib
import json
import os
import pathlib
import pickle
import random
import threading
import time
import tracemalloc
from dataclasses import replace

import jaxtyping
import numpy as np
import pytest
from PIL import Image

from gobelin.data import Dataset, ImageFolderDataset, image_folder, indexed_images
from gobelin.data.captioned_files import CaptionedFile
from gobelin.data.image_folder import read_image
from gobelin.data.pair_index import Pair
from gobelin.data.webdataset import open_images
from gobelin.errors import DataError


def picture(file, colour="red", size=(20, 10), mode="RGB"):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(file)


def test_text_files_beside_images_are_captions(tmp_path):
    for name, colour in (("a.png", "red"), ("deep/b.jpg", "blue")):
        picture(tmp_path / name, colour)
        (tmp_path / name).with_suffix(".txt").write_text(f"  a {colour}\n picture ")
    dataset = ImageFolderDataset(tmp_path, 8)
    assert [dataset[index].caption for index in range(len(dataset))] == ["a red picture", "a blue picture"]
    assert dataset[0].image.shape == (8, 8, 3)
    assert dataset[0].image.dtype == np.uint8
    assert dataset[0].image[4, 4].tolist() == [255, 0, 0]


def test_metadata_names_images_and_captions(tmp_path):
    picture(tmp_path / "x.png", "lime")
    picture(tmp_path / "unlisted.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "x.png", "text": "Ünïcode"}) + "\n\n")
    dataset = ImageFolderDataset(tmp_path, 8)
    assert len(dataset) == 1
    assert dataset[0].caption == "Ünïcode"


def test_images_without_captions_are_taken_where_none_are_required(tmp_path):
    for number in range(4):
        picture(tmp_path / f"{number}.png")
    (tmp_path / "1.txt").write_text("red")
    (tmp_path / "2.png").write_text("not an image at all")
    dataset = open_images(tmp_path, 8, require_captions=False)
    assert list(dataset.names) == ["0.png", "1.png", "3.png"]
    assert [dataset.captions(index) for index in range(3)] == [(), ("red",), ()]
    assert [(skip.name, skip.reason) for skip in dataset.skipped] == [("2.png", "not a readable image")]
    with pytest.raises(DataError, match="only 1 of 4 images can be used"):
        open_images(tmp_path, 8)
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "0.png", "text": ""}\n{"file_name": "1.png", "text": "red"}'
    )
    dataset = open_images(tmp_path, 8, require_captions=False)
    assert [dataset.captions(index) for index in range(len(dataset))] == [(), ("red",)]
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="none has no images: expected some"):
        open_images(tmp_path / "none", 8, require_captions=False)


def test_bad_images_are_named_skipped_and_counted(tmp_path):
    for number in range(6):
        picture(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("red")
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: whole.index(b"IDAT") + 8])
    (tmp_path / "2.txt").unlink()
    (tmp_path / "3.png").write_text("not an image at all")
    dataset = ImageFolderDataset(tmp_path, 8)
    assert len(dataset) == 3
    assert {skip.name: skip.reason for skip in dataset.skipped} == {
        "1.png": "truncated",
        "2.png": "no caption (looked for 2.txt, 2.caption, 2.json and 2.png.txt)",
        "3.png": "not a readable image",
    }
    assert "skipped 3: 2.png (no caption" in dataset.description


def test_a_folder_with_nothing_or_little_to_learn_from_is_refused(tmp_path):
    with pytest.raises(DataError, match="no folder at"):
        ImageFolderDataset(tmp_path / "nowhere", 8)
    with pytest.raises(DataError, match="has no captioned images"):
        ImageFolderDataset(tmp_path, 8)
    for number in range(3):
        picture(tmp_path / f"{number}.png")
    (tmp_path / "0.txt").write_text("red")
    with pytest.raises(DataError, match=r"only 1 of 3 images can be used.*no caption"):
        ImageFolderDataset(tmp_path, 8)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "line 2 is not JSON"),
        ('{"text": "no file name"}', 'line 2: expected a "file_name"'),
        ('{"file_name": "../secret.png", "text": "out"}', "lies outside the folder"),
    ],
)
def test_a_broken_line_of_metadata_is_named(tmp_path, line, message):
    picture(tmp_path / "x.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "x.png", "text": "x"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        ImageFolderDataset(tmp_path, 8)


def test_images_are_upright_opaque_and_cropped_to_the_middle(tmp_path):
    turned = Image.new("RGB", (8, 16), "white")
    turned.paste("red", (0, 0, 8, 8))  # the upper half; EXIF 6 turns it to the right
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    image = read_image(tmp_path / "turned.png", 8)
    assert image[4, 1].tolist() == [255, 255, 255]
    assert image[4, 6].tolist() == [255, 0, 0]

    picture(tmp_path / "clear.png", (0, 0, 0, 0), mode="RGBA")
    assert read_image(tmp_path / "clear.png", 8).min() == 255

    wide = Image.new("RGB", (30, 10), "white")
    wide.paste("blue", (10, 0, 20, 10))
    wide.save(tmp_path / "wide.png")
    assert (read_image(tmp_path / "wide.png", 10) == [0, 0, 255]).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "I;16", "CMYK"])
def test_every_kind_of_pixel_becomes_rgb(tmp_path, mode):
    suffix = ".jpg" if mode == "CMYK" else ".png"
    Image.new(mode, (9, 7)).save(tmp_path / f"x{suffix}")
    assert read_image(tmp_path / f"x{suffix}", 8).shape == (8, 8, 3)


def captioned(folder, count=6):
    for number in range(count):
        picture(folder / f"{number}.png", (40 * number, 0, 0), (20 + number, 10))
        (folder / f"{number}.txt").write_text(f"picture {number}")
    return folder


@pytest.fixture
def opened(monkeypatch):
    """The names of the images that are opened."""
    names = []
    inspect = image_folder.inspect_image
    monkeypatch.setattr(image_folder, "inspect_image", lambda one: names.append(one.name) or inspect(one))
    return names


def test_every_image_once_by_index(tmp_path):
    folder = captioned(tmp_path / "images", 40)
    dataset = ImageFolderDataset(folder, 8)
    assert isinstance(dataset, Dataset)
    assert sorted(dataset.names) == sorted(f"{number}.png" for number in range(40))
    for index, name in enumerate(dataset.names):
        assert dataset.captions(index) == dataset[index].captions == (f"picture {name.removesuffix('.png')}",)
        assert dataset.hashes[index] == hashlib.sha256((folder / name).read_bytes()).digest()
        assert (dataset[index].image == read_image(folder / name, 8)).all()
    again = pickle.loads(pickle.dumps(dataset))
    assert [entry.captions for entry in again] == [entry.captions for entry in dataset]


def test_what_is_known_is_not_opened_again(tmp_path, opened):
    folder, index = captioned(tmp_path / "images"), tmp_path / "index"
    first = ImageFolderDataset(folder, 8, index=index)
    assert len(opened) == 6
    opened.clear()
    again = ImageFolderDataset(folder, 16, index=index)
    assert opened == []
    assert list(again.index) == list(first.index)

    picture(folder / "new.png")
    (folder / "new.txt").write_text("new")
    picture(folder / "2.png", "blue", (33, 10))
    (folder / "3.txt").write_text("other words")
    (folder / "4.png").unlink()
    (folder / "5.png").write_bytes(b"broken")
    changed = ImageFolderDataset(folder, 8, index=index)
    assert sorted(opened) == ["2.png", "5.png", "new.png"]
    fresh = ImageFolderDataset(folder, 8)
    assert list(changed.index) == list(fresh.index)
    assert list(changed.skipped) == list(fresh.skipped)
    assert changed.fingerprint == fresh.fingerprint


def test_an_image_that_is_replaced_at_the_same_size_is_noticed(tmp_path, opened):
    folder, index = tmp_path / "images", tmp_path / "index"
    picture(folder / "a.ppm", "red")
    (folder / "a.txt").write_text("a")
    first = ImageFolderDataset(folder, 8, index=index)
    time = (folder / "a.ppm").stat().st_mtime_ns
    picture(folder / "a.ppm", "blue")
    os.utime(folder / "a.ppm", ns=(time, time + 1))
    second = ImageFolderDataset(folder, 8, index=index)
    assert opened == ["a.ppm", "a.ppm"]
    assert first.fingerprint != second.fingerprint


def test_the_fingerprint_is_of_what_is_learned(tmp_path):
    folder = captioned(tmp_path / "images")
    first = ImageFolderDataset(folder, 8).fingerprint
    os.utime(folder / "1.png", (0, 0))
    assert ImageFolderDataset(folder, 8).fingerprint == first, "a file that was touched"
    folder.rename(tmp_path / "moved")
    folder = tmp_path / "moved"
    assert ImageFolderDataset(folder, 8).fingerprint == first, "a folder that was moved"
    seen = {first}
    for options in ({"size": 64}, {"size": 64, "buckets": True}, {"fit": "pad"}, {"background": "blue"}):
        seen.add(ImageFolderDataset(folder, **{"size": 8} | options).fingerprint)
    assert len(seen) == 5, "other pixels"
    (folder / "1.txt").write_text("another caption")
    seen.add(ImageFolderDataset(folder, 8).fingerprint)
    picture(folder / "2.png", "blue", (22, 10))
    seen.add(ImageFolderDataset(folder, 8).fingerprint)
    (folder / "3.png").rename(folder / "9.png")
    (folder / "3.txt").rename(folder / "9.txt")
    seen.add(ImageFolderDataset(folder, 8).fingerprint)
    (folder / "9.png").unlink()
    seen.add(ImageFolderDataset(folder, 8).fingerprint)
    assert len(seen) == 9


def test_a_folder_with_other_files_is_no_index(tmp_path):
    folder = captioned(tmp_path / "images")
    with pytest.raises(DataError, match=r"images is no index of pairs: it has no index\.json"):
        ImageFolderDataset(folder, 8, index=folder)
    assert len(list(folder.iterdir())) == 12


def test_a_temporary_index_goes_with_its_data_set(tmp_path):
    dataset = ImageFolderDataset(captioned(tmp_path / "images"), 8)
    place = dataset.index.folder
    assert place.is_dir()
    del dataset
    gc.collect()
    assert not place.exists()


def test_images_are_verified_in_threads_and_stay_in_order(tmp_path, monkeypatch):
    folder = captioned(tmp_path / "images", 30)
    inspect = image_folder.inspect_image
    used = set()

    def slow(one):
        used.add(threading.get_ident())
        time.sleep(0.02 * random.Random(one.name).random())
        return inspect(one)

    monkeypatch.setattr(image_folder, "inspect_image", slow)
    monkeypatch.setattr(indexed_images, "_THREADS", 6)
    told = []
    dataset = ImageFolderDataset(folder, 8, advance=lambda done, total: told.append((done, total)))
    assert list(dataset.names) == sorted(f"{number}.png" for number in range(30))
    assert told == [(number, 30) for number in range(1, 31)]
    assert len(used) == 6


def test_names_of_every_kind_are_read(tmp_path):
    names = ["two\nlines", "日本 ünï", " space ", "a.b.c", "-dash", "100%", "'\"", "x" * 200]
    names.append(b"caf\xe9".decode("utf-8", "surrogateescape"))
    for name in names:
        picture(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"text of {name!a}")
    dataset = ImageFolderDataset(tmp_path, 8)
    assert sorted(dataset.names) == sorted(f"{name}.png" for name in names)
    assert len(list(dataset)) == len(names)
    (tmp_path / "two\nlines.txt").unlink()
    (tmp_path / f"{names[-1]}.txt").unlink()
    description = ImageFolderDataset(tmp_path, 8).description
    assert r"two\nlines.png (no caption" in description
    assert r"caf\udce9.png" in description
    description.encode("utf-8")


def test_a_file_that_is_gone_is_said(tmp_path):
    dataset = ImageFolderDataset(captioned(tmp_path / "images"), 8)
    (tmp_path / "images" / "0.png").unlink()
    with pytest.raises(DataError, match=r"0\.png cannot be read \(No such file or directory\): was it removed"):
        dataset[0]


def test_a_cut_or_too_large_image_is_said(tmp_path):
    folder = captioned(tmp_path / "images")
    Image.effect_noise((200, 200), 90).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:-3000])
    Image.new("1", (9000, 8000)).save(folder / "large.png")
    for name in ("cut", "large"):
        (folder / f"{name}.txt").write_text(name)
    assert {one.name: one.reason for one in ImageFolderDataset(folder, 8).skipped} == {
        "cut.jpg": "truncated",
        "large.png": "more than 64 million pixels (9000×8000)",
    }


def test_memory_does_not_grow_with_the_images(tmp_path, monkeypatch):
    """An object for 20,000 images keeps less than 1 MB, captions and names included."""
    pair = Pair(name="", captions=("",), size=1, time=1, width=8, height=8, sha256=bytes(32))
    found = (CaptionedFile(file=tmp_path / f"{number:06}.png", captions=("a word " * 9,)) for number in range(20_000))
    monkeypatch.setattr(image_folder, "iterate_captioned_files", lambda folder, column: found)
    monkeypatch.setattr(image_folder, "inspect_image", lambda one: replace(pair, name=one.name, captions=one.captions))
    jaxtyping.config.update("jaxtyping_disable", True)
    tracemalloc.start()
    dataset = ImageFolderDataset(tmp_path, 64, buckets=True)
    gc.collect()
    interned = tracemalloc.Filter(False, pathlib.__file__)  # Python's table of all names ever seen, not the object's
    kept = sum(one.size for one in tracemalloc.take_snapshot().filter_traces([interned]).statistics("filename"))
    tracemalloc.stop()
    assert len(dataset) == 20_000
    assert dataset.captions(19_999) == ("a word " * 9,)
    assert kept < 1_000_000
