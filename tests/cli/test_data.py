"""``gobelin data check`` and ``cache``, as a user meets them: folders or tars, buckets, what is there already."""

import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from gobelin.data.cache_use import measure_cache
from gobelin.vae import VAE

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


def cached(gobelin, *arguments) -> list[str]:
    status, out, err = gobelin("data", "cache", *arguments, "--device", "cpu")
    assert status == 0, err
    return out.splitlines()


def counts(lines: list[str]) -> dict[str, tuple[int, int]]:
    """Rows that were there and that were computed, by kind."""
    found = [re.match(r"(.*): (\d+) there, (\d+) computed, [\d.]+ MB in all$", line) for line in lines]
    return {one[1]: (int(one[2]), int(one[3])) for one in found if one}


def test_a_cache_is_filled_once_and_training_reads_it(gobelin, images: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    lines = cached(gobelin, images, "--out", cache)
    # nine captions, and the empty one
    assert counts(lines) == {"pixels": (0, 9), "latents": (0, 9), "text embeddings": (0, 10)}
    assert lines[-1] == str(cache)
    assert counts(cached(gobelin, images, "--out", cache)) == {
        "pixels": (9, 0),
        "latents": (9, 0),
        "text embeddings": (10, 0),
    }
    rows = {name: use.rows for name, use in measure_cache(cache).items()}
    status, _, err = gobelin(
        *("train", "--preset", "lora", "--data.path", images, "--data.cache", cache, "--out", tmp_path / "run"),
        *("--device", "cpu", "--samples", 0, "--unet.optim.steps", 1, "--unet.optim.batch-size", 1),
    )
    assert status == 0, err
    assert {name: use.rows for name, use in measure_cache(cache).items()} == rows, "nothing is computed by training"


def test_what_changed_is_computed_and_what_is_left_of_others_is_said(gobelin, images: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cached(gobelin, images, "--out", cache)
    (images / "0.txt").write_text("another caption")
    Image.new("RGB", (100, 100), "red").save(images / "1.png")
    found = counts(cached(gobelin, images, "--out", cache))
    assert found == {"pixels": (8, 1), "latents": (8, 1), "text embeddings": (9, 1)}
    lines = cached(gobelin, images, "--out", cache, "--size", 32, "--flip")
    assert counts(lines) == {"pixels": (0, 9), "latents": (0, 18), "text embeddings": (10, 0)}
    (left,) = [line for line in lines if line.startswith("of other models")]
    assert re.fullmatch(r"of other models, sizes or settings: 2 folders, \d+\.\d MB; nothing is removed", left)
    assert counts(cached(gobelin, images, "--out", cache))["latents"] == (9, 0), "what was there is kept"


def test_an_interrupted_cache_goes_on(gobelin, images: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VAE, "encode", lambda self, images: (_ for _ in ()).throw(KeyboardInterrupt))
        assert gobelin("data", "cache", images, "--out", cache, "--device", "cpu")[0] != 0
    assert counts(cached(gobelin, images, "--out", cache)) == {
        "pixels": (9, 0),
        "latents": (0, 9),
        "text embeddings": (0, 10),
    }


@pytest.mark.slow  # two processes that import everything
def test_two_at_once_fill_one_cache(gobelin, images: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gobelin", "data", "cache", images, "--out", tmp_path / "cache", "--device", "cpu"]
    both = [subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    for process in both:
        _, err = process.communicate()
        assert process.returncode == 0, err.decode()
    assert counts(cached(gobelin, images, "--out", tmp_path / "cache"))["latents"] == (9, 0)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--size", 40), "size is 40: give a multiple of 16"),
        (("--model", "nowhere"), "no model at nowhere: expected a folder"),
        (("--device", "magic"), "unknown device 'magic'"),
    ],
)
def test_a_cache_that_cannot_be_filled_is_refused(gobelin, images: Path, tmp_path: Path, options, sentence) -> None:
    status, out, err = gobelin("data", "cache", images, "--out", tmp_path / "cache", *options)
    assert status in (1, 2)
    assert out == ""
    assert sentence in err.splitlines()[-1]


def test_a_cache_needs_a_folder(refused, images: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("dear")
    assert "is a file: give a folder for the cache" in refused("data", "cache", images, "--out", tmp_path / "file")[1]
    assert "--out is missing" in refused("data", "cache", images)[1]
