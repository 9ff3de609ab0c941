"""Images held out of training."""

from PIL import Image

from gobelin.data import ImageFolderDataset
from gobelin.data.subset import split_held_out


def folder(path, names, twice=None):
    path.mkdir()
    twice = twice or {}
    for number, name in enumerate(names):
        shade = twice.get(number, number)
        Image.new("RGB", (8, 8), (shade, 255 - shade, 0)).save(path / f"{name}.png")
        (path / f"{name}.txt").write_text(f"shade {shade}")
    return ImageFolderDataset(path, 16)


def captions(dataset):
    return {dataset.captions(index) for index in range(len(dataset))}


def test_a_tenth_at_most_is_held_out_whatever_the_files_are_called(tmp_path):
    first = folder(tmp_path / "a", [f"{number:03d}" for number in range(200)])
    training, held_out = split_held_out(first, 64)
    assert (len(training), len(held_out)) == (180, 20)
    assert captions(training) | captions(held_out) == captions(first)
    assert not captions(training) & captions(held_out)
    again = folder(tmp_path / "b", [f"x{399 - number:03d}" for number in range(200)])
    assert captions(split_held_out(again, 64)[1]) == captions(held_out)
    assert (training[3].image == first[int(training._rows[3])].image).all()
    assert training.hashes[3] == first.hashes[int(training._rows[3])]
    assert training.fingerprint != held_out.fingerprint


def test_a_few_images_are_all_trained_on(tmp_path):
    few = folder(tmp_path / "few", ["a", "b"])
    assert split_held_out(few, 64) == (few, None)


def test_an_image_that_is_there_twice_is_on_one_side(tmp_path):
    data = folder(
        tmp_path / "data",
        [f"{number:03d}" for number in range(320)],
        {number: number - 160 for number in range(160, 320)},
    )
    training, held_out = split_held_out(data, 20)
    assert not captions(training) & captions(held_out)
