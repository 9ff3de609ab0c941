"""``gobelin evaluate fidelity`` on small folders: what it prints and writes, and what it refuses."""

import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from gobelin.data import ImageFolderDataset, SceneDataset, find_world
from gobelin.pipeline import shipped_model


def write_folder(folder, count, captions=True, first=0, size=64):
    """A folder of scenes, with a caption beside each."""
    folder.mkdir()
    scenes = SceneDataset(world=find_world("nano"), count=first + count)
    for index in range(first, first + count):
        image = Image.fromarray(scenes[index].image)
        image.resize((size, size)).save(folder / f"{index}.png")
        if captions:
            (folder / f"{index}.txt").write_text(scenes[index].caption)
    return folder


@pytest.fixture(scope="module")
def true(tmp_path_factory):
    """Twenty captioned images."""
    return write_folder(tmp_path_factory.mktemp("true") / "my-images", 20)


def test_a_models_images_are_compared_and_kept(gobelin, trained, true, tmp_path):
    files = {name: tmp_path / name for name in ("fidelity.json", "fidelity.md")}
    written = ("--json", files["fidelity.json"], "--report", files["fidelity.md"])
    options = ("--model", trained, "--features", shipped_model(), "--count", 6, "--steps", 1, "--device", "cpu")
    status, out, err = gobelin("evaluate", "fidelity", true, *options, *written, "--out", tmp_path / "painted")
    assert (status, err) == (0, "")
    found = json.loads(files["fidelity.json"].read_text())
    assert (found["true"], found["count"], found["size"]) == ("my-images", 6, 64)
    assert found["settings"]["steps"] == 1
    assert [(row["images"], row["count"]) for row in found["distances"]] == [("painted", 6), ("other true images", 6)]
    painted, others = found["distances"]
    assert painted["fid"] > others["fid"]  # it was trained for a moment
    assert painted["kid"]["mean"] > others["kid"]["mean"]
    assert found["clip"]["painted"]["n"] == found["clip"]["true"]["n"] == 6
    assert "the image encoder of the model tiny" in " ".join(out.split())
    assert "| other true images | 6 |" in files["fidelity.md"].read_text()

    kept = ImageFolderDataset(tmp_path / "painted", size=64)
    assert len(kept) == 6
    assert {kept.captions(index)[0] for index in range(6)} <= {file.read_text() for file in true.glob("*.txt")}
    again = ("--painted", tmp_path / "painted", "--features", shipped_model(), "--json", files["fidelity.json"])
    status, _, err = gobelin("evaluate", "fidelity", true, *again)
    assert (status, err) == (0, "")
    repeated = json.loads(files["fidelity.json"].read_text())
    assert repeated["distances"] == found["distances"], "the same images, the same figures"
    assert repeated["clip"] == found["clip"]


def test_painted_images_are_not_of_the_captions_they_are_compared_with(gobelin, trained, true, tmp_path, monkeypatch):
    from gobelin.cli import evaluate_fidelity

    sides = {}

    def measure(name, true, painted, features, *, captions, others, **rest):
        sides.update(true=set(true.rows), others=others.captions, captions=captions, rows=set(others.rows))
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate_fidelity, "measure_fidelity", measure)
    gobelin("evaluate", "fidelity", true, "--model", trained, "--features", "model", "--count", 10)
    assert sides["captions"] == sides["others"]
    assert not sides["true"] & sides["rows"]
    assert len(sides["true"]) == len(sides["rows"]) == 10


def test_a_folder_of_another_size_is_scaled_and_this_is_said(gobelin, true, tmp_path):
    painted = write_folder(tmp_path / "painted", 8, first=20, size=48)
    Image.new("RGB", (60, 50)).save(painted / "20.png")
    file = tmp_path / "fidelity.json"
    options = ("--painted", painted, "--features", shipped_model(), "--json", file)
    status, out, err = gobelin("evaluate", "fidelity", true, *options)
    assert (status, err) == (0, "")
    found = json.loads(file.read_text())
    assert (found["size"], found["resized"]) == (48, {"true": 8, "painted": 1})
    said = " ".join(out.split())
    assert "8 true images are not 48×48: scaled, and cropped to the middle square." in said
    assert "FID IS NOT RELIABLE HERE: 8 images" in said


def test_images_without_captions_have_distances_alone(gobelin, true, tmp_path):
    painted, alone = (write_folder(tmp_path / name, 8, captions=False, first=20) for name in ("painted", "alone"))
    file = tmp_path / "fidelity.json"
    options = ("--painted", painted, "--features", shipped_model(), "--json", file)
    for folder, others in ((true, 2), (alone, 1)):
        status, _, err = gobelin("evaluate", "fidelity", folder, *options)
        assert status == 0
        assert err == f"gobelin: no CLIP score, as {painted} has images without a caption\n"
        found = json.loads(file.read_text())
        assert found["clip"] is None
        assert len(found["distances"]) == others  # eight of twenty leave as many others, eight of eight do not
    assert found["distances"][0]["fid"] == pytest.approx(0, abs=1e-4), "the same images"


def test_unusable_images_are_counted_with_the_reason(gobelin, true, tmp_path):
    painted = write_folder(tmp_path / "painted", 8, first=20)
    (painted / "20.png").write_bytes((painted / "20.png").read_bytes()[:200])
    (painted / "21.png").write_bytes(b"no image")
    file = tmp_path / "fidelity.json"
    options = ("--painted", painted, "--features", shipped_model(), "--clip", "none", "--json", file)
    status, out, _ = gobelin("evaluate", "fidelity", true, *options)
    assert status == 0
    found = json.loads(file.read_text())
    assert found["distances"][0]["count"] == 6
    assert sum(found["left_out"]["painted"].values()) == 2
    assert found["left_out"]["true"] == {}
    assert "Left out of the painted images: truncated: 1, not a readable image: 1." in " ".join(out.split())


def test_a_clip_of_transformers_compares_both(gobelin, true, small_clip, tmp_path):
    painted = write_folder(tmp_path / "painted", 8, first=20)
    file = tmp_path / "fidelity.json"
    for options in (("--features", small_clip), ("--features", shipped_model(), "--clip", small_clip)):
        status, _, err = gobelin("evaluate", "fidelity", true, "--painted", painted, *options, "--json", file)
        assert (status, err) == (0, "")
        found = json.loads(file.read_text())
        assert found["num_features"] == (12 if options[1] == small_clip else 192)
        assert found["clip"]["features"] == f"CLIP ({small_clip.name}, transformers)"


def test_captions_are_painted_as_they_are(gobelin, trained, tmp_path):
    """Parentheses are no weights."""
    folder = write_folder(tmp_path / "my-images", 8)
    for file in folder.glob("*.txt"):
        file.write_text("a (red:1.9) circle")
    options = ("--model", trained, "--features", "model", "--steps", 1, "--out", tmp_path / "painted")
    status, out, err = gobelin("evaluate", "fidelity", folder, *options)
    assert (status, err) == (0, "")
    assert f"the image encoder of the model {trained.name}" in " ".join(out.split())
    assert "painted, with captions of others" not in out, "all captions are the same"
    with Image.open(tmp_path / "painted" / "000000.png") as image:
        assert json.loads(image.info["gobelin"])["weights"] == "none"


REFUSED = [
    ("{true} --count 3", 2, "--count is 3: give 4 or more"),
    ("{true} --seed -1", 2, "seed is -1"),
    ("{true} --seed 99999999999999999999", 2, "seed is 99999999999999999999"),
    ("{true} --steps 0 --out painted", 2, "steps is 0"),
    ("{true} --sampler nope --out painted", 2, "unknown sampler 'nope': the choices are"),
    ("{true} --count 11 --features model", 2, "--count is 11: {true} has 20 images that can be used, half to paint"),
    ("{true} --painted {painted} --count 9 --features {model}", 2, "--count is 9: {painted} has 8 images that can be"),
    ("{true} --painted {true}", 2, "the true images are in {true} and --painted is {true}: give folders apart"),
    ("{true} --out {true}/painted", 2, "the true images are in {true} and --out is {true}/painted: give folders"),
    ("{true} --painted {painted} --model x", 2, "--model is for painting, and --painted has painted images: leave out"),
    ("{true} --painted {painted} --lora x", 2, "--lora is for painting, and --painted has painted images"),
    ("{true} --painted {painted} --steps 3", 2, "--steps is for painting, and --painted has painted images"),
    ("{true} --painted {painted} --out x", 2, "--out is for painting, and --painted has painted images"),
    ("{true} --painted {painted} --features model", 2, "--features is model, and --painted comes with none: give the"),
    ("{true} --painted {painted} --clip model", 2, "--clip is model, and --painted comes with none: give the"),
    ("{true} --lora-dir x", 2, "--lora-dir is for prompts that ask for LoRAs, and captions are painted as they are"),
    ("{true} --clip inception", 2, "--clip is inception, which reads no captions: give model, or the folder of"),
    ("{true} --features model --out {painted}", 1, "{painted} is not an empty folder: choose another"),
    ("{true} --features nowhere", 1, "there is nothing at nowhere: give a model folder with an image_encoder"),
    ("{true} --features {true}", 1, "{true} has no network that encodes images: give"),
    ("{true} --model {bare} --features model", 2, "the model {bare} has no image_encoder, as models have that were"),
    ("{true} --painted {alone} --features {model} --clip {model}", 1, "{alone} has images without a caption, which"),
    ("{true} --painted {three} --features {model}", 1, "{three} has 3 images that can be used: give 4 or more"),
    ("{three} --painted {painted} --features {model}", 1, "{three} has 3 images that can be used: give 4 or more"),
    ("{seven} --features model", 1, "{seven} has 7 images that can be used: give 8 or more"),
    ("{alone} --features model", 1, "only 0 of 8 images can be used"),
    ("{empty} --features model", 1, "{empty} has no captioned images: expected metadata.jsonl"),
    ("{true} --painted {empty} --features {model}", 1, "{empty} has no images: expected some (.png"),
    ("nowhere --features model", 1, "no folder at nowhere: expected images with captions there"),
    ("{true} --painted nowhere --features {model}", 1, "no folder at nowhere: expected images there"),
    ("{true} --model nowhere --features model", 1, "no model at nowhere"),
]


@pytest.fixture(scope="module")
def places(true, tmp_path_factory):
    """Folders that are refused for one thing or another."""
    root = tmp_path_factory.mktemp("places")
    (root / "empty").mkdir()
    shutil.copytree(shipped_model(), root / "bare", ignore=shutil.ignore_patterns("image_encoder"))
    return {
        "true": true,
        "model": shipped_model(),
        "bare": root / "bare",
        "empty": root / "empty",
        "painted": write_folder(root / "painted", 8, first=20),
        "alone": write_folder(root / "alone", 8, first=20, captions=False),
        "three": write_folder(root / "three", 3, first=20),
        "seven": write_folder(root / "seven", 7, first=20),
    }


@pytest.mark.parametrize(("arguments", "status", "sentence"), REFUSED, ids=[each[0] for each in REFUSED])
def test_bad_input_gets_one_sentence(refused, places, tmp_path, monkeypatch, arguments, status, sentence):
    monkeypatch.chdir(tmp_path)
    got, said = refused("evaluate", "fidelity", *(one.format(**places) for one in arguments.split()))
    assert said.startswith(sentence.format(**places)), said
    assert got == status
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_a_missing_package_is_named_with_the_extra(refused, true, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    assert refused("evaluate", "fidelity", true) == (
        2,
        "torchmetrics is not installed: pip install 'gobelin[fidelity]'",
    )


def test_nothing_random_is_left_of_a_choice(true):
    from gobelin.evaluate.image_sets import ImageSet, shuffled_rows

    images = ImageFolderDataset(true, size=8)
    rows = shuffled_rows(images, 3)
    assert rows == shuffled_rows(images, 3) != shuffled_rows(images, 4)
    assert sorted(rows) == list(range(20))
    (first,) = ImageSet(images, rows[:1], 64)
    with Image.open(true / images.names[rows[0]]) as image:
        assert np.array_equal(first, np.asarray(image))
