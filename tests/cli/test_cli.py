"""The command line as a user meets it: what it prints, what it writes, how it leaves."""

import json
import tomllib

import numpy as np
import pytest
from PIL import Image

from gobelin.training import find_preset


def is_one_sentence(text):
    return text.count("\n") == 1 and "Traceback" not in text and text.startswith("gobelin: ")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["train", "--preset", "huge"], 2, "unknown preset 'huge': the choices are nano"),
        (["train", "--preset"], 2, "argument --preset: expected one argument; the presets are nano"),
        (["train"], 2, "no folder to write to: say --out DIR"),
        (["train", "--stage", "magic", "--out", "x"], 2, "unknown stage 'magic': the choices are tokenizer"),
        (["train", "nowhere.toml", "--out", "x"], 2, "the configuration nowhere.toml cannot be read"),
        (["train", "--out", "x", "late.toml"], 2, "late.toml comes too late"),
        (["data", "scenes", "--out", "x", "--split", "all"], 2, "unknown split 'all': the choices are train"),
        (["data", "scenes", "--out", "x", "--count", "0"], 2, "0 scenes asked for: give 1 or more"),
        (["train", "--data.path", "nowhere", "--out", "x"], 1, "no folder at nowhere"),
        (["show", "sd99"], 2, "'sd99' is neither a folder nor a preset: the presets are nano, tiny, small, sd15"),
        (["show", "sd15", "--height", "12"], 2, "512×12 pixels: this model paints sizes that are multiples of 8"),
        (["data", "dance"], 2, "unknown action 'dance': the choices are scenes, emoji, check"),
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
        ("seed = 'x'", "bad.toml: seed is 'x': give a whole number of 0 or more"),
        ("seed = ", "cannot be read"),
        ("[unet.optim]\nlearning_rate = -1", "bad.toml, unet, optim: learning_rate is -1.0: give a number above 0"),
        ("[recommended]\nsteps = 0", "bad.toml, recommended: steps is 0: give a whole number from 1 to 1000"),
    ],
)
def test_a_wrong_configuration_file_is_wrong_usage(gobelin, tmp_path, text, message):
    file = tmp_path / "bad.toml"
    file.write_text(text)
    status, _, err = gobelin("train", file, "--out", tmp_path / "model")
    assert status == 2
    assert is_one_sentence(err)
    assert message in err


def test_show_prints_the_tree_and_the_shapes(gobelin, trained):
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
    assert "A 96×64 image is [1, 4, 16, 24] latents; a prompt is 32 tokens." in out
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
    assert "5 captioned images can be used, 1 skipped\n" in printed
    assert "\n  000001.png: not a readable image\n" in printed
    assert json.loads((tmp_path / "check.json").read_text())["images"] == 5
    status, _, err = gobelin("data", "scenes", "--out", out)
    assert status == 1
    assert "is not empty" in err
