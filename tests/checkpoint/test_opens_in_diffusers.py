"""Folders in every precision paint in diffusers with no argument but their path, and paint what Gobelin paints."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from gobelin.formats.files import read_json
from gobelin.pipeline import Pipeline, shipped_model

PROMPTS = ["a red circle left of a blue square", "a green ring"]
SEEDS = [3, 8]
LARGEST_DIFFERENCE = 2  # levels of 255, as in tests/test_modes.py


@pytest.fixture(params=[None, torch.float16, torch.bfloat16, torch.float32], ids=str)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The shipped folder as it is, and saved in each precision."""
    if request.param is None:
        return shipped_model()
    Pipeline.from_pretrained(None, "cpu").save_pretrained(tmp_path, request.param)
    return tmp_path


def test_a_folder_paints_in_diffusers_without_an_argument(folder: Path) -> None:
    theirs = StableDiffusionPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    expected = theirs(PROMPTS, generator=generators, num_inference_steps=2, guidance_scale=3.0, output_type="np").images
    assert np.isfinite(expected).all()
    assert expected.std() > 0.05, "an image of one colour tells nothing"

    pipe = Pipeline.from_pretrained(folder, "cpu")
    images = pipe(PROMPTS, seed=SEEDS, sampler="ddim", steps=2, guidance=3.0, guidance_rescale=0.0).images
    found = np.stack([np.asarray(image, np.float32) for image in images])
    assert np.abs(found - (expected * 255).round()).max() <= LARGEST_DIFFERENCE


def test_the_precision_to_load_in_comes_back_from_a_folder_and_changes_nothing(folder: Path, tmp_path: Path) -> None:
    assert read_json(folder / "text_encoder" / "config.json")["dtype"] == "float32"
    pipe = Pipeline.from_pretrained(folder, "cpu", torch.float16)
    assert pipe.text_encoder.dtype == torch.float16
    pipe.save_pretrained(tmp_path / "again")
    assert read_json(tmp_path / "again" / "text_encoder" / "config.json")["dtype"] == "float32"
