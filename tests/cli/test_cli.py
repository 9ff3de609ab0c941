"""The command line as a user meets it: what it prints, what it writes, how it leaves."""

import json
import shutil
import subprocess
import sys
import tomllib

import numpy as np
import pytest
from PIL import Image

from gobelin.cli.main import COMMANDS
from gobelin.formats.png import read_png_settings, write_png
from gobelin.training import find_preset


def is_one_sentence(text):
    return text.count("\n") == 1 and "Traceback" not in text and text.startswith("gobelin: ")


def test_help_lists_every_command_and_imports_no_torch():
    code = (
        "import sys\nfrom gobelin.cli.main import main\nmain(['--help'])\n"
        "heavy = {'torch', 'numpy', 'PIL', 'tyro'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert f"  {command}" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(gobelin, command):
    status, out, _ = gobelin(command, "--help")
    assert status == 0
    assert f"gobelin {command}" in out.split("xamples:")[1]


def test_generate_paints_pictures_that_remember(gobelin, trained, tmp_path):
    out = tmp_path / "pictures"
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
    assert np.abs(one - other).max() <= 1, "the same seed paints the same picture, whatever else is in the batch"

    gobelin("generate", "a BLUE ring!", "--model", trained, "--out", again, "--seed", 8, "--steps", 2)
    assert (again / "a-blue-ring-8-2.png").exists(), "pictures are never overwritten"


def test_generate_writes_the_words_maps_beside_the_picture(gobelin, trained, tmp_path):
    options = ("--model", trained, "--out", tmp_path, "--seed", 5, "--steps", 2)
    status, out, err = gobelin("generate", "a red circle", *options, "--maps")
    assert status == 0, err
    picture, sheet = out.split()
    assert sheet == str(tmp_path / "a-red-circle-5-words.png")
    with Image.open(sheet) as image, Image.open(picture) as painted:
        assert image.width > 3 * painted.width


def test_look_writes_sheets_a_page_an_animation_and_numbers(gobelin, trained, tmp_path):
    files = {"json": tmp_path / "words.json", "npz": tmp_path / "maps.npz"}
    status, out, err = gobelin(
        *("look", "a red circle", "--model", trained, "--out", tmp_path, "--seed", 5, "--steps", 3),
        *("--per", "head", "--at", 20, 31, "--animation", "--json", files["json"], "--npz", files["npz"]),
    )
    assert status == 0, err
    stem = "a-red-circle-5"
    for name in ("-words.png", "-per-head.png", "-at-20-31.png", ".html", ".webp"):
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
    assert maps["maps"].shape == (3, 64, 64)
    row, column = np.unravel_index(maps["maps"][2].argmax(), (64, 64))
    assert said["words"][2]["most_at"] == [column, row]


def test_look_shows_sharp_maps_and_keeps_what_they_are_made_of(gobelin, trained, tmp_path):
    options = ("--model", trained, "--out", tmp_path, "--seed", 5, "--steps", 3, "--words", "red")
    for name, more in (("sharp", ()), ("plain", ("--plain",))):
        status, _, err = gobelin("look", "a red circle", *options, "--npz", tmp_path / f"{name}.npz", *more)
        assert status == 0, err
    sharp, plain = (np.load(tmp_path / f"{name}.npz") for name in ("sharp", "plain"))
    assert {name.split(".")[0] for name in sharp} == {"words", "maps", "up_blocks"}
    assert {name[-5:] for name in plain} == {"words", "maps", "attn2"}
    own = np.mean([sharp[name][0, 0] for name in sharp if name.endswith("attn1")], axis=0)
    shares = [sharp[name][0, 0, :, 2] for name in sharp if name.endswith("attn2")]  # BOS, a, red
    expected = np.mean([share * (own @ share) / (own @ share).max() for share in shares], axis=0).reshape(16, 16)
    corners = sharp["maps"][0][1::4, 1::4], sharp["maps"][0][2::4, 2::4]
    assert np.corrcoef(sum(corners).ravel(), expected.ravel())[0, 1] > 0.99


def test_look_paints_a_picture_again_and_says_when_it_is_another(gobelin, trained, tmp_path):
    gobelin("generate", "a red circle", "--model", trained, "--out", tmp_path, "--seed", 5, "--steps", 2)
    picture = tmp_path / "a-red-circle-5.png"
    out = tmp_path / "maps"
    status, printed, err = gobelin("look", picture, "--model", trained, "--out", out, "--words", "circle", "red circle")
    assert (status, err) == (0, "")
    assert printed.split() == [str(out / "a-red-circle-5-words.png"), str(out / "a-red-circle-5.html")]
    for per in ("step", "layer"):
        status, printed, _ = gobelin("look", picture, "--model", trained, "--out", out, "--per", per)
        assert f"a-red-circle-5-per-{per}.png" in printed

    status, _, err = gobelin("look", picture, "--model", trained, "--out", out, "--steps", 3)
    assert status == 2
    assert "leave out --steps" in err

    settings = read_png_settings(picture)
    write_png(picture, Image.new("RGB", (64, 64)), settings)
    status, _, err = gobelin("look", picture, "--model", trained, "--out", out)
    assert status == 0
    assert "painted again" in err
    Image.new("RGB", (64, 64)).save(picture)
    status, _, err = gobelin("look", picture, "--model", trained, "--out", out)
    assert status == 1
    assert is_one_sentence(err)
    assert "carries no settings" in err


def test_edit_keeps_the_picture_and_shows_what_changed(gobelin, trained, tmp_path):
    options = ("--model", trained, "--out", tmp_path, "--seed", 5, "--steps", 2)
    status, out, err = gobelin(
        "edit", "a red circle", "--to", "a blue circle", *options, "--reweight", "blue=2", "--blend", "red", "blue"
    )
    assert status == 0, err
    assert [path.rpartition("/")[2] for path in out.split()] == [
        "a-red-circle-5.png",
        "a-blue-circle-5.png",
        "a-blue-circle-5-edit.png",
    ]
    status, _, err = gobelin("look", tmp_path / "a-blue-circle-5.png", "--model", trained, "--out", tmp_path)
    assert status == 2
    assert "was painted with an edit" in err
    assert all(Image.open(path).width >= 64 for path in out.split())


def test_edit_changes_a_picture_that_is_given(gobelin, trained, tmp_path):
    picture, hole, out_folder = tmp_path / "given.png", tmp_path / "hole.png", tmp_path / "out"
    Image.new("RGB", (64, 80), "red").save(picture)
    Image.new("L", (64, 80), "white").save(hole)
    options = ("--init-image", picture, "--mask", hole, "--model", trained, "--out", out_folder, "--steps", 2)
    status, out, err = gobelin("edit", "a red circle", "--to", "a blue circle", *options, "--seed", 5)
    assert status == 0, err
    assert [path.rpartition("/")[2] for path in out.split()] == ["a-blue-circle-5.png", "a-blue-circle-5-edit.png"]
    with Image.open(out.split()[0]) as changed:
        assert changed.size == (64, 80)
    status, _, err = gobelin("edit", "a red circle", "--to", "a blue circle", "--init-image", tmp_path / "no.png")
    assert status == 1
    assert is_one_sentence(err)
    assert "cannot be read as a picture" in err


def test_the_shipped_model_paints(gobelin, tmp_path):
    status, out, err = gobelin("generate", "a red circle", "--out", tmp_path, "--seed", 1)
    assert status == 0, err
    with Image.open(out.strip()) as image:
        assert image.size == (64, 64)


def test_what_is_cut_off_a_long_prompt_is_said(gobelin, trained, tmp_path):
    prompt = "a red circle and " * 20 + "a zebra"
    status, _, err = gobelin("generate", prompt, "--model", trained, "--out", tmp_path, "--steps", 1)
    assert status == 0
    assert is_one_sentence(err)
    assert "longer than this model's 32 tokens" in err
    assert "a zebra'" in err


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["paint"], 2, "unknown command 'paint': the choices are generate, look, edit, train"),
        (["generate"], 2, "no prompt given"),
        (["generate", "  "], 2, "the prompt is empty"),
        (["generate", "x", "--sampler", "magic"], 2, "unknown sampler 'magic': the choices are ddpm, ddim, pndm"),
        (
            ["generate", "x", "--width", "70"],
            2,
            "70×64 pixels asked for: this model paints sizes that are multiples of 4",
        ),
        (["generate", "x", "--height", "-4"], 2, "multiples of 4"),
        (["generate", "x", "--steps", "0"], 2, "0 steps asked for: give a number from 1 to 1000"),
        (["generate", "x", "--count", "0"], 2, "count is 0"),
        (["generate", "x", "--seed", "-1"], 2, "the seed is -1"),
        (["generate", "x", "--device", "abacus"], 2, "unknown device 'abacus'"),
        (["generate", "x", "--model", "nowhere"], 1, "no model at nowhere: expected a folder with a model_index.json"),
        (["train", "--preset", "huge"], 2, "unknown preset 'huge': the choices are nano"),
        (["train", "--preset"], 2, "argument --preset: expected one argument; the presets are nano"),
        (["train"], 2, "no folder to write to: say --out DIR"),
        (["train", "--stage", "magic", "--out", "x"], 2, "unknown stage 'magic': the choices are tokenizer"),
        (["train", "nowhere.toml", "--out", "x"], 2, "the configuration nowhere.toml cannot be read"),
        (["train", "--out", "x", "late.toml"], 2, "late.toml comes too late"),
        (["generate", "x", "--device", "cpu:x"], 2, "unknown device 'cpu:x'"),
        (["generate", "x", "--height", "0"], 2, "64×0 pixels asked for"),
        (["look", "a red circle", "--words", "cat"], 2, "'cat' is not in the prompt, whose words are a, red, circle"),
        (["look", "a red circle", "--at", "64", "0"], 2, "is not in the picture of 64×64 pixels"),
        (["look", "a red circle", "--sites", "attn3"], 2, "'attn3' matches no attention"),
        (["look", "!?"], 2, "'!?' has no word to look at"),
        (["edit", "a red circle", "--to", "a ring", "--reweight", "a=nan"], 2, "the weight of 'a' is nan"),
        (["look", "nowhere.png"], 2, "there is no picture at nowhere.png"),
        (["edit", "a red circle", "--to", "a ring", "--reweight", "red"], 2, "--reweight has 'red': give WORD=NUMBER"),
        (["edit", "a red circle", "--to", "a ring", "--cross", "2"], 2, "cross is 2.0: give a share of the way"),
        (["data", "scenes", "--out", "x", "--split", "all"], 2, "unknown split 'all': the choices are train"),
        (["data", "scenes", "--out", "x", "--count", "0"], 2, "0 scenes asked for: give 1 or more"),
        (["train", "--data.path", "nowhere", "--out", "x"], 1, "no folder at nowhere"),
        (["show", "sd99"], 2, "'sd99' is neither a folder nor a preset: the presets are nano, tiny, small, sd15"),
        (["show", "sd15", "--height", "12"], 2, "512×12 pixels: this model paints sizes that are multiples of 8"),
        (["data", "dance"], 2, "unknown action 'dance': the choices are scenes, check"),
        (["data", "check", "nowhere"], 1, "no folder at nowhere"),
    ],
)
def test_bad_input_gets_one_sentence(gobelin, tmp_path, monkeypatch, arguments, status, message):
    monkeypatch.chdir(tmp_path)
    got, _, err = gobelin(*arguments)
    assert is_one_sentence(err), err
    assert message in err
    assert got == status
    assert not list(tmp_path.iterdir()), "nothing half-written"


@pytest.mark.parametrize(
    "arguments",
    [("generate", "x", "--brush", "7"), ("generate", "x", "--seed", "x"), ("train", "--unet.optim.steps", "x")],
)
def test_unknown_and_malformed_options_are_wrong_usage(gobelin, arguments):
    status, _, err = gobelin(*arguments)
    assert status == 2
    assert "Traceback" not in err
    assert arguments[-2] in err or arguments[-1] in err


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
def test_damaged_models_are_named_file_and_key(gobelin, trained, tmp_path, part, damage, message):
    model = tmp_path / "model"
    shutil.copytree(trained, model)
    damage(model / part)
    status, _, err = gobelin("generate", "x", "--model", model, "--out", tmp_path / "out")
    assert status == 1
    assert is_one_sentence(err)
    assert message in err
    assert str(model / part.split("/")[0]) in err
    assert not (tmp_path / "out").exists()


def test_train_takes_a_preset_a_file_and_options(gobelin, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("seed = 3\n[unet]\ncaption_dropout = 0\n[unet.optim]\nsteps = 7\nlearning_rate = 1e-3\n")
    status, out, err = gobelin("train", file, "--unet.optim.steps", 9, "--print-config")
    assert status == 0, err
    config = tomllib.loads(out)
    assert (config["seed"], config["unet"]["caption_dropout"]) == (3, 0.0)
    assert (config["unet"]["optim"]["steps"], config["unet"]["optim"]["learning_rate"]) == (9, 1e-3)
    assert config["vae"]["optim"]["steps"] == find_preset("nano").vae.optim.steps


def test_resume_takes_the_numbers_of_the_run(gobelin, trained):
    status, out, err = gobelin("train", "--out", trained, "--resume", "--print-config")
    assert status == 0, err
    assert tomllib.loads(out)["unet"]["optim"]["steps"] == 4
    status, out, err = gobelin("train", "--out", trained, "--resume")
    assert (status, out.strip()) == (0, str(trained)), err
    assert "unet: done before, kept" in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[unet]\ncaption_droput = 0.2", "unknown key 'caption_droput': did you mean 'caption_dropout'?"),
        ("unet = 3", "unet is 3, expected a table [unet]"),
        ("seed = 'x'", "seed is 'x', expected a int like 0"),
        ("seed = ", "cannot be read"),
    ],
)
def test_a_wrong_configuration_file_is_wrong_usage(gobelin, tmp_path, text, message):
    file = tmp_path / "bad.toml"
    file.write_text(text)
    status, _, err = gobelin("train", file, "--out", tmp_path / "model")
    assert status == 2
    assert is_one_sentence(err)
    assert message in err


def test_show_prints_the_tree_and_the_walk(gobelin, trained):
    status, out, _ = gobelin("show", "sd15")
    assert status == 0
    for name in (
        "Transformer2DModel",
        "BasicTransformerBlock",
        "(to_k): Linear(in_features=768, out_features=320, bias=False)",
    ):
        assert name in out
    assert "859,520,964 parameters in 686 tensors" in out
    assert "[1, 8, 4096, 77]" in out
    assert "16 self-attentions (attn1), 16 cross-attentions (attn2)." in out
    status, out, _ = gobelin("show", trained, "--width", 96, "--no-tree")
    assert status == 0
    assert "A 96×64 picture is [1, 4, 16, 24] latents; a prompt is 32 tokens." in out
    assert "[1, 2, 384, 32]" in out


def test_scenes_become_a_folder_that_training_reads(gobelin, tmp_path):
    out = tmp_path / "scenes"
    status, _, err = gobelin("data", "scenes", "--out", out, "--count", 6, "--world", "nano")
    assert status == 0, err
    entry = json.loads((out / "metadata.jsonl").read_text().splitlines()[3])
    mask = np.asarray(Image.open(out / "masks" / entry["file_name"]))
    assert set(np.unique(mask)) == set(range(len(entry["scene"]["objects"]) + 1))
    (out / "000001.png").write_bytes(b"broken")
    status, printed, _ = gobelin("data", "check", out, "--json", tmp_path / "check.json")
    assert status == 0
    assert "5 pairs can be used, 1 were skipped\n  000001.png: not a readable image" in printed
    assert json.loads((tmp_path / "check.json").read_text())["pairs"] == 5
    status, _, err = gobelin("data", "scenes", "--out", out)
    assert status == 1
    assert "is not empty" in err
