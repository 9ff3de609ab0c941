"""Emoji scores: a judge that learns from true pictures, and what it says of good, blind and copying painters."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from gobelin.cli.main import main
from gobelin.data.emoji_set import EmojiSet, read_emoji
from gobelin.errors import DataError
from gobelin.evaluate.emoji_judge import JudgeConfig, augmented, open_judge, train_judge, untouched
from gobelin.evaluate.emoji_scores import choose_captions, emoji_report, measure_emoji
from gobelin.images import images_to_tensor
from gobelin.pipeline import Pipeline

_SHAPES = {"disc": "ellipse", "box": "rectangle"}
_COLOURS = ("red", "green", "blue", "black", "orange")
_STYLES = ("filled", "outlined", "small")
_QUICK = JudgeConfig(widths=(16, 24, 32), steps=90, batch_size=24, learning_rate=4e-3)


def _draw(shape, colour, style):
    image = Image.new("RGB", (64, 64), "white")
    side = 12 if style == "small" else 26
    box = (32 - side, 32 - side, 32 + side, 32 + side)
    getattr(ImageDraw.Draw(image), _SHAPES[shape])(
        box, fill=None if style == "outlined" else colour, outline=colour, width=6
    )
    return np.asarray(image)


def _write(folder, held_out=(("red disc", "small"), ("blue box", "outlined"))):
    """Write a data set as gobelin data emoji does, of simple figures."""
    lines = {"train": [], "heldout": []}
    for shape in _SHAPES:
        for colour in _COLOURS:
            for style in _STYLES:
                name = f"{colour} {shape}"
                split = "heldout" if (name, style) in held_out else "train"
                file = f"{colour}-{shape}-{style}.png"
                (folder / split).mkdir(parents=True, exist_ok=True)
                Image.fromarray(_draw(shape, colour, style)).save(folder / split / file)
                lines[split].append({"file_name": file, "text": [f"{name}, {style}"], "name": name, "style": style})
    for split, entries in lines.items():
        (folder / split / "metadata.jsonl").write_text("".join(json.dumps(one) + "\n" for one in entries))
    (folder / "emoji.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return read_emoji(_write(tmp_path_factory.mktemp("emoji")))


@pytest.fixture(scope="module")
def judge(pictures):
    return train_judge(pictures, _QUICK)


def test_a_set_has_every_picture_with_its_concept_and_style(pictures):
    assert len(pictures) == 30
    assert pictures.images.shape == (30, 64, 64, 3)
    assert list(pictures.styles) == sorted(_STYLES)
    assert len(pictures.concept_names) == 10
    assert pictures.is_held_out.sum() == 2
    for row, (name, style) in enumerate(pictures.pairs):
        assert pictures.captions[row] == f"{name}, {style}"
        assert pictures.is_held_out[row] == ((name, style) in (("red disc", "small"), ("blue box", "outlined")))
        colour, shape = name.split()
        np.testing.assert_array_equal(pictures.images[row], _draw(shape, colour, style))


def test_a_judge_recognises_true_pictures_and_is_not_led_by_a_caption(pictures, judge):
    vae = Pipeline.from_pretrained().vae
    rows = np.arange(len(pictures))
    scores = measure_emoji("a perfect painter", pictures, judge, vae, {"held_in": (rows, pictures.images)}, {})
    split = scores.splits["held_in"]
    assert split.painted.top1.value > 0.8
    assert split.painted.style.value > 0.8
    assert split.painted.top5.value >= split.painted.top1.value
    assert split.shuffled.top1.value < 0.2, "the same pictures, with others' captions"
    assert split.true_nearness == split.nearness
    assert split.nearness.to_true.value == pytest.approx(1, abs=1e-4)

    blank = np.full_like(pictures.images, 255)
    blind = measure_emoji("a blind painter", pictures, judge, vae, {"held_in": (rows, blank)}, {}).splits["held_in"]
    assert blind.painted.top1.value <= 0.2


def test_a_copied_picture_is_nearer_to_what_it_was_copied_from(pictures, judge):
    vae = Pipeline.from_pretrained().vae
    rows = np.flatnonzero(pictures.is_held_out)
    same_concept = [
        np.flatnonzero((pictures.concept == pictures.concept[row]) & ~pictures.is_held_out)[0] for row in rows
    ]
    found = {}
    for name, images in (("composes", pictures.images[rows]), ("copies", pictures.images[same_concept])):
        painted = {"held_out": (rows, images)}
        found[name] = measure_emoji(name, pictures, judge, vae, painted, {}).splits["held_out"].nearness
    assert found["composes"].nearer_to_true.value == 1
    assert found["copies"].nearer_to_true.value == 0
    assert found["copies"].to_training.value == pytest.approx(1, abs=1e-4)
    assert found["composes"].to_training.value < 0.99, "a held-out picture is not among those that it is compared with"
    assert found["copies"].same_concept.value == 1


def test_what_the_judge_does_not_see_is_a_part_and_never_all_of_a_concept(pictures):
    many = 4000
    names = [f"concept {number}" for number in range(many // 2)]
    wide = EmojiSet(
        images=np.zeros((many, 1, 1, 3), np.uint8),
        concept=np.repeat(np.arange(many // 2), 2),
        style=np.tile([0, 1], many // 2),
        captions=[""] * many,
        is_held_out=np.zeros(many, bool),
        concept_names=names,
        styles=["a", "b"],
    )
    chosen = untouched(wide)
    assert 0.03 < chosen.mean() < 0.07
    assert not chosen.reshape(-1, 2).all(axis=1).any()
    np.testing.assert_array_equal(chosen, untouched(wide))


def test_augmentation_moves_a_picture_on_white_and_keeps_its_range(pictures):
    images = images_to_tensor(pictures.images)
    moved = augmented(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    assert moved.abs().max() <= 1
    assert (moved - images).abs().mean(dim=(1, 2, 3)).min() > 0.01, "every picture is changed"
    assert moved[:, :, 0, 0].min() > 0.2, "what comes in at the edges is light"
    assert torch.equal(moved, augmented(images, torch.Generator().manual_seed(0)))


def test_a_judge_is_kept_with_its_pictures_and_made_anew_for_others(pictures, tmp_path):
    file, quick, steps = tmp_path / "judge.safetensors", JudgeConfig(widths=(16, 16), steps=2, batch_size=4), []
    first = open_judge(pictures, file, quick, steps.append)
    again = open_judge(pictures, file, quick, steps.append)
    assert len(steps) == 2, "the second was read"
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    open_judge(pictures, file, JudgeConfig(widths=(16, 16), steps=1, batch_size=4), steps.append)
    assert len(steps) == 3
    file.write_bytes(b"damaged")
    open_judge(pictures, file, quick, steps.append)
    assert len(steps) == 5


def test_captions_are_chosen_by_split_up_to_a_limit(pictures):
    chosen = choose_captions(pictures, 5)
    assert {name: len(rows) for name, rows in chosen.items()} == {"held_in": 5, "held_out": 2}
    assert not pictures.is_held_out[chosen["held_in"]].any()
    assert pictures.is_held_out[chosen["held_out"]].all()
    assert choose_captions(pictures, 5, seed=1)["held_in"].tolist() != chosen["held_in"].tolist()


def test_the_command_paints_judges_and_writes_report_and_sheet(tmp_path, monkeypatch, capsys):
    folder = _write(tmp_path / "emoji")
    monkeypatch.setattr(
        "gobelin.cli.evaluate_emoji.JudgeConfig", lambda: JudgeConfig(widths=(16, 16), steps=2, batch_size=4)
    )
    files = {name: tmp_path / name for name in ("scores.json", "scores.md", "sheet.png")}
    options = [
        "--json",
        str(files["scores.json"]),
        "--report",
        str(files["scores.md"]),
        "--sheet",
        str(files["sheet.png"]),
    ]
    main(["evaluate", "emoji", str(folder), "--limit", "3", "--steps", "2", *options])
    content = json.loads(files["scores.json"].read_text())
    assert content["splits"]["held_in"]["painted"]["top1"]["n"] == 3
    assert content["splits"]["held_out"]["painted"]["top1"]["n"] == 2
    assert content["settings"]["steps"] == 2
    assert Image.open(files["sheet.png"]).width > 300
    assert "| held out |" in files["scores.md"].read_text()
    assert emoji_report(content).markdown() == files["scores.md"].read_text()
    assert (folder / "judge.safetensors").is_file()
    capsys.readouterr()


def test_a_folder_that_is_none_or_damaged_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(DataError, match=r"has no emoji\.json: give a folder that gobelin data emoji wrote"):
        read_emoji(tmp_path)
    folder = _write(tmp_path / "emoji")
    lines = (folder / "train" / "metadata.jsonl").read_text()
    for broken in ("not JSON\n", "[]\n", '{"file_name": "a.png"}\n', '{"file_name": "a.png", "text": []}\n'):
        (folder / "train" / "metadata.jsonl").write_text(lines + broken)
        with pytest.raises(DataError, match=r"line 29 of .*metadata\.jsonl.*again"):
            read_emoji(folder)
    (folder / "train" / "metadata.jsonl").unlink()
    with pytest.raises(DataError, match=r"metadata\.jsonl"):
        read_emoji(folder)
