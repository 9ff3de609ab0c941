"""The report on a folder: each count is of images made to be counted."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gobelin import scenes
from gobelin.data import ImageFolderDataset
from gobelin.data.folder_report import FolderReport, report_folder


@pytest.fixture
def report(tmp_path: Path) -> FolderReport:
    generator = np.random.default_rng(0)

    def noise(name: str, size: tuple[int, int] = (80, 80), text: str = "a plain picture", **options) -> Image.Image:
        levels = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(levels).resize(size, Image.Resampling.BICUBIC)
        image.save(tmp_path / name, **options)
        (tmp_path / name).with_suffix(".txt").write_text(text)
        return image

    for number in range(4):
        noise(f"plain{number}.png")
    noise("small.png", (20, 30))
    noise("wide.png", (300, 100))
    turned = Image.Exif()
    turned[0x0112] = 6
    noise("turned.jpg", (200, 64), exif=turned)
    noise("long.png", text="one two three " * 30)
    whole = noise("first.png", text="quite unique")
    (tmp_path / "second.png").write_bytes((tmp_path / "first.png").read_bytes())
    (tmp_path / "second.txt").write_text("a copy")
    whole.save(tmp_path / "third.jpg", quality=80)
    (tmp_path / "third.txt").write_text("a copy in another format")
    whole.convert("CMYK").save(tmp_path / "cmyk.tif")
    (tmp_path / "cmyk.txt").write_text("a copy in CMYK")
    Image.fromarray(np.full((70, 70), 20_000, np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "deep.txt").write_text("deep")
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "film.txt").write_text("a film")
    Image.new("RGBA", (64, 64), (0, 200, 0, 90)).save(tmp_path / "glass.png")
    (tmp_path / "glass.txt").write_text("glass")
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "broken.txt").write_text("broken")
    return report_folder(ImageFolderDataset(tmp_path, 64), 1000, 24)


def test_every_count_is_of_what_was_made(report: FolderReport) -> None:
    assert report.images == 15
    assert [skip.name for skip in report.skipped] == ["broken.png"]
    assert report.formats == {"PNG": 11, "JPEG": 2, "TIFF": 1, "GIF": 1}
    assert report.enlarged == ("small.png",)
    assert report.cropped == ("small.png", "turned.jpg", "wide.png")
    assert report.cut == ("long.png",)
    assert report.duplicates == (("first.png", "second.png"),)
    assert report.near_duplicates == (("cmyk.tif", "first.png", "third.jpg"),)
    assert (report.widths[0], report.widths[2]) == (20, 300)
    assert report.heights[2] == 200, "turned as its EXIF says"
    assert (report.captions, report.distinct_captions) == (15, 9)
    assert report.encodings == {
        "transparent, laid on the background": 1,
        "turned by EXIF": 1,
        "animated, first frame taken": 1,
        "16 bits or more, scaled to 8": 1,
        "CMYK, converted": 1,
        "palette": 1,
    }


def test_drawings_on_one_ground_are_not_all_alike(tmp_path: Path) -> None:
    for index in range(60):
        Image.fromarray(scenes.sample(1, index, scenes.NANO, "train").image).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text("a scene")
    Image.open(tmp_path / "7.png").save(tmp_path / "again.jpg", quality=90)
    (tmp_path / "again.txt").write_text("a scene")
    assert report_folder(ImageFolderDataset(tmp_path, 64), 1000, 24).near_duplicates == (("7.png", "again.jpg"),)


def test_lines_say_what_to_look_at(report: FolderReport) -> None:
    said = "\n".join(report.lines())
    for part in (
        "15 captioned images can be used, 1 skipped",
        "1 images smaller than 64 pixels and enlarged: small.png",
        "3 images lose more than a third to the crop",
        "1 images have captions of more than 24 tokens",
        "2 images are the same file as another, in 1 groups",
        "3 images are nearly the same image as another",
        "skipped, not a readable image: 1",
    ):
        assert part in said


def test_buckets_count_those_that_have_images(tmp_path: Path) -> None:
    for number, size in enumerate(((64, 64), (80, 80), (200, 100))):
        Image.effect_noise(size, 50).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("noise")
    report = report_folder(ImageFolderDataset(tmp_path, 64, buckets=True), 1000, 24)
    assert report.buckets == {"64×64": 2, "80×48": 1}
    assert report.cropped_away == pytest.approx((1 - (80 / 48) / 2) / 3)
    padded = report_folder(ImageFolderDataset(tmp_path, 64, buckets=True, fit="pad"), 1000, 24)
    assert (padded.cropped_away, padded.cropped) == (0, ())
