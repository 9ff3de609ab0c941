"""Scenes as a dataset, and as a folder; the grader's calibration from the command line."""

import json

import numpy as np
import pytest
from PIL import Image

from gobelin import scenes
from gobelin.cli.data import run
from gobelin.data import SceneDataset, find_world
from gobelin.errors import UsageError
from gobelin.formats.files import read_json
from gobelin.pipeline import shipped_model


def test_entries_are_the_scenes():
    dataset = SceneDataset(world=scenes.NANO, count=5, seed=3)
    sample = scenes.sample(3, 4, scenes.NANO)
    assert (dataset[4].image == sample.image).all()
    assert dataset[4].caption == sample.caption
    assert sample.caption not in dataset[4].negatives


def test_it_ends_where_its_length_says():
    dataset = SceneDataset(world=scenes.NANO, count=3)
    assert [pair.caption for pair in dataset] == [dataset[index].caption for index in range(3)]
    for index in (3, -1):
        with pytest.raises(IndexError, match=f"there is no scene {index}: the last is 2"):
            dataset[index]


def test_an_unknown_world_is_told_the_choices():
    with pytest.raises(UsageError, match="unknown world 'mars': the choices are core, nano, rich"):
        find_world("mars")


def test_rich_scenes_are_written_with_their_truth(tmp_path):
    run(["scenes", "--out", str(tmp_path / "rich"), "--count", "12", "--world", "rich", "--seed", "3"])
    lines = (tmp_path / "rich" / "metadata.jsonl").read_text().splitlines()
    assert len(lines) == 12
    for index, line in enumerate(lines):
        entry, made = json.loads(line), scenes.sample(3, index, scenes.RICH)
        assert entry["text"] == made.caption
        assert scenes.Scene.from_json(entry["scene"]) == made.scene
        assert [(word, tuple(things)) for word, things in entry["words"]] == list(made.words)
        image = np.asarray(Image.open(tmp_path / "rich" / entry["file_name"]))
        masks = np.asarray(Image.open(tmp_path / "rich" / "masks" / entry["file_name"]))
        assert np.array_equal(image, made.image)
        assert all(np.array_equal(masks == number, mask) for number, mask in enumerate(made.masks, 1))


def test_the_grader_is_measured_and_written(tmp_path, capsys):
    world = read_json(shipped_model() / "gobelin.json")["world"]
    report = tmp_path / "grader.json"
    run(["grader", "--world", world, "--count", "2", "--vae", str(shipped_model()), "--json", str(report)])
    measured = json.loads(report.read_text())
    assert measured["renders"] == measured["round_trips"] == dict.fromkeys(scenes.WORLDS[world].categories, 1)
    assert measured["count"] == 2
    out = capsys.readouterr().out
    assert "VAE round trip" in out
    assert "blobs" in out


def test_a_grader_of_nothing_is_refused():
    with pytest.raises(UsageError, match="--count is 0"):
        run(["grader", "--count", "0"])
