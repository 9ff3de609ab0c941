"""``gobelin evaluate heads``: fitted, measured, and kept where that is asked for."""

import json
import shutil

import pytest

from gobelin.pipeline import Pipeline, shipped_model


def test_one_command_keeps_them_beside_the_model(gobelin, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(shipped_model(), model)
    (model / "head_weights.json").unlink()
    status, _, said = gobelin(
        "evaluate", "heads", model, "--scenes", 24, "--limit", 8, "--json", tmp_path / "found.json"
    )
    assert status == 0, said
    assert not (model / "head_weights.json").exists()
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["weighted"]["noun"]["value"] > found["plain"]["noun"]["value"]
    assert found["weighted"]["colour"]["value"] > found["plain"]["colour"]["value"] + 0.05
    status, said, _ = gobelin("evaluate", "heads", model, "--scenes", 24, "--limit", 2, "--save")
    assert status == 0
    assert f"saved: {model / 'head_weights.json'}" in said
    assert Pipeline.from_pretrained(model).model.head_weights is not None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--scenes", "1"], "scenes is 1: give a number from 2"),
        (["--limit", "1"], "limit is 1: give a number from 2"),
        (["nowhere", "--save"], "nowhere is no folder, and head weights are kept in the model's"),
    ],
)
def test_bad_options_get_one_sentence(gobelin, options, said):
    status, _, answer = gobelin("evaluate", "heads", *options)
    assert status == 2
    assert said in answer
    assert len(answer.splitlines()) == 1
