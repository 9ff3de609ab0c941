"""``gobelin convert``, ``gobelin verify`` and what ``generate`` paints over or repeats, as a user meets them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

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
    tensors = load_file(tmp_path / "x.safetensors").values()
    assert {tensor.dtype for tensor in tensors if tensor.numel()} == {torch.bfloat16}, "all but the markers"


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


def test_pickles_are_not_written(gobelin, half, tmp_path):
    status, _, err = gobelin("convert", half, tmp_path / "x.ckpt")
    assert status == 2
    assert "would be a .ckpt file, which Gobelin does not write" in err
