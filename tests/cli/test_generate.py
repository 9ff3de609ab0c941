"""``gobelin generate``, as a user meets it."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from gobelin.formats.png import read_png_settings


def painted(gobelin, out, *arguments):
    status, printed, err = gobelin("generate", *arguments, "--out", out)
    assert status == 0, err
    return out / printed.split("\n")[0].split("/")[-1]


def save_lora(file, model):
    """Save a LoRA of one layer of a model."""
    width = load_file(next((model / "unet").glob("*.safetensors")))["mid_block.attentions.0.proj_in.weight"].shape[0]
    name = "lora_unet_mid_block_attentions_0_proj_in.lora_"
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"{name}down.weight": torch.ones(2, width), f"{name}up.weight": torch.ones(width, 2)}, file)


def test_generate_paints_images_that_carry_their_settings(gobelin, trained, tmp_path):
    out = tmp_path / "images"
    options = ("--model", trained, "--out", out, "--seed", 5, "--steps", 2, "--count", 2, "--guidance", 2)
    status, printed, err = gobelin("generate", "a red circle", "a BLUE ring!", *options)
    assert status == 0, err
    paths = sorted(out.iterdir())
    assert sorted(printed.split()) == sorted(map(str, paths))
    assert [path.name for path in paths] == [
        "a-blue-ring-7.png",
        "a-blue-ring-8.png",
        "a-red-circle-5.png",
        "a-red-circle-6.png",
    ]
    settings = read_png_settings(paths[1])
    assert settings["prompt"] == "a BLUE ring!"
    assert (settings["seed"], settings["steps"], settings["guidance"]) == (8, 2, 2.0)
    assert "Seed: 8" in Image.open(paths[1]).info["parameters"]

    again = tmp_path / "again"
    gobelin("generate", "a BLUE ring!", "--model", trained, "--out", again, "--seed", 8, "--steps", 2, "--guidance", 2)
    one, other = (np.asarray(Image.open(path), int) for path in (paths[1], again / "a-blue-ring-8.png"))
    assert np.abs(one - other).max() <= 1, "the same seed paints the same image, whatever else is in the batch"

    gobelin("generate", "a BLUE ring!", "--model", trained, "--out", again, "--seed", 8, "--steps", 2)
    assert (again / "a-blue-ring-8-2.png").exists(), "images are never overwritten"


def test_generate_writes_the_words_maps_beside_the_image(gobelin, trained, tmp_path):
    options = ("--model", trained, "--out", tmp_path, "--seed", 5, "--steps", 2)
    status, out, err = gobelin("generate", "a red circle", *options, "--maps")
    assert status == 0, err
    image, sheet = out.split()
    assert sheet == str(tmp_path / "a-red-circle-5-words.png")
    with Image.open(sheet) as words, Image.open(image) as painted:
        assert words.width > 3 * painted.width


def test_the_shipped_model_paints(gobelin, tmp_path):
    status, out, err = gobelin("generate", "a red circle", "--out", tmp_path, "--seed", 1)
    assert status == 0, err
    with Image.open(out.strip()) as image:
        assert image.size == (64, 64)


@pytest.mark.filterwarnings("default::UserWarning")
def test_what_is_cut_off_a_long_prompt_is_said(gobelin, trained, tmp_path):
    prompt = "a red circle and " * 20 + "a zebra"
    status, _, err = gobelin("generate", prompt, "--model", trained, "--out", tmp_path, "--steps", 1)
    assert status == 0
    assert err.count("\n") == 1
    assert "longer than this model's 32 tokens" in err
    assert "a zebra'" in err


@pytest.mark.parametrize(
    ("part", "damage", "message"),
    [
        ("unet/diffusion_pytorch_model.safetensors", lambda file: file.unlink(), "no weight file at"),
        (
            "vae/diffusion_pytorch_model.safetensors",
            lambda file: file.write_bytes(file.read_bytes()[:-100]),
            "is not a whole safetensors file",
        ),
        (
            "unet/config.json",
            lambda file: file.write_text(
                file.read_text().replace('"cross_attention_dim": 32', '"cross_attention_dim": 40')
            ),
            "'down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight' is [32, 32], but the configuration",
        ),
        ("text_encoder/config.json", lambda file: file.write_text("{"), "cannot be read as JSON"),
    ],
)
def test_damaged_models_are_named_file_and_key(refused, trained, tmp_path, part, damage, message):
    model = tmp_path / "model"
    shutil.copytree(trained, model)
    damage(model / part)
    status, err = refused("generate", "x", "--model", model, "--out", tmp_path / "out")
    assert status == 1
    assert message in err
    assert str(model / part.split("/")[0]) in err
    assert not (tmp_path / "out").exists()


def test_an_image_is_painted_over_and_outside_of_the_mask_stays_bit_for_bit(gobelin, trained, tmp_path):
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
    assert "was painted with an init_image, which it does not hold: give its --init-image" in err
    images = ("--init-image", tmp_path / "before.png", "--mask", tmp_path / "hole.png")
    status, repeated, err = gobelin(*again, *images)
    assert status == 0, err
    assert np.array_equal(np.asarray(Image.open(repeated.strip())), painted)
    status, _, err = gobelin(*again, "--init-image", tmp_path / "hole.png", "--mask", tmp_path / "hole.png")
    assert status == 2
    assert "is not the init_image that" in err


def test_an_image_is_repeated_from_itself_and_what_is_given_besides_holds(gobelin, trained, tmp_path):
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
        (["--init-image", "x.png"], "there is no image at x.png"),
        (["--init-image", "{p}", "--mask", "x.png"], "there is no image at x.png"),
        (["--init-image", "{p}", "--strength", "2"], "--strength is 2.0: give a fraction from 0 to 1"),
        (["--init-image", "{p}", "--strength", "0.01"], "leaves none of 4 steps: give 0.25 or more"),
        (["--init-image", "{large}"], "give the size to paint, such as width 84 and height 64"),
        (["--mask", "{p}"], "mask is given without an image"),
        (["--strength", "0.5"], "strength is given without an image"),
        (["--from", "{p}"], "p.png does not say how it was made: give an image that"),
        (["--from", "nowhere.png"], "there is no image at nowhere.png"),
        (["--out", "{p}"], "which is a file: give a folder to write to"),
        (["--lora", "x.safetensors:y"], "--lora has 'x.safetensors:y'"),
        (["--lora", "x.safetensors:0.5"], "no weight file at x.safetensors"),
        (["--model", "nowhere.safetensors"], "no model at nowhere.safetensors"),
    ],
)
def test_what_cannot_be_painted_is_said_in_one_sentence(refused, trained, tmp_path, arguments, message):
    Image.new("RGB", (64, 64)).save(tmp_path / "p.png")
    Image.new("RGB", (4000, 3000)).save(tmp_path / "large.png")
    files = {"p": tmp_path / "p.png", "large": tmp_path / "large.png"}
    given = [argument.format(**files) for argument in arguments]
    model = [] if "--model" in given else ["--model", trained]
    out = [] if "--out" in given else ["--out", tmp_path / "out"]
    status, err = refused("generate", "a ring", *model, "--steps", 4, *out, *given)
    assert status in (1, 2)
    assert message in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("prompt", "what"),
    [
        ("a [red:blue:0.5] circle", "'[red:blue:0.5]', AUTOMATIC1111's prompt editing"),
        ("a [red|blue] circle", "'[red|blue]', AUTOMATIC1111's alternating words"),
        ("a circle AND a square", "'AND', AUTOMATIC1111's AND"),
    ],
)
def test_a_prompt_over_time_of_another_tool_is_refused_unless_read_as_text(gobelin, refused, tmp_path, prompt, what):
    info = PngInfo()
    info.add_text("parameters", f"{prompt}\nSteps: 1, Sampler: Euler, CFG scale: 3, Seed: 4, Size: 64x64, Model: v1-5")
    Image.new("RGB", (64, 64)).save(tmp_path / "other.png", pnginfo=info)
    status, sentence = refused("generate", "--from", tmp_path / "other.png", "--out", tmp_path / "out")
    assert status == 2
    assert what in sentence
    assert not (tmp_path / "out").exists()
    text = ("--weights", "none", "--out", tmp_path / "out")
    status, out, err = gobelin("generate", "--from", tmp_path / "other.png", *text)
    assert status == 0, err
    assert "was painted by v1-5: give --model to use that one" in err
    assert read_png_settings(tmp_path / "out" / out.strip().rpartition("/")[2])["prompt"] == prompt


def test_a_jpeg_of_another_tool_is_painted_and_what_is_missing_is_said(gobelin, refused, tmp_path):
    text = "a circle\nSteps: 2, Sampler: Euler, CFG scale: 3, Seed: 4, Size: 64x64, VAE: mse"
    exif = Image.Exif()
    exif[0x0112] = 1
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + text.encode("utf-16-be")
    Image.new("RGB", (64, 64)).save(tmp_path / "other.jpg", exif=exif)
    status, out, err = gobelin("generate", "--from", tmp_path / "other.jpg", "--out", tmp_path / "out")
    assert status == 0, err
    assert "other.jpg cannot be repeated exactly: VAE: mse" in err
    expected = {"prompt": "a circle", "steps": 2, "sampler": "euler", "guidance": 3, "seed": 4, "width": 64}
    assert expected.items() <= read_png_settings(Path(out.strip())).items()
    Image.new("RGB", (64, 64)).save(tmp_path / "other.jpg", comment=b'{"Software": "NovelAI", "prompt": "a cat"}')
    status, sentence = refused("generate", "--from", tmp_path / "other.jpg", "--out", tmp_path / "none")
    assert status == 1
    assert "other.jpg: its text says that NovelAI made it" in sentence


def test_an_init_image_is_turned_as_its_exif_says(gobelin, trained, tmp_path):
    upright = Image.new("RGB", (64, 96), "red")
    upright.paste("blue", (0, 0, 64, 48))
    exif = upright.getexif()
    exif[0x0112] = 6  # the camera lay on its side: turn by 90° clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    painted = {}
    for name in ("turned", "upright"):
        options = ("--model", trained, "--seed", 1, "--steps", 4, "--strength", 0.5, "--out", tmp_path / name)
        status, out, err = gobelin("generate", "a ring", *options, "--init-image", tmp_path / f"{name}.png")
        assert status == 0, err
        painted[name] = np.asarray(Image.open(out.strip()))
    assert painted["turned"].shape == (96, 64, 3)
    assert np.array_equal(painted["turned"], painted["upright"])


def test_an_approximate_image_says_so_and_is_repeated_from_itself(gobelin, refused, trained, tmp_path):
    options = ("--model", trained, "--steps", 5, "--seed", 2)
    approximate = ("--cache-interval", 2, "--merge-tokens", 0.5)
    image = painted(gobelin, tmp_path / "one", "a red circle", *options, *approximate)
    settings = read_png_settings(image)
    assert (settings["cache_interval"], settings["merge_tokens"]) == (2, 0.5)
    exact = painted(gobelin, tmp_path / "exact", "a red circle", *options)
    assert not {"cache_interval", "merge_tokens"} & read_png_settings(exact).keys()
    again = painted(gobelin, tmp_path / "again", "--from", image, "--model", trained)
    pixels, repeated, others = (np.asarray(Image.open(path)) for path in (image, again, exact))
    assert np.array_equal(pixels, repeated)
    assert not np.array_equal(pixels, others)
    out = ("--model", trained, "--out", tmp_path / "none")
    _, message = refused("generate", "a red circle", *out, "--merge-tokens", 0.9)
    assert "--merge-tokens is 0.9: give a number from 0 to 0.75" in message
    _, message = refused("look", "a red circle", *out, "--per", "step", "--cache-interval", 2)
    assert "the maps of every step are asked for" in message


def test_prompts_without_quotes_are_said_to_be_several(gobelin, trained, tmp_path):
    options = ("--model", trained, "--steps", 1, "--out", tmp_path)
    status, out, err = gobelin("generate", "a", "red", "circle", *options)
    assert (status, len(out.split())) == (0, 3)
    assert "painting 3 prompts, 'a', 'red', 'circle': a prompt of several words needs quotes" in err
    assert gobelin("generate", "a circle", *options, "a ring")[2] == ""


@pytest.mark.parametrize(
    ("prompt", "stem"),
    [("Größere Kreise, süß!", "größere-kreise-süß"), ("猫と犬", "猫と犬"), ("../etc/кот", "etc-кот"), ("!?", "image")],
)
def test_files_are_named_in_the_letters_of_the_prompt(gobelin, trained, tmp_path, prompt, stem):
    status, out, err = gobelin(
        "generate", prompt, "--model", trained, "--steps", 1, "--seed", 3, "--out", tmp_path / "out"
    )
    assert status == 0, err
    assert out == f"{tmp_path / 'out' / stem}-3.png\n"
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"{stem}-3.png"]


def test_an_image_of_another_model_asks_for_it_and_what_is_given_besides_holds(gobelin, trained, tmp_path):
    first = painted(gobelin, tmp_path / "a", "a red circle", "--model", trained, "--steps", 2, "--clip-skip", 1)
    status, _, err = gobelin("generate", "--from", first, "--out", tmp_path)
    assert status == 2
    assert "was painted by another model, model: give that one as --model" in err
    again = painted(gobelin, tmp_path / "b", "--from", first, "--model", trained)
    assert np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(again)))
    other = painted(
        gobelin, tmp_path / "c", "--from", first, "--model", trained, "--clip-skip", 0, "--negative-prompt", ""
    )
    assert read_png_settings(other) == read_png_settings(first) | {"clip_skip": 0}


def test_an_image_with_a_lora_asks_for_it(gobelin, trained, tmp_path):
    lora = tmp_path / "style.safetensors"
    save_lora(lora, trained)
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
        ({"foo": 1}, "unknown setting in"),
        ({"prompt": 5}, "is 5: give text"),
        ({"steps": "many"}, "steps is 'many': give a whole number"),
        ({"guidance": float("nan")}, "guidance is nan: give a number"),
        ({"width": 10**7, "height": 10**7}, "pixels asked for: give"),
        ({"seed": 1.5}, "seed is 1.5: give a whole number"),
        ({"prompt": "\ud800"}, "half a character"),
    ],
)
def test_an_image_with_odd_settings_gets_one_sentence(gobelin, change, message, tmp_path):
    first = painted(gobelin, tmp_path / "a", "a red circle", "--steps", 1)
    info = PngInfo()
    info.add_text("gobelin", json.dumps(read_png_settings(first) | change))
    Image.open(first).save(tmp_path / "odd.png", pnginfo=info)
    status, _, err = gobelin("generate", "--from", tmp_path / "odd.png", "--out", tmp_path)
    assert status == 2
    assert message in err
    assert "Traceback" not in err


@pytest.fixture
def loras(trained, tmp_path):
    """A folder of LoRAs: "style" in a folder of it, "Upper", and "twice" in two."""
    folder = tmp_path / "loras"
    for file in ("deep/er/style", "Upper", "a/twice", "b/twice", "c/TWO", "c/two"):
        save_lora(folder / f"{file}.safetensors", trained)
    return folder


def test_loras_that_a_prompt_asks_for_are_those_of_the_folder(gobelin, trained, loras, tmp_path):
    options = ("--model", trained, "--seed", 1, "--steps", 2, "--negative-prompt")
    tagged = painted(
        *(gobelin, tmp_path / "a", "a red circle<lora:style:0.5> <lora:upper:-1>", *options, "blue"),
        *("--lora-dir", loras),
    )
    given = ("--lora", f"{loras}/deep/er/style.safetensors:0.5", f"{loras}/Upper.safetensors:-1")
    plain = painted(gobelin, tmp_path / "b", "a red circle", *options, "blue", *given)
    settings = read_png_settings(tagged)
    assert settings == read_png_settings(plain)
    assert settings["loras"] == {"style": 0.5, "Upper": -1.0}
    assert (settings["prompt"], settings["negative_prompt"]) == ("a red circle", "blue")
    assert tagged.name == "a-red-circle-1.png"
    assert np.array_equal(np.asarray(Image.open(tagged)), np.asarray(Image.open(plain)))
    again = painted(gobelin, tmp_path / "c", "--from", tagged, "--model", trained, *given)
    assert np.array_equal(np.asarray(Image.open(tagged)), np.asarray(Image.open(again)))


def test_loras_of_another_programs_image_are_those_of_the_folder(gobelin, trained, loras, tmp_path):
    info = PngInfo()
    info.add_text(
        "parameters", "a red circle <lora:style:0.5>\nSteps: 2, Sampler: Euler, CFG scale: 3, Seed: 1, Size: 64x64"
    )
    Image.new("RGB", (64, 64)).save(tmp_path / "theirs.png", pnginfo=info)
    given = ("--from", tmp_path / "theirs.png", "--model", trained, "--out", tmp_path / "out")
    status, out, err = gobelin("generate", *given, "--lora-dir", loras)
    assert status == 0, err
    assert "added network" not in err
    settings = read_png_settings(Path(out.strip()))
    assert (settings["prompt"], settings["loras"]) == ("a red circle", {"style": 0.5})
    status, out, err = gobelin("generate", *given)
    assert status == 0, err
    assert "cannot be repeated exactly: the added network <lora:style:0.5>" in err
    assert "loras" not in read_png_settings(Path(out.strip()))


def test_a_lora_of_no_weight_is_not_loaded_and_several_prompts_may_have_the_same(gobelin, trained, loras, tmp_path):
    options = ("--model", trained, "--seed", 1, "--steps", 1, "--lora-dir", loras, "--out", tmp_path / "out")
    prompts = ("a red circle <lora:style:0.5> <lora:none:0>", "<lora:none:0><lora:style:.50> a blue ring")
    status, out, err = gobelin("generate", *prompts, *options)
    assert status == 0, err
    assert [read_png_settings(Path(file))["loras"] for file in out.split()] == [{"style": 0.5}] * 2


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["a <lora:stile:1>"], r"there is no 'stile.safetensors' in .*: did you mean 'style'\?"),
        (["a <lora:../style:1>"], "there is no '../style.safetensors' in"),
        (["a <lora:twice:1>"], r"the LoRA 'twice' is in .* several times: 'a/twice.safetensors, b/twice.safetensors'"),
        (["a <lora:Two:1>"], r"the LoRA 'Two' is in .* several times"),
        (["a <lora:style:1>", "b"], "ask for different LoRAs, which change the whole model"),
        (["a <lora:style:1>", "b <lora:style:0.9>"], "ask for different LoRAs"),
        (["a <lora:style:1>", "--negative-prompt", "b <lora:style:0.9>"], "the prompt has '<lora:style:0.9>'"),
        (["a <lora:style:1:0.5>"], "one weight for the text encoder and another for the U-Net"),
        (["a <lyco:style:1>"], "a LyCORIS network to load"),
        (["a <hypernet:style:1>"], "a hypernetwork to load"),
    ],
)
def test_loras_that_cannot_be_found_or_meant_are_refused(refused, trained, loras, tmp_path, prompts, message):
    arguments = ("--model", trained, "--steps", 1, "--out", tmp_path / "out", "--lora-dir", loras)
    status, said = refused("generate", *prompts, *arguments)
    assert status == 2
    assert re.search(message, said)
    assert not (tmp_path / "out").exists()


def test_without_its_folder_a_lora_in_a_prompt_is_refused_with_a_hint(refused, trained, loras, tmp_path):
    given = ("--model", trained, "--steps", 1, "--out", tmp_path / "out")
    _, said = refused("generate", "a <lora:style:1>", *given)
    assert "load it with load_lora (--lora FILE, or --lora-dir with the folder that it is in)" in said
    _, said = refused("generate", "a <lora:style:1>", *given, "--lora-dir", tmp_path / "nowhere")
    assert "--lora-dir is" in said
    assert "which is no folder" in said
    _, said = refused("generate", "a <lora:style:1>", *given, "--lora-dir", tmp_path / "nowhere", "--lora", "x:0.5")
    assert "no folder" in said


def test_looking_and_editing_take_the_same_tags(gobelin, trained, loras, tmp_path):
    options = ("--model", trained, "--seed", 1, "--steps", 2, "--lora-dir", loras, "--out", tmp_path / "out")
    status, out, err = gobelin("look", "a red circle <lora:style:0.5>", *options)
    assert status == 0, err
    assert read_png_settings(Path(out.split()[0]))["loras"] == {"style": 0.5}
    tag = "<lora:style:0.5>"
    status, out, err = gobelin("edit", f"a red circle {tag}", "--to", f"a blue circle {tag}", *options)
    assert status == 0, err
    assert {read_png_settings(Path(file))["prompt"] for file in out.split()[:2]} == {"a red circle", "a blue circle"}
    status, _, err = gobelin("edit", f"a red circle {tag}", "--to", "a blue circle", *options)
    assert "ask for different LoRAs" in err
