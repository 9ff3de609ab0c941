"""``gobelin data check``, as a user meets it: a folder or tars, buckets, and what is not used."""

import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

SIDES = ((100, 100), (200, 100), (100, 200), (40, 40))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(8):
        Image.effect_noise(SIDES[number % 4], 60 + number).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}")
    Image.new("RGBA", (90, 90), (0, 255, 0, 0)).save(folder / "clear.png")
    (folder / "clear.txt").write_text("clear")
    (folder / "no\ncaption.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "README.txt").write_text("about")
    return folder


def test_buckets_are_reported_and_drawn(gobelin, images: Path, tmp_path: Path) -> None:
    sheet, report = tmp_path / "sheet.png", tmp_path / "report.json"
    status, out, err = gobelin(
        *("data", "check", images, "--size", 64, "--buckets", "--sheet", sheet, "--json", report),
    )
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "9 captioned images can be used, 2 skipped"
    assert (
        "buckets, width×height: 48×80 (2), 64×64 (5), 80×48 (2); an image loses 7.4% to the crop in the mean" in lines
    )
    assert "2 images smaller than their size and enlarged: 3.png, 7.png" in lines
    assert "skipped, no caption: 1" in lines
    assert "  README.txt: a text without an image beside it" in lines
    assert any(line.startswith(r"  no\ncaption.png: no caption (looked for") for line in lines)
    assert sheet.is_file()
    said = json.loads(report.read_text())
    assert said["buckets"] == {"48×80": 2, "64×64": 5, "80×48": 2}
    assert [one["name"] for one in said["skipped"]] == ["no\\ncaption.png", "README.txt"]
    assert said["reasons"] == {"no caption": 1, "a text without an image beside it": 1}


def test_images_are_padded_on_a_background(gobelin, images: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    status, out, err = gobelin("data", "check", images, "--fit", "pad", "--background", "#ff00ff", "--sheet", sheet)
    assert (status, err) == (0, "")
    assert "trained at 64×64 pixels; padded\n" in out
    assert "lose more than a third" not in out
    colours = Image.open(sheet).convert("RGB").getcolors(10**6)
    assert {colour: count for count, colour in colours}[(255, 0, 255)] > 96 * 96


def test_tars_are_checked_and_their_index_is_kept(gobelin, images: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for file in sorted(images.iterdir()):
            tar.add(file, file.name)
    for _ in range(2):
        status, out, err = gobelin("data", "check", tmp_path / "a.tar", "--index", tmp_path / "index")
        assert (status, err) == (0, "")
        assert out.startswith("9 captioned images can be used, 2 skipped\n")
        assert "skipped, a sample with a caption and no image: 1\n" in out
        assert "4 images lose more than a third to the crop: a.tar/1.png, a.tar/2.png, a.tar/5.png and 1 more\n" in out
    assert (tmp_path / "index" / "index.json").is_file()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--background", "nope"), "background is 'nope': give an opaque colour, as white, grey or #f0f0f0"),
        (("--buckets", "--size", 60), "buckets of 60 pixels have sides in multiples of 16: give a size that is one"),
        (("--index", "."), "is no index of pairs: it has no index.json"),
        (("--size", 0), "--size is 0: give 1 pixel or more"),
    ],
)
def test_options_that_mean_nothing_are_refused(refused, images: Path, options: tuple, sentence: str) -> None:
    status, said = refused("data", "check", images, *options)
    assert status in (1, 2)
    assert sentence in said
