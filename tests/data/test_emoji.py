"""Emoji: which characters are concepts, whose picture is whose, what is held out, and packages that are not right."""

import json

import numpy as np
import pytest
from PIL import Image

from gobelin.cli.main import main
from gobelin.data import ImageFolderDataset
from gobelin.data.emoji import PACKAGES, STYLES, EmojiPackages, is_held_out, write_emoji
from gobelin.errors import DataError, UsageError

_CAT, _DOG, _HAND, _THUMB = "🐈", "🐕", "👉", "👍"
_FLAG, _KEYCAP, _TONE, _FAMILY = "1f1eb-1f1f7", "30-20e3", "1f44d-1f3fb", "1f468-200d-1f469"
_NAMES = {
    _CAT: {"tts": ["cat"], "default": ["animal", "cat", "cats", "kitten", "pet"]},
    _DOG: {"tts": ["dog"], "default": ["dog"]},
    _HAND: {"tts": ["backhand index pointing right"], "default": ["finger", "point", "right", "pointing right"]},
    "0": {"tts": ["zero"], "default": ["digit"]},
    "🏻": {"tts": ["light skin tone"], "default": ["skin"]},
    "🇫": {"tts": ["regional indicator symbol letter f"], "default": ["letter"]},
    "👨‍👩": {"tts": ["family"], "default": ["family"]},
}


def _left(colour):
    """Fill the left half of a picture that is four units wide."""
    return f'<path fill="{colour}" d="M0 0h2v4H0z"/>'


@pytest.fixture
def packages(tmp_path):
    """Packages as npm lays them out: a cat is red on the left in each set, a dog is in two, a hand is a turned copy."""
    folder = tmp_path / "node_modules"
    for style in STYLES.values():
        package = folder / style.package
        package.mkdir(parents=True)
        named = {"1f408": "cat", f"{ord(_HAND):x}": "right", f"{ord(_THUMB):x}": "thumb", "1f3fb": "tone", "30": "zero"}
        named |= dict.fromkeys((_FLAG, _KEYCAP, _TONE, _FAMILY), "cat")
        if style.word in ("noto", "flat"):
            named["1f415-fe0f"] = "dog"
        _write(package / "package.json", {"name": style.package, "version": "1.2.3", "license": "MIT"})
        _write(package / "info.json", {"author": {"name": "A designer", "url": "there"}})
        _write(package / "chars.json", named)
        icons = {name: {"body": _left("red")} for name in ("cat", "left", "thumb", "tone", "zero")}
        icons |= {"dog": {"body": _left("blue"), "left": 2}}
        _write(
            package / "icons.json",
            {"icons": icons, "aliases": {"right": {"parent": "left", "hFlip": True}}, "width": 4, "height": 4},
        )
    _write(folder / "cldr-annotations-full" / "package.json", {"version": "48.0.0", "author": "A consortium"})
    names = folder / "cldr-annotations-full" / "annotations" / "en" / "annotations.json"
    names.parent.mkdir(parents=True)
    _write(names, {"annotations": {"annotations": _NAMES}})
    return folder


def _write(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def _lines(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def test_a_concept_is_one_character_that_has_a_name(packages):
    assert {one.character for one in EmojiPackages(packages).concepts.values()} == {_CAT, _DOG, _HAND}
    pictures = [(one.concept.character, one.style) for one in EmojiPackages(packages).pictures()]
    expected = {(_CAT, style) for style in STYLES} | {(_HAND, style) for style in STYLES}
    assert set(pictures) == expected | {(_DOG, style) for style in ("noto", "blob", "flat", "glossy")}
    assert len(pictures) == len(set(pictures)), "a character with a variation selector is the same concept"


def test_captions_name_concept_and_style_and_never_another_style(packages):
    concepts = EmojiPackages(packages).concepts
    captions = concepts[_CAT].captions("flat")
    assert captions[:5] == ["cat, flat", "flat cat", "flat emoji of cat", "cat in flat style", "cat"]
    assert len(captions) == 7
    assert all(
        set(caption.replace(",", "").split()) <= {"cat", "animal", "cats", "kitten", "pet", "flat"}
        for caption in captions[5:]
    )
    assert concepts[_DOG].captions("flat")[-1] == "dog", (
        "without keywords beyond the name there are no captions of them"
    )
    assert concepts[_HAND].keywords == ("finger", "point"), "keywords whose words the name has say nothing"
    assert captions == concepts[_CAT].captions("flat")
    said = " ".join(concepts[_CAT].captions("noto"))
    assert not any(style in said for style in STYLES if style != "noto")


def test_a_picture_is_drawn_where_it_stands_and_turned_as_its_set_says(packages):
    drawn = {one.concept.character: np.asarray(one.render(16)) for one in EmojiPackages(packages, ("noto",)).pictures()}
    red, nothing, blue = (255, 0, 0, 255), (0, 0, 0, 0), (0, 0, 255, 255)
    for character, left, right in ((_CAT, red, nothing), (_HAND, nothing, red), (_DOG, nothing, nothing)):
        picture = drawn[character]
        assert picture.shape == (16, 16, 4)
        assert tuple(picture[8, 2]) == left
        assert tuple(picture[8, 13]) == right
    assert blue not in {tuple(pixel) for pixel in drawn[_DOG].reshape(-1, 4)}, "its view begins where its colour ends"


def test_each_turn_is_that_of_iconify(packages):
    file = packages / STYLES["noto"].package / "icons.json"
    content = json.loads(file.read_text())
    corner = '<path fill="red" d="M0 0h2v2H0z"/>'  # the upper left quarter
    content["icons"]["left"]["body"] = corner
    for turn, where in (
        ({"vFlip": True}, (12, 3)),
        ({"rotate": 1}, (3, 12)),
        ({"rotate": 2}, (12, 12)),
        ({"rotate": 3}, (12, 3)),
    ):
        content["aliases"] = {"right": {"parent": "left", **turn}}
        _write(file, content)
        hand = next(one for one in EmojiPackages(packages, ("noto",)).pictures() if one.concept.character == _HAND)
        alpha = np.asarray(hand.render(16))[..., 3]
        row, column = where
        assert alpha[row, column] == 255, turn
        assert (alpha > 0).sum() == 64


def test_the_data_set_is_two_folders_of_captioned_images_without_a_common_pair(packages, tmp_path):
    counts = write_emoji(EmojiPackages(packages), tmp_path / "out", 32)
    train, held_out = (_lines(tmp_path / "out" / split) for split in ("train", "heldout"))
    assert counts == {"train": len(train), "heldout": len(held_out), "concepts": 3}
    assert counts["train"] + counts["heldout"] == 14
    pairs = [{(one["concept"], one["style"]) for one in side} for side in (train, held_out)]
    assert not pairs[0] & pairs[1]
    assert all(is_held_out(*pair) for pair in pairs[1])
    dataset = ImageFolderDataset(tmp_path / "out" / "train", 32)
    assert len(dataset) == len(train)
    assert [dataset[index].caption for index in range(len(dataset))] == [one["text"][0] for one in train]
    about = json.loads((tmp_path / "out" / "emoji.json").read_text())
    assert set(about["packages"]) == set(PACKAGES)
    assert about["packages"]["@iconify-json/noto"] == {
        "version": "1.2.3",
        "licence": "MIT",
        "author": "A designer",
        "from": "there",
    }


def test_a_tenth_is_held_out_and_no_concept_is_held_out_whole(packages, tmp_path, monkeypatch):
    share = np.mean([is_held_out(chr(0x1F300 + number), style) for number in range(2000) for style in STYLES])
    assert 0.09 < share < 0.11
    monkeypatch.setattr("gobelin.data.emoji.is_held_out", lambda character, style: character == _CAT)
    assert write_emoji(EmojiPackages(packages), tmp_path / "out", 16)["heldout"] == 0


def test_the_command_writes_what_training_reads(packages, tmp_path, capsys):
    main(["data", "emoji", "--packages", str(packages), "--out", str(tmp_path / "out"), "--styles", "noto", "flat"])
    written = [Image.open(file).size for file in sorted((tmp_path / "out").rglob("*.png"))]
    assert written == [(64, 64)] * 6
    assert "of 3 concepts" in capsys.readouterr().out


def test_what_is_missing_is_named_with_the_command_that_installs_it(packages, tmp_path):
    (packages / "@iconify-json" / "noto" / "package.json").unlink()
    with pytest.raises(DataError, match="npm install @iconify-json/noto, and give its path"):
        EmojiPackages(packages)
    EmojiPackages(packages, ("twemoji",))
    with pytest.raises(DataError, match="@iconify-json/noto"):  # names the pictures of the other
        EmojiPackages(packages, ("blob",))
    with pytest.raises(DataError, match=r"nowhere has no cldr-annotations-full, @iconify-json/noto, .*: npm install"):
        EmojiPackages(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="unknown style 'apple': the choices are noto, blob, twemoji, flat, glossy"):
        EmojiPackages(packages, ("apple",))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("icons.json", "not JSON"),
        ("icons.json", "[]"),
        ("icons.json", "{}"),
        ("icons.json", '{"icons": []}'),
        ("icons.json", '{"icons": {"cat": {}}}'),
        ("icons.json", '{"icons": {"cat": {"body": ""}}, "width": "wide"}'),
        ("icons.json", '{"icons": {"cat": {"body": "<path"}}}'),
        ("icons.json", '{"icons": {}, "aliases": {"cat": {}}}'),
        ("chars.json", '{"not hexadecimal": "cat"}'),
        ("chars.json", '{"110000": "cat"}'),
        ("chars.json", '{"1f408": ["cat"]}'),
    ],
)
def test_a_damaged_package_is_named_in_one_sentence(packages, tmp_path, file, content):
    (packages / "@iconify-json" / "noto" / file).write_text(content)
    with pytest.raises(DataError, match=r"@iconify-json/noto.*again"):
        write_emoji(EmojiPackages(packages, ("noto",)), tmp_path / "out", 16)
    assert [file.name for file in tmp_path.iterdir()] == ["node_modules"], "nothing is half written"


@pytest.mark.parametrize("content", ["{}", '{"annotations": {"annotations": {"🐈": 1}}}', '{"annotations": []}'])
def test_damaged_names_are_named_too(packages, content):
    (packages / "cldr-annotations-full" / "annotations" / "en" / "annotations.json").write_text(content)
    with pytest.raises(DataError, match=r"cldr-annotations-full.*again"):
        list(EmojiPackages(packages).pictures())


def test_a_folder_that_is_not_empty_and_a_size_that_is_none_are_refused(packages, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(DataError, match="is not empty"):
        write_emoji(EmojiPackages(packages), tmp_path / "out", 16)
    for size in ("15", "2000", "-1"):
        with pytest.raises(SystemExit):
            main(["data", "emoji", "--packages", str(packages), "--out", str(tmp_path / "new"), f"--size={size}"])
    assert not (tmp_path / "new").exists()
