"""``gobelin convert``, ``gobelin verify`` and what ``generate`` paints over or repeats, as a user meets them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from gobelin.formats.png import read_png_settings
from gobelin.pipeline import Pipeline

PARTS = ("unet", "vae", "text_encoder")


@pytest.fixture(scope="module")
def half(trained, tmp_path_factory):
    """The trained model in float16."""
    folder = tmp_path_factory.mktemp("half")
    Pipeline.from_pretrained(trained, "cpu").save_pretrained(folder, torch.float16)
    return folder


def weights(folder):
    return {part: load_file(next((folder / part).glob("*.safetensors"))) for part in PARTS}


def test_convert_there_and_back_leaves_every_tensor_as_it_was(gobelin, half, tmp_path):
    file, folder, again = tmp_path / "x.safetensors", tmp_path / "folder", tmp_path / "y.safetensors"
    assert gobelin("convert", half, file)[:2] == (0, f"{file}\n")
    assert gobelin("convert", file, folder, "--tokenizer", half / "tokenizer")[0] == 0
    assert gobelin("convert", folder, again)[0] == 0
    before, after = weights(half), weights(folder)
    for part in PARTS:
        assert before[part].keys() == after[part].keys()
        assert all(
            torch.equal(before[part][key], one) and one.dtype == torch.float16 for key, one in after[part].items()
        )
    once, twice = load_file(file), load_file(again)
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[key], twice[key]) for key in once)
    status, _, err = gobelin("convert", half, file)
    assert status == 2
    assert "exists already" in err


def test_convert_in_another_precision(gobelin, half, tmp_path):
    assert gobelin("convert", half, tmp_path / "x.safetensors", "--dtype", "bfloat16")[0] == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "x.safetensors").values()} == {torch.bfloat16}


def test_verify_finds_a_sound_model_sound(gobelin, half, tmp_path):
    status, out, err = gobelin("verify", half, "--json", tmp_path / "report.json")
    assert status == 0, err
    assert out.rstrip().endswith("\nsound")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["sound"]
    assert report["round_trips"] == {"folder": True, "single file": True}


def test_verify_against_another_model_prints_and_writes_the_differences(gobelin, half, trained, tmp_path):
    status, out, err = gobelin("verify", half, "--against", trained, "--json", tmp_path / "r.json", "--no-round-trip")
    assert status == 0, err
    assert "mid_block.resnets.1" in out
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["differences"]["unet"]["output"] > 0
    assert report["round_trips"] == {}


def test_verify_says_what_is_wrong(gobelin, half, tmp_path):
    tensors = {name: one.clone() for name, one in weights(half)["unet"].items()}
    Pipeline.from_pretrained(half, "cpu").save_pretrained(tmp_path)
    tensors["conv_in.weight"][0, 0, 0, 0] = torch.nan
    save_file(tensors, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    status, _, err = gobelin("verify", tmp_path)
    assert status == 1
    assert "'conv_in.weight' holds NaN or infinity" in err


def test_a_picture_is_painted_over_and_outside_of_the_mask_stays_bit_for_bit(gobelin, trained, tmp_path):
    rng = np.random.default_rng(0)
    before = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    before.save(tmp_path / "before.png")
    hole = np.zeros((64, 64), np.uint8)
    hole[16:48, 8:40] = 255
    Image.fromarray(hole).save(tmp_path / "hole.png")
    common = ("--model", trained, "--seed", 3, "--steps", 4, "--init-image", tmp_path / "before.png")
    status, out, err = gobelin(
        "generate", "a red circle", *common, "--mask", tmp_path / "hole.png", "--strength", 0.5, "--out", tmp_path
    )
    assert status == 0, err
    painted = np.asarray(Image.open(out.strip()))
    outside = hole == 0
    assert np.array_equal(painted[outside], np.asarray(before)[outside])
    assert not np.array_equal(painted[~outside], np.asarray(before)[~outside])

    again = ("generate", "--from", out.strip(), "--model", trained, "--out", tmp_path / "again")
    status, _, err = gobelin(*again)
    assert status == 2
    assert "was painted over a picture that it does not hold: give its --init-image" in err
    pictures = ("--init-image", tmp_path / "before.png", "--mask", tmp_path / "hole.png")
    status, repeated, err = gobelin(*again, *pictures)
    assert status == 0, err
    assert np.array_equal(np.asarray(Image.open(repeated.strip())), painted)
    status, _, err = gobelin(*again, "--init-image", tmp_path / "hole.png", "--mask", tmp_path / "hole.png")
    assert status == 2
    assert "is not the picture that" in err


def test_a_picture_is_repeated_from_itself_and_what_is_given_besides_holds(gobelin, trained, tmp_path):
    common = ("--model", trained, "--out", tmp_path / "first", "--steps", 3, "--sampler", "euler_ancestral")
    status, out, err = gobelin("generate", "a (red:1.3) circle", *common, "--guidance", 2)
    assert status == 0, err
    first = out.strip()
    status, out, err = gobelin("generate", "--from", first, "--model", trained, "--out", tmp_path / "second")
    assert status == 0, err
    assert np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(out.strip())))
    status, out, err = gobelin("generate", "--from", first, "--model", trained, "--out", tmp_path, "--steps", 2)
    assert status == 0, err
    assert read_png_settings(tmp_path / out.strip())["steps"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mask", "x.png"], "x.png cannot be read as a picture"),
        (["--init-image", "{p}", "--strength", "2"], "the strength is 2"),
        (["--init-image", "{p}", "--strength", "0.01"], "leaves none of 4 steps: give 0.25 or more"),
        (["--mask", "{p}"], "a mask is given without a picture that it is of"),
        (["--from", "{p}"], "does not say how it was made"),
        (["--lora", "x.safetensors:y"], "--lora has 'x.safetensors:y'"),
        (["--lora", "x.safetensors:0.5"], "no weight file at x.safetensors"),
        (["--model", "nowhere.safetensors"], "no model at nowhere.safetensors"),
    ],
)
def test_what_cannot_be_painted_is_said_in_one_sentence(gobelin, trained, tmp_path, arguments, message):
    Image.new("RGB", (64, 64)).save(tmp_path / "p.png")
    given = [argument.replace("{p}", str(tmp_path / "p.png")) for argument in arguments]
    model = [] if "--model" in given else ["--model", trained]
    status, _, err = gobelin("generate", "a ring", *model, "--steps", 4, "--out", tmp_path / "out", *given)
    assert status in (1, 2)
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def painted(gobelin, out, *arguments):
    status, printed, err = gobelin("generate", *arguments, "--out", out)
    assert status == 0, err
    return out / printed.split("\n")[0].split("/")[-1]


def test_a_picture_of_another_model_asks_for_it_and_what_is_given_besides_holds(gobelin, trained, tmp_path):
    first = painted(gobelin, tmp_path / "a", "a red circle", "--model", trained, "--steps", 2, "--clip-skip", 1)
    status, _, err = gobelin("generate", "--from", first, "--out", tmp_path)
    assert status == 2
    assert "was painted by model: give that as --model" in err
    again = painted(gobelin, tmp_path / "b", "--from", first, "--model", trained)
    assert np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(again)))
    other = painted(gobelin, tmp_path / "c", "--from", first, "--model", trained, "--clip-skip", 0, "--negative", "")
    assert read_png_settings(other) == read_png_settings(first) | {"clip_skip": 0}


def test_a_picture_with_a_lora_asks_for_it(gobelin, trained, tmp_path):
    lora = tmp_path / "style.safetensors"
    width = load_file(next((trained / "unet").glob("*.safetensors")))["mid_block.attentions.0.proj_in.weight"].shape[0]
    name = "lora_unet_mid_block_attentions_0_proj_in.lora_"
    save_file({f"{name}down.weight": torch.ones(2, width), f"{name}up.weight": torch.ones(width, 2)}, lora)
    model = ("--model", trained, "--steps", 2)
    first = painted(gobelin, tmp_path / "a", "a red circle", *model, "--lora", f"{lora}:0.5")
    for given in ((), ("--lora", lora)):
        status, _, err = gobelin("generate", "--from", first, *model, *given, "--out", tmp_path)
        assert status == 2
        assert "was painted with {'style': 0.5} as --lora" in err
    again = painted(gobelin, tmp_path / "b", "--from", first, *model, "--lora", f"{lora}:0.5")
    assert np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(again)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"foo": 1}, "says 'foo' of itself, which this version of Gobelin does not know"),
        ({"prompt": 5}, "prompt is 5: give text"),
        ({"steps": "many"}, "steps is 'many': give a whole number"),
        ({"guidance": float("nan")}, "guidance is nan: give a number"),
        ({"width": 10**7, "height": 10**7}, "pixels asked for: give"),
        ({"seed": 1.5}, "seed is 1.5: give a whole number"),
        ({"prompt": "\ud800"}, "half a character"),
    ],
)
def test_a_picture_that_says_odd_things_gets_one_sentence(gobelin, change, message, tmp_path):
    first = painted(gobelin, tmp_path / "a", "a red circle", "--steps", 1)
    info = PngInfo()
    info.add_text("gobelin", json.dumps(read_png_settings(first) | change))
    Image.open(first).save(tmp_path / "odd.png", pnginfo=info)
    status, _, err = gobelin("generate", "--from", tmp_path / "odd.png", "--out", tmp_path)
    assert status == 2
    assert message in err
    assert "Traceback" not in err


def test_pickles_are_not_written(gobelin, half, tmp_path):
    status, _, err = gobelin("convert", half, tmp_path / "x.ckpt")
    assert status == 2
    assert "would be a pickle, which Gobelin does not write" in err
