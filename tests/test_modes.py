"""Whole pipelines against diffusers' with the same weights: from words, over a picture, into a hole of it."""

import json
import shutil
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionPipeline
from PIL import Image
from tests.schedulers import SCHEDULERS, ZERO_TERMINAL_SNR

from gobelin.pipeline import Pipeline, shipped_model

PROMPTS = ["a red circle left of a blue square", "a ring", "a blue square"]
SEEDS = [3, 8, 21]
STRAYS = 2  # levels of 255
SLOW = pytest.mark.slow
OFTEN = ("pndm", "dpmpp_2m_karras")  # the others are slow tests


def samplers(*but: str, of: Iterable[str] = SCHEDULERS) -> list[Any]:
    """Those whose name has none of these words in it."""
    names = [name for name in of if not any(word in name for word in but)]
    return [pytest.param(name, marks=() if name in OFTEN else SLOW) for name in names]


every_guidance = pytest.mark.parametrize("guidance", [pytest.param(1.0, marks=SLOW), 7.5])
every_strength = pytest.mark.parametrize("strength", [0.5, pytest.param(1.0, marks=SLOW)])


@pytest.fixture(scope="module")
def folder(make_oracle: Callable[..., StableDiffusionPipeline], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("modes")
    make_oracle().save_pretrained(folder / "random")
    make_oracle(9).save_pretrained(folder / "inpainting")
    shutil.copytree(shipped_model(), folder / "shipped")  # with a schedule for which diffusers has all samplers
    scheduler = folder / "shipped" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"rescale_betas_zero_snr": False}))
    return folder


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 255, (9, 9, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((64, 64), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def mask() -> Image.Image:
    hole = np.zeros((64, 64), np.uint8)
    hole[10:41, 20:53] = 255
    return Image.fromarray(hole)


@lru_cache
def their_pipeline(kind: type, folder: Path) -> tuple[Any, Any]:
    """diffusers' pipeline, and the configuration of its own scheduler."""
    pipe = kind.from_pretrained(folder, torch_dtype=torch.float32, safety_checker=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe, pipe.scheduler.config


def theirs(kind: type, folder: Path, sampler: str, steps: int = 4, **options: Any) -> np.ndarray:
    """diffusers' pictures [B, H, W, 3] in levels of 255."""
    pipe, config = their_pipeline(kind, folder)
    cls, changes = SCHEDULERS[sampler]
    pipe.scheduler = cls.from_config(config, **changes)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    made = pipe(PROMPTS, generator=generators, num_inference_steps=steps, output_type="np", **options)
    return (made.images * 255).round()


our_pipeline = lru_cache(Pipeline.from_pretrained)


def ours(folder: Path, sampler: str, steps: int = 4, **options: Any) -> np.ndarray:
    made = our_pipeline(folder, "cpu")(PROMPTS, seed=SEEDS, sampler=sampler, steps=steps, **options)
    return np.stack([np.asarray(image, np.float32) for image in made.images])


def strays(one: np.ndarray, other: np.ndarray) -> float:
    assert one.shape == other.shape
    assert one.std() > 5, "a picture of one colour tells nothing"
    return np.abs(one - other).max()


@every_guidance
@pytest.mark.parametrize("sampler", samplers())
@pytest.mark.parametrize("model", ["random", "shipped"])
def test_from_words(folder: Path, model: str, sampler: str, guidance: float) -> None:
    found = ours(folder / model, sampler, guidance=guidance)
    expected = theirs(StableDiffusionPipeline, folder / model, sampler, guidance_scale=guidance)
    assert strays(found, expected) <= STRAYS


@every_guidance
@pytest.mark.parametrize("sampler", samplers(of=ZERO_TERMINAL_SNR))
def test_from_words_with_the_model_that_ships_as_it_is(sampler: str, guidance: float) -> None:
    found = ours(shipped_model(), sampler, guidance=guidance)
    expected = theirs(StableDiffusionPipeline, shipped_model(), sampler, guidance_scale=guidance)
    assert strays(found, expected) <= STRAYS


# LMS begins in the middle with weights for slopes that it has not seen (diffusers' `get_lms_coefficient`).
@every_guidance
@every_strength
@pytest.mark.parametrize("sampler", samplers("lms"))
@pytest.mark.parametrize("model", ["random", "shipped"])
def test_over_a_picture(
    folder: Path, picture: Image.Image, model: str, sampler: str, strength: float, guidance: float
) -> None:
    found = ours(folder / model, sampler, guidance=guidance, init_image=picture, strength=strength)
    options = {"image": [picture] * 3, "guidance_scale": guidance, "strength": strength}
    assert strays(found, theirs(StableDiffusionImg2ImgPipeline, folder / model, sampler, **options)) <= STRAYS


def test_over_a_picture_by_the_last_of_many_steps(folder: Path, picture: Image.Image) -> None:
    """DEIS ends otherwise where there are few steps, by how many there were from the start."""
    found = ours(folder / "random", "deis", 16, guidance=7.5, init_image=picture, strength=0.3)
    options = {"image": [picture] * 3, "guidance_scale": 7.5, "strength": 0.3}
    expected = theirs(StableDiffusionImg2ImgPipeline, folder / "random", "deis", 16, **options)
    assert strays(found, expected) <= STRAYS


# DPM2 puts the kept latents under the noise of the step's end where it is only halfway (diffusers' `add_noise`).
@every_guidance
@every_strength
@pytest.mark.parametrize("sampler", samplers("lms", "dpm_2"))
@pytest.mark.parametrize("model", ["random", "inpainting", "shipped"])
def test_into_a_hole(
    folder: Path,
    picture: Image.Image,
    mask: Image.Image,
    model: str,
    sampler: str,
    strength: float,
    guidance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gobelin.inpainting.InitImage.paste", lambda self, index, painted: painted)
    options = {"guidance": guidance, "init_image": picture, "mask": mask, "strength": strength}
    found = ours(folder / model, sampler, **options)
    options = {"image": [picture] * 3, "mask_image": [mask] * 3, "guidance_scale": guidance, "strength": strength}
    options |= {"height": 64, "width": 64}
    expected = theirs(StableDiffusionInpaintPipeline, folder / model, sampler, **options)
    assert strays(found, expected) <= STRAYS
