"""Correspondence against features that know the truth, or nothing."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gobelin.errors import UsageError
from gobelin.evaluate.correspondence import (
    ScenePair,
    baselines,
    correspondence_report,
    measure_correspondence,
    scene_pairs,
)
from gobelin.look.patch_features import PatchFeatures
from gobelin.pipeline import Pipeline
from gobelin.scenes import CORE, grade


@pytest.fixture(scope="module")
def pairs() -> list[ScenePair]:
    return list(scene_pairs(CORE, 4, "dev"))


@pytest.fixture(scope="module")
def pipe(trained: Path) -> Pipeline:
    return Pipeline.from_pretrained(trained)


def test_pairs_are_what_their_change_says(pairs: list[ScenePair]) -> None:
    assert [pair.change for pair in pairs[:3]] == ["moved", "colours exchanged", "moved, colours exchanged"]
    for pair in pairs:
        before, after = (
            sorted((one.shape, one.colour) for one in grade(image, CORE)) for image in (pair.before, pair.after)
        )
        assert len(before) == 2
        assert [shape for shape, _ in before] == [shape for shape, _ in after]
        assert (before == after) == (pair.change == "moved")
        assert {colour for _, colour in before} == {colour for _, colour in after}
        for (x, y), (u, v), mask in zip(*zip(*pair.points, strict=True), pair.objects, strict=True):
            assert pair.masks[:, y, x].any()
            assert mask[v, u]
            if pair.change == "colours exchanged":
                assert (x, y) == (u, v)
            if pair.change == "moved":  # inside of the outline, the same colour
                near = np.abs(pair.before[y, x].astype(int) - pair.after[v, u]).max()
                assert near < 20 or not mask[max(v - 1, 0) : v + 2, max(u - 1, 0) : u + 2].all()


def knowing(images: list[Image.Image], patch: int) -> PatchFeatures:
    """Features of a patch that say the shape which is there, and where in it: no colours."""
    values = []
    for image in images:
        found = sorted(grade(np.asarray(image), CORE), key=lambda one: one.shape)
        rows, columns = np.indices((image.height // patch, image.width // patch)) * patch + patch / 2
        maps = [np.full(rows.shape, 0.2)]
        for one in found:
            side = (one.box[2] - one.box[0]) / 2
            far = ((columns - one.x) / side, (rows - one.y) / side)
            maps += [
                np.exp(-4 * ((far[0] - at) ** 2 + (far[1] - down) ** 2))
                for at in (-0.6, 0, 0.6)
                for down in (-0.6, 0, 0.6)
            ]
        values.append(np.stack(maps))
    return PatchFeatures(values=torch.from_numpy(np.stack(values)).float(), images=images, layers=("known",))


def test_features_that_know_the_truth_are_right_and_blind_ones_at_chance(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blind(images: list[Image.Image], **options: Any) -> PatchFeatures:
        return replace(knowing(images, 4), values=torch.rand(len(images), 19, 16, 16))

    for features, least, most in ((lambda images, **options: knowing(images, 4), 0.9, 1.0), (blind, 0.0, 0.2)):
        monkeypatch.setattr(pipe, "features", features)
        found = measure_correspondence(pipe, CORE, 6, split="dev")
        for shares in found.found.values():
            assert least <= shares["features"].object.value <= most
            assert least <= shares["features"].place.value <= most
    for chance in found.chance.values():
        assert 0.01 < chance["place"] < chance["object"] < 0.15


def test_colours_alone_are_found_where_objects_keep_them(pipe: Pipeline) -> None:
    found = measure_correspondence(pipe, CORE, 3, split="dev", noises=1, timestep=100)
    assert found.layers[0] in pipe.unet.layer_names
    assert found.timestep == 100
    for change in found.found:
        assert list(found.found[change]) == ["features", "VAE latents", "raw pixels"]
    pixels = {change: found.found[change]["raw pixels"].object.value for change in found.found}
    assert pixels["moved"] > 0.6
    assert pixels["colours exchanged"] < 0.1
    assert pixels["moved, colours exchanged"] < 0.1
    assert found.clusters["raw pixels"].value > 0.4
    report = correspondence_report(found.to_json()).markdown()
    for text in ("| moved | chance |", "raw pixels", "timestep 100", "within 4 pixels"):
        assert text in report


def test_lists_of_splits_share_no_scene() -> None:
    dev, test = (list(scene_pairs(CORE, 5, split)) for split in ("dev", "test"))
    assert len(dev) == len(test) == 15
    seen = [pair.before.tobytes() for pair in (*dev[::3], *test[::3])]
    assert len(set(seen)) == 10
    assert all(one.before.tobytes() == other.before.tobytes() for one, other in pairwise(dev[:3]))


def test_a_world_without_two_objects_is_refused(pipe: Pipeline) -> None:
    alone = replace(CORE, name="alone", mix=(("single", 1.0),))
    with pytest.raises(UsageError, match="no scenes of two objects"):
        measure_correspondence(pipe, alone, 2)


def test_marks_are_compared_patch_by_patch(pipe: Pipeline) -> None:
    image = Image.effect_noise((64, 64), 50).convert("RGB")
    found = baselines(pipe, [image])
    factor = pipe.vae.config.factor
    assert found["VAE latents"].values.shape == (1, 4, 64 // factor, 64 // factor)
    corner = np.asarray(image)[:factor, :factor].transpose(2, 0, 1) / 127.5 - 1
    assert np.allclose(found["raw pixels"].values[0, :, 0, 0], corner.ravel(), atol=1e-5)
