"""``gobelin look``, as a user meets it."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from gobelin.formats.png import read_png_settings, write_png


def test_look_writes_sheets_a_page_an_animation_and_numbers(gobelin, trained, tmp_path):
    files = {"json": tmp_path / "words.json", "npz": tmp_path / "maps.npz"}
    status, out, err = gobelin(
        *("look", "a red circle", "--model", trained, "--out", tmp_path, "--seed", 5, "--steps", 3),
        *("--per", "head", "--at", 20, 31, "--animation", "--json", files["json"], "--npz", files["npz"]),
    )
    assert status == 0, err
    stem = "a-red-circle-5"
    for name in (".png", "-words.png", "-per-head.png", "-at-20-31.png", ".html", ".webp"):
        assert str(tmp_path / f"{stem}{name}") in out
    with Image.open(tmp_path / f"{stem}.webp") as animation:
        assert animation.n_frames == 3
    assert "http" not in (tmp_path / f"{stem}.html").read_text().replace("http-equiv", "")
    said = json.loads(files["json"].read_text())
    assert [row["word"] for row in said["words"]] == ["a", "red", "circle"]
    assert all(0 <= row["mean"] <= row["most"] <= 1 for row in said["words"])
    assert said["shares"]["bos"] > 0
    assert sum(said["shares"].values()) == pytest.approx(1)
    maps = np.load(files["npz"])
    assert maps["words"].tolist() == ["a", "red", "circle"]
    assert maps["words_to_image"].shape == (3, 64, 64)
    assert np.allclose(maps["image_to_words"].sum(axis=2), 1, atol=1e-5)
    assert maps["patches_to_patches"].ndim == 4, "patches were asked for by --at"
    row, column = np.unravel_index(maps["words_to_image"][2].argmax(), (64, 64))
    assert said["words"][2]["most_at"] == [column, row]


def test_look_shows_sharp_maps_and_keeps_what_they_are_made_of(gobelin, trained, tmp_path):
    options = ("--model", trained, "--out", tmp_path, "--seed", 5, "--steps", 3, "--words", "red")
    for name, more in (("sharp", ()), ("plain", ("--plain",))):
        status, _, err = gobelin("look", "a red circle", *options, "--npz", tmp_path / f"{name}.npz", *more)
        assert status == 0, err
    sharp, plain = (np.load(tmp_path / f"{name}.npz") for name in ("sharp", "plain"))
    arrays = {"words", "words_to_image", "image_to_words"}
    assert {name.split(".")[0] for name in sharp} == {*arrays, "patches_to_patches", "up_blocks"}
    assert {name.split(".")[-1] for name in plain} == {*arrays, "attn2"}
    own = np.mean([sharp[name][0, 0] for name in sharp if name.endswith("attn1")], axis=0)
    shares = [sharp[name][0, 0, :, 2] for name in sharp if name.endswith("attn2")]  # BOS, a, red
    expected = np.mean([share * (own @ share) / (own @ share).max() for share in shares], axis=0).reshape(16, 16)
    corners = sharp["words_to_image"][0][1::4, 1::4], sharp["words_to_image"][0][2::4, 2::4]
    assert np.corrcoef(sum(corners).ravel(), expected.ravel())[0, 1] > 0.99


def test_look_paints_an_image_again_and_says_when_it_is_another(gobelin, refused, trained, tmp_path):
    gobelin("generate", "a red circle", "--model", trained, "--out", tmp_path, "--seed", 5, "--steps", 2)
    image = tmp_path / "a-red-circle-5.png"
    out = tmp_path / "maps"
    status, printed, err = gobelin("look", image, "--model", trained, "--out", out, "--words", "circle", "red circle")
    assert (status, err) == (0, "")
    assert printed.split() == [str(out / f"a-red-circle-5{end}") for end in ("-words.png", ".html")]
    for per in ("step", "layer"):
        status, printed, _ = gobelin("look", image, "--model", trained, "--out", out, "--per", per)
        assert f"-per-{per}.png" in printed
    assert not list(out.glob("*-5.png")), "the image is there already"

    status, err = refused("look", image, "--model", trained, "--out", out, "--steps", 3)
    assert status == 2
    assert "leave out --steps" in err

    settings = read_png_settings(image)
    write_png(image, Image.new("RGB", (64, 64)), settings)
    status, _, err = gobelin("look", image, "--model", trained, "--out", out)
    assert status == 0
    assert "painted again" in err
    Image.new("RGB", (64, 64)).save(image)
    status, err = refused("look", image, "--model", trained, "--out", out)
    assert status == 1
    assert "carries no settings" in err


@pytest.mark.parametrize("more", [(), ("--plain",), ("--per", "step")], ids=str)
def test_words_beside_the_prompt_of_the_negative_one_and_of_no_word(gobelin, trained, tmp_path, more):
    status, _, err = gobelin(
        *("look", "a red circle", "--model", trained, "--out", tmp_path, "--seed", 5, "--steps", 3, "--guidance", 3),
        *(
            "--negative-prompt",
            "a blue star",
            "--also",
            "dog",
            "two dogs",
            "--words",
            "circle",
            "dog",
            "BOS",
            "padding",
        ),
        *("--json", tmp_path / "words.json", "--npz", tmp_path / "maps.npz", "--masks", 0.4, *more),
    )
    assert (status, err) == (0, "")
    said = json.loads((tmp_path / "words.json").read_text())
    assert [row["word"] for row in said["words"]] == ["circle", "dog", "BOS", "padding"]
    assert [row["word"] for row in said["also"]] == ["dog", "two dogs"]
    assert [row["word"] for row in said["negative"]] == ["a", "blue", "star"]
    maps = np.load(tmp_path / "maps.npz")
    assert maps["also"].tolist() == ["dog", "two dogs"]
    assert maps["also_to_image"].shape == (2, 64, 64)
    assert maps["negative_to_image"].shape == (3, 64, 64)
    assert np.array_equal(maps["words_to_image"][1], maps["also_to_image"][0])
    assert maps["words_to_image"][2].max() > 0, "asked for, BOS is not left out"
    page = (tmp_path / "a-red-circle-5.html").read_text()
    for text in ("looked for beside it", "negative prompt", "tokens that are no words", "two dogs", "bos"):
        assert text in page
    coco = COCO(tmp_path / "a-red-circle-5-coco.json")
    assert [one["name"] for one in coco.loadCats(coco.getCatIds())] == maps["words"].tolist()
    for number, name in enumerate(("circle", "dog", "bos", "padding")):
        mask = np.asarray(Image.open(tmp_path / f"a-red-circle-5-mask-{number + 1}-{name}.png")) > 0
        assert np.array_equal(mask, maps["masks"][number])
        assert mask.any() == bool(coco.getAnnIds(catIds=[number + 1]))
        for annotation in coco.loadAnns(coco.getAnnIds(catIds=[number + 1])):
            assert np.array_equal(coco.annToMask(annotation).astype(bool), mask)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("image.jpg",), "image.jpg is no PNG that Gobelin painted"),
        (("nowhere.png",), "there is no image at nowhere.png"),
        (("!?",), "'!?' has no word to look at"),
        (("a red circle", "--words", "cat"), "'cat' is not in the prompt, whose words are a, red, circle"),
        (("a red circle", "--also", "dog", "--words", "cat"), "'cat' is not in the prompt"),
        (("a red circle", "--also", " "), "also has an empty word"),
        (("a red circle", "--also", "()"), "also has '()', which is no word"),
        (("a red circle", "--at", "64", "0"), "is not in the image of 64×64 pixels"),
        (("a red circle", "--at", "3"), "--at has 3 alone: give 2 values, each a whole number"),
        (("a red circle", "--sites", "attn3"), "'attn3' matches no attention"),
        (("a red circle", "--count", "2"), "leave out --count"),
        (("a red circle", "--init-image", "x.png"), "leave out --init-image"),
    ],
)
def test_what_cannot_be_looked_at_is_said_in_one_sentence(refused, trained, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, sentence = refused("look", *arguments, "--model", trained)
    assert status == 2
    assert message in sentence
    assert not list(tmp_path.iterdir())


def test_look_at_an_image_that_nobody_painted(gobelin, trained, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)).save(
        tmp_path / "a cat.jpg"
    )
    out = tmp_path / "out"
    given = ("look", tmp_path / "a cat.jpg", "--caption", "a red circle", "--model", trained, "--out", out)
    status, printed, err = gobelin(
        *(*given, "--masks", 0.4, "--per", "step", "--at", 3, 5, "--timesteps", 900, 40, "--seed", 3),
        *("--json", tmp_path / "words.json", "--npz", tmp_path / "maps.npz"),
    )
    assert (status, err) == (0, "")
    masks = [f"-mask-{number}-{word}.png" for number, word in enumerate(("a", "red", "circle"), start=1)]
    for end in (".png", "-words.png", "-per-step.png", "-at-3-5.png", ".html", "-coco.json", *masks):
        assert str(out / f"a cat-looked-at{end}") in printed
        assert (out / f"a cat-looked-at{end}").is_file()
    said = json.loads((tmp_path / "words.json").read_text())
    assert [row["word"] for row in said["words"]] == ["a", "red", "circle"]
    assert said["settings"] == {"caption": "a red circle", "timesteps": [900, 40], "seed": 3, "model": trained.name}
    image = Image.open(out / "a cat-looked-at.png")
    coco = json.loads((out / "a cat-looked-at-coco.json").read_text())
    assert coco["images"][0]["file_name"] == "a cat-looked-at.png"
    assert image.size == (coco["images"][0]["width"], coco["images"][0]["height"])
    maps = np.load(tmp_path / "maps.npz")
    assert maps["words_to_image"].shape == maps["masks"].shape == (3, image.height, image.width)
    for mask, end in zip(maps["masks"], masks, strict=True):
        assert np.array_equal(np.asarray(Image.open(out / f"a cat-looked-at{end}")) > 0, mask)
    assert sorted(tmp_path.glob("*.jpg")) == [tmp_path / "a cat.jpg"]


def test_look_says_what_does_not_go_with_a_caption(refused, trained, tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "photo.png")
    given = ("look", tmp_path / "photo.png", "--model", trained, "--out", tmp_path / "out")
    for options, said in (
        (("--caption", "a circle", "--steps", 3), "--steps is for painting"),
        (("--caption", "a circle", "--negative-prompt", "x"), "--negative-prompt is for painting"),
        (("--caption", "a circle", "--animation"), "leave out --animation"),
        (("--caption", "a circle", "--timesteps", 1000), "whole numbers from 0 to 999"),
        (("--caption", "a circle", "--words", "star"), "'star' is not in the prompt"),
        (("--caption", " "), "no word to look at"),
        (("--caption", "a circle", "--also", ""), "also has an empty word"),
        (("--timesteps", 3), "--timesteps are for an image with a --caption"),
        ((), "say what it shows by --caption"),
    ):
        assert said in refused(*given, *options)[1]
    assert "there is no image at" in refused("look", "a circle", "--caption", "a circle", "--model", trained)[1]
    assert not (tmp_path / "out").exists()
