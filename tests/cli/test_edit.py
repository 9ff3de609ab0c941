"""``gobelin edit``, as a user meets it."""

import pytest
from PIL import Image


def test_edit_keeps_the_image_and_shows_what_changed(gobelin, trained, tmp_path):
    options = ("--model", trained, "--out", tmp_path, "--seed", 5, "--steps", 2)
    status, out, err = gobelin(
        "edit", "a red circle", "--to", "a blue circle", *options, "--reweight", "blue=2", "--local-blend", "circle"
    )
    assert status == 0, err
    assert [path.rpartition("/")[2] for path in out.split()] == [
        "a-red-circle-5.png",
        "a-blue-circle-5.png",
        "a-blue-circle-5-edit.png",
    ]
    status, _, err = gobelin("look", tmp_path / "a-blue-circle-5.png", "--model", trained, "--out", tmp_path)
    assert status == 2
    assert "was painted with a control" in err
    assert all(Image.open(path).width >= 64 for path in out.split())


def test_edit_changes_an_image_that_is_given(gobelin, refused, trained, tmp_path):
    image, hole, out_folder = tmp_path / "given.png", tmp_path / "hole.png", tmp_path / "out"
    Image.new("RGB", (64, 80), "red").save(image)
    Image.new("L", (64, 80), "white").save(hole)
    options = ("--init-image", image, "--mask", hole, "--model", trained, "--out", out_folder, "--steps", 2)
    status, out, err = gobelin("edit", "a red circle", "--to", "a blue circle", *options, "--seed", 5)
    assert status == 0, err
    assert [path.rpartition("/")[2] for path in out.split()] == ["a-blue-circle-5.png", "a-blue-circle-5-edit.png"]
    with Image.open(out.split()[0]) as changed:
        assert changed.size == (64, 80)
    status, err = refused("edit", "a red circle", "--to", "a blue circle", "--init-image", tmp_path / "no.png")
    assert status == 1
    assert "there is no image at" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--reweight", "red"), "--reweight has 'red': give WORD=NUMBER"),
        (("--reweight", "a=nan"), "--reweight has 'a=nan': give WORD=NUMBER"),
        (("--reweight", "ring=2"), "'ring' is not in the prompt, whose words are a, blue, circle"),
        (("--local-blend", "ring"), "'ring' is not in the prompt"),
        (("--cross-replace", "2"), "--cross-replace is 2.0: give a fraction from 0 to 1"),
        (("--method", "magic"), "--method is 'magic': give one of 'flowedit', 'prompt_to_prompt'"),
    ],
)
def test_what_cannot_be_edited_is_said_in_one_sentence(refused, trained, tmp_path, options, message):
    edit = ("edit", "a red circle", "--to", "a blue circle", "--model", trained, "--out", tmp_path / "out")
    status, sentence = refused(*edit, "--steps", 2, *options)
    assert status == 2
    assert message in sentence
    assert not (tmp_path / "out").exists()
