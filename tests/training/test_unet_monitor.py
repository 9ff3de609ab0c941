"""What a U-Net's training shows: held-out pairs, samples beside true images, the nearest training image."""

import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from gobelin.data.encoded import LatentCache
from gobelin.training.config import DataConfig
from gobelin.training.recipes.diffusion import Networks, make_unet_stage
from gobelin.training.recipes.fine_tune import FineTune
from gobelin.training.run_folder import Run
from gobelin.training.train_model import train

QUIET = Console(quiet=True)


def folder_of(folder: Path, count: int, caption: str = "a photo number {}") -> Path:
    folder.mkdir()
    for number in range(count):
        blocks = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(blocks).resize(((64, 64), (40, 64))[number % 4 == 3], Image.Resampling.NEAREST)
        image.save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(caption.format(number))
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("data") / "images", 24)


@pytest.fixture(scope="module")
def small(oracle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model, recommending two steps."""
    folder = shutil.copytree(oracle_folder, tmp_path_factory.mktemp("model") / "small")
    (folder / "gobelin.json").write_text('{"steps": 2}')
    return folder


@pytest.fixture
def configure(small: Path, images: Path) -> Any:
    """Makes a configuration of a LoRA of two steps on the small model."""
    from gobelin.training import find_preset

    def make(data: dict[str, Any] | None = None, **changes: Any) -> Any:
        config = find_preset("lora")
        optim = dataclasses.replace(config.unet.optim, steps=2, batch_size=2, precision="float32")
        few: dict[str, Any] = {"samples": 2, "device": "cpu", "model": str(small)}
        return dataclasses.replace(
            config,
            unet=dataclasses.replace(config.unet, optim=optim),
            data=DataConfig(**{"path": str(images), "validation": 2, **(data or {})}),
            **{**few, **changes},
        )

    return make


@pytest.fixture(autouse=True)
def few_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hold out two images, which in a real run would tell nothing."""
    monkeypatch.setattr("gobelin.data.subset.FEWEST_HELD_OUT", 2)


def records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_run_measures_and_draws_from_its_first_step_on(configure, tmp_path) -> None:
    training = train(configure(), tmp_path / "run", console=QUIET) / "training"
    for step in (0, 2):
        for sheet in ("unet", "words"):
            assert Image.open(training / "samples" / f"{sheet}-{step:06d}.png").width > 200
    measured = records(training / "validation.jsonl")
    assert [(one["step"], one["split"]) for one in measured] == [
        (step, split) for step in (0, 2) for split in ("held_out", "training")
    ]
    assert {one["step"] for one in records(training / "attention.jsonl")} == {0, 2}
    nearest = json.loads((training / "nearest.json").read_text())
    assert len(nearest) == 2
    assert all(0 < one["distance"] <= one["median_distance"] for one in nearest)
    assert all((training / one[name]).is_file() for one in nearest for name in ("sample", "nearest"))
    assert (training / "report.html").is_file()


def test_without_samples_there_is_a_measurement_and_no_sheet(configure, tmp_path) -> None:
    training = train(configure(samples=0), tmp_path / "run", console=QUIET) / "training"
    assert records(training / "validation.jsonl")
    assert not (training / "samples").exists()
    assert not (training / "nearest.json").exists()


def test_prompts_that_were_asked_for_are_sampled(configure, tmp_path, monkeypatch) -> None:
    from gobelin.pipeline import Pipeline

    painted = []
    call = Pipeline.__call__

    def noted(self: Pipeline, prompt: Any, *arguments: Any, **options: Any) -> Any:
        painted.append((prompt, options["height"], options["width"]))
        return call(self, prompt, *arguments, **options)

    monkeypatch.setattr(Pipeline, "__call__", noted)
    config = configure({"validation": 0, "size": 128}, sample_prompts=("a cat", "two dogs"))
    train(config, tmp_path / "run", console=QUIET)
    assert painted == [(["a cat", "two dogs"], 128, 128)] * 2, "as large as what is trained on"


def test_held_out_images_are_never_trained_on(configure, tmp_path, monkeypatch) -> None:
    trained: set[bytes] = set()
    read = LatentCache.read

    def noted(self: LatentCache, indices: Any, *more: Any) -> Any:
        if more:  # as a batch reads
            trained.update(self._dataset.dataset.hashes[int(index)] for index in indices)
        return read(self, indices, *more)

    monkeypatch.setattr(LatentCache, "read", noted)
    config = configure({"validation": 2}, samples=0)
    optim = dataclasses.replace(config.unet.optim, steps=11)
    config = dataclasses.replace(config, unet=dataclasses.replace(config.unet, optim=optim))
    recipe = FineTune(config, tmp_path / "run", False, QUIET)
    recipe.run(None)
    training, held_out = recipe.split
    assert held_out is not None
    assert (len(training), len(held_out)) == (22, 2)
    assert trained == set(training.hashes), "each of the others once an epoch"
    assert not trained & set(held_out.hashes)


@pytest.mark.parametrize(
    ("count", "caption", "sentence"),
    [
        (20, "a photo", "the loss by caption is not measured: of 2 captions no two differ"),
        (6, "a photo {}", "the loss by caption is not measured: 6 images are too few to hold any out"),
    ],
)
def test_where_the_loss_by_caption_means_nothing_it_is_said(configure, tmp_path, count, caption, sentence) -> None:
    said = Console(file=io.StringIO(), width=200)
    data = {"path": str(folder_of(tmp_path / "images", count, caption)), "validation": 64}
    out = train(configure(data, samples=0), tmp_path / "run", console=said)
    assert sentence in said.file.getvalue()
    assert not (out / "training" / "validation.jsonl").exists()


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_copy_of_a_training_image_is_found(configure, tmp_path, mirrored) -> None:
    recipe = FineTune(configure({"flip": True, "validation": 0}), tmp_path / "run", False, QUIET)
    model = recipe.model
    networks = Networks(
        unet=model.unet,
        vae=model.vae,
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,
        schedule=model.schedule,
    )
    monitor: Any = make_unet_stage(recipe, networks, recipe.config.unet, lambda module, step: None)._show  # type: ignore[arg-type,return-value]
    dataset, cache = monitor.training
    means, _ = cache.read(torch.tensor([7, 3]), torch.tensor([mirrored, mirrored]))
    latents = torch.cat([means * monitor.scaling_factor, torch.randn(1, *means.shape[1:])])
    samples = [Image.new("RGB", (64, 64))] * 3
    run: Any = Run(folder=tmp_path, seed=0, device=torch.device("cpu"), save_every=9, sample_every=9, console=QUIET)
    monitor._find_nearest(samples, latents, run)
    found = json.loads((tmp_path / "nearest.json").read_text())
    assert [one["distance"] < 1e-3 * one["median_distance"] for one in found] == [True, True, False]
    for one, row in zip(found, (7, 3), strict=False):
        copy = np.asarray(Image.open(tmp_path / one["nearest"]), float) / 127.5 - 1
        assert np.abs(copy - dataset.images([row])[0].permute(1, 2, 0).numpy()).max() < 0.01
