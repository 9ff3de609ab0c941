"""Models that ship open by their names, and what lies in the folder that one is in comes first."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from gobelin.checkpoint import loading, open_model
from gobelin.checkpoint.shipped import SHIPPED_MODELS, find_model, shipped_model
from gobelin.errors import ModelError
from gobelin.pipeline import Pipeline

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", SHIPPED_MODELS)
def test_a_model_opens_by_its_name(name):
    assert open_model(name, CPU, torch.float32).name == name
    assert open_model(Path(name), CPU, torch.float32).name == name, "as the command line's options are paths"
    assert find_model(name) == shipped_model(name)


def test_the_first_opens_where_none_is_named():
    assert Pipeline.from_pretrained().name == SHIPPED_MODELS[0] == find_model(None).name


def test_a_model_of_ones_own_comes_first(trained):
    shutil.copytree(trained, "emoji")
    ours = open_model("emoji", CPU, None)
    assert ours.unet.config == open_model(trained, CPU, None).unet.config
    assert ours.unet.config != open_model(shipped_model("emoji"), CPU, None).unet.config


def test_a_folder_without_a_model_is_said():
    Path("emoji").mkdir()
    with pytest.warns(UserWarning, match="the folder of that name here holds no model"):
        assert find_model("emoji") == shipped_model("emoji")
    with pytest.raises(ModelError, match="no model at"):
        open_model(Path("emoji").resolve(), CPU, None)


def test_a_name_that_is_none_is_told_those_that_are():
    with pytest.raises(ModelError, match="a model that ships: tiny, emoji"):
        open_model("emojis", CPU, None)


def test_a_models_examples_are_kept_and_checked(trained, tmp_path):
    folder = tmp_path / "mine"
    model = open_model(trained, CPU, None)
    assert model.examples == ()
    Pipeline(dataclasses.replace(model, examples=("a cat", "a dog"))).save_pretrained(folder)
    assert open_model(folder, CPU, None).examples == ("a cat", "a dog")
    for wrong in ("a cat", [1], {"a": "cat"}):
        content = json.loads((folder / "gobelin.json").read_text())
        (folder / "gobelin.json").write_text(json.dumps({**content, "examples": wrong}))
        with pytest.raises(ModelError, match=r"examples is .*, expected a list of prompts"):
            open_model(folder, CPU, None)


def test_a_path_that_leads_nowhere_is_no_name_of_the_hub(monkeypatch):
    def asked(*arguments):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(loading, "_download", asked)
    with pytest.raises(ModelError, match="no model at runs/mine"):
        Pipeline.from_pretrained("./runs/mine")
