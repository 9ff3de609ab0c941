"""A folder of captioned images: what is found, what is skipped and why, what is refused."""

import json

import numpy as np
import pytest
from PIL import Image

from gobelin.data import ImageFolderDataset
from gobelin.data.image_folder import read_image
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
        "2.png": "no caption (looked for 2.txt, 2.caption and 2.png.txt)",
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
