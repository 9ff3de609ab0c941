"""Images of another program: the list written, the folder scored, and what is refused."""

import json

import numpy as np
import pytest
from PIL import Image

from gobelin import scenes
from gobelin.errors import DataError, UsageError
from gobelin.evaluate.benchmark import task_scores
from gobelin.evaluate.gallery import read_gallery, write_image_list
from gobelin.evaluate.image_list import requested_images
from gobelin.evaluate.scored_images import score_images

WORLD = scenes.CORE


@pytest.fixture
def folder(tmp_path, portrait):
    """A list of ten pictures, all painted right."""
    out = tmp_path / "elsewhere"
    requests = requested_images(WORLD, ("dev",), ("counting", "position"), limit=3, count=2)[:10]
    write_image_list(out, requests, WORLD, seed=5)
    for each in requests:
        portrait(each.prompt, WORLD).save(out / each.file_name)
    return out


def lines(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def rewrite(folder, entries):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def test_what_is_written_is_read_back_and_scored(folder):
    requests = requested_images(WORLD, ("dev",), ("counting", "position"), limit=3, count=2)[:10]
    gallery = read_gallery(folder)
    assert gallery.world == WORLD
    assert gallery.requests == requests
    assert gallery.resized == 0
    assert [line["seed"] for line in lines(folder)] == [each.seed + 5 for each in requests]
    with Image.open(folder / requests[0].file_name) as image:
        assert np.array_equal(np.asarray(image), np.asarray(gallery.images[0])), "the pixels as they are"
    for row in task_scores(score_images(gallery.requests, gallery.images, WORLD)):
        assert row.exact.value == 1


def test_a_picture_under_the_wrong_name_is_wrong(folder):
    entries = lines(folder)
    entries[0]["file_name"], entries[-1]["file_name"] = entries[-1]["file_name"], entries[0]["file_name"]
    rewrite(folder, entries)
    gallery = read_gallery(folder)
    scores = [picture.score.correct for picture in score_images(gallery.requests, gallery.images, WORLD)]
    assert scores == [False, *[True] * 8, False]


def test_file_name_and_text_are_enough_where_the_world_is_said(folder):
    rewrite(folder, [{key: line[key] for key in ("file_name", "text")} for line in lines(folder)])
    with pytest.raises(DataError, match="does not name the world of its prompts: say --world NAME"):
        read_gallery(folder)
    gallery = read_gallery(folder, WORLD)
    assert [each.prompt.task for each in gallery.requests] == ["counting"] * 6 + ["position"] * 4
    assert [each.repeat for each in gallery.requests[:6]] == [0, 0, 0, 1, 1, 1]


def test_pictures_of_another_size_are_resized_and_counted(folder):
    for name in ("dev-counting-000-0.png", "dev-position-000-0.png"):
        with Image.open(folder / name) as image:
            image.resize((256, 256), Image.Resampling.LANCZOS).save(folder / name)
    gallery = read_gallery(folder)
    assert gallery.resized == 2
    assert {image.size for image in gallery.images} == {(64, 64)}
    assert all(picture.score.exact for picture in score_images(gallery.requests, gallery.images, WORLD))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda e: e[2].update(text="a zebra"), r"line 3: 'a zebra' is not a prompt of the world core's lists"),
        (lambda e: e[2].update(task="position"), r"line 3: '.*' is not a prompt"),
        (lambda e: e[2].update(task="juggling"), r"line 3: Expected a task of"),
        (lambda e: e[3].update(file_name=e[0]["file_name"]), r"line 4: .* is named in line 1 already"),
        (lambda e: e[3].update(file_name="../x.png"), r"line 4: ../x.png lies outside the folder"),
        (lambda e: e[3].update(file_name="gone.png"), r"gone.png cannot be scored: no such file"),
        (lambda e: e[3].pop("text"), r"line 4: expected an object like"),
        (lambda e: e[3].update(world="nano"), r"line 4: generated for the world nano, not core"),
        (lambda e: e.clear(), r"is empty: expected a line for each image"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(folder, damage, message):
    entries = lines(folder)
    damage(entries)
    rewrite(folder, entries)
    with pytest.raises(DataError, match=message):
        read_gallery(folder)


def test_pictures_that_cannot_be_used_are_named(folder, tmp_path):
    name = lines(folder)[1]["file_name"]
    (folder / name).write_bytes(b"broken")
    with pytest.raises(DataError, match=f"{name} cannot be scored: not a readable image"):
        read_gallery(folder)
    Image.new("RGB", (64, 32)).save(folder / name)
    with pytest.raises(DataError, match=r"is 64×32 pixels: expected a square, best 64×64"):
        read_gallery(folder)
    with pytest.raises(DataError, match="cannot be read: expected the list that gobelin evaluate prompts"):
        read_gallery(tmp_path)
    with pytest.raises(DataError, match="is not empty: choose another folder"):
        write_image_list(folder, [], WORLD)
    rewrite(folder, [{**lines(folder)[0], "world": "mars"}])
    with pytest.raises(UsageError, match="unknown world 'mars'"):
        read_gallery(folder)
