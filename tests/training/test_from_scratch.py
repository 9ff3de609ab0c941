"""A whole run: what it writes, that it resumes exactly, and what it refuses."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

import gobelin
from gobelin.checkpoint.shipped import SHIPPED_MODELS
from gobelin.data.batches import Order
from gobelin.errors import DataError, TrainingError, UsageError
from gobelin.pipeline import Pipeline, shipped_model
from gobelin.training import find_preset, trainer
from gobelin.training.config import DataConfig
from gobelin.training.losses import UNetLoss
from gobelin.training.recipes.claim import differences
from gobelin.training.recipes.from_scratch import STAGES, FromScratch
from gobelin.training.run_folder import Run
from gobelin.training.train_model import train
from gobelin.training.trainer import fit
from gobelin.vae import VAE, VAEConfig

QUIET = Console(quiet=True)


def weights(folder):
    return {
        f"{part}/{name}": tensor
        for part in ("text_encoder", "image_encoder", "vae", "unet")
        for file in (folder / part).glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def test_the_folder_holds_a_model_its_card_and_its_history(trained):
    for name in (
        "model_index.json",
        "README.md",
        "gobelin.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/vocab.json",
        "image_encoder/model.safetensors",
        "scheduler/scheduler_config.json",
        "training/samples/unet-000004.png",
        "training/samples/vae-000004.png",
        "training/samples/words-000004.png",
        "training/report.html",
    ):
        assert (trained / name).is_file(), name
    lines = [json.loads(line) for line in (trained / "training" / "metrics.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {"text_encoder", "vae", "unet"}
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert not list((trained / "training" / "checkpoints").glob("*/*")), "checkpoints outlive their stage"
    assert "32 scenes" in (trained / "README.md").read_text()


@pytest.mark.parametrize("which", ["trained for a moment", *SHIPPED_MODELS])
def test_it_opens_in_diffusers_and_paints_the_same(trained, which):
    folder = shipped_model(which) if which in SHIPPED_MODELS else trained
    ours = Pipeline.from_pretrained(folder)
    theirs = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    assert isinstance(theirs.scheduler, DDIMScheduler)
    prompts = ["a red circle", "a blue square above the green ring"]
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    options = {"prompt": prompts, "latents": latents, "negative_prompt": ["a cross"] * 2}
    with torch.no_grad():
        expected = theirs(**options, num_inference_steps=20, guidance_scale=3.0, guidance_rescale=0.3).images
    options["negative_prompt"] = "a cross"
    painted = ours(**options, steps=20, guidance=3.0, guidance_rescale=0.3, sampler="ddim").images
    for one, other in zip(painted, expected, strict=True):
        difference = np.abs(np.asarray(one, int) - np.asarray(other, int))
        assert difference.max() <= 2
    assert np.asarray(painted[0]).std() > 1, "an empty picture proves nothing"


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(
    "stage", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("text_encoder", "vae")), "unet"]
)
def test_a_killed_run_resumes_to_the_same_weights(trained, micro, tmp_path, monkeypatch, stage):
    interrupted = []

    original = Order.indices

    def dying(self, step):
        if self.stage == stage and step == 3 and not interrupted:
            interrupted.append(step)
            raise Interrupted
        return original(self, step)

    monkeypatch.setattr(Order, "indices", dying)
    out = tmp_path / "model"
    with pytest.raises(Interrupted):
        train(micro(), out, console=QUIET)
    assert (out / "model_index.json").exists() == (stage == "unet"), "usable from its first pictures on"
    if stage == "unet":
        assert Pipeline.from_pretrained(out)("a red circle").images
        assert "| U-Net | 2 of 4: it is still training |" in (out / "README.md").read_text()
    assert next((out / "training" / "checkpoints" / stage).iterdir()).name == "step-00000002"
    train(micro(), out, resume=True, console=QUIET)
    assert "| U-Net | 4 |" in (out / "README.md").read_text()
    expected, found = weights(trained), weights(out)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def pictures(folder: Path, count: int) -> Path:
    """A folder of captioned images of one colour each."""
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (20, 20), (number, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("dark")
    return folder


@contextmanager
def stopped_at(step: int) -> Iterator[None]:
    """Ask the run to stop after a step, as Ctrl-C does."""
    with pytest.MonkeyPatch.context() as patch:
        original = trainer.learning_rate

        def counted(optim, at):
            if at == step:
                os.kill(os.getpid(), signal.SIGINT)
            return original(optim, at)

        patch.setattr(trainer, "learning_rate", counted)
        yield


def test_a_folder_in_use_is_not_overwritten(trained, micro, tmp_path):
    with pytest.raises(TrainingError, match="holds a training run: add --resume"):
        train(micro(), trained, console=QUIET)
    with pytest.raises(TrainingError, match=r"text\.optim\.steps was 4 and is 5: .* it is done"):
        train(micro(steps=5), trained, resume=True, console=QUIET)
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(TrainingError, match="is not empty and holds no training run"):
        train(micro(), tmp_path, console=QUIET)
    with pytest.raises(TrainingError, match="holds no training run to resume"):
        train(micro(), tmp_path / "new", resume=True, console=QUIET)
    assert not (tmp_path / "new").exists(), "a refused run leaves nothing behind"


def test_a_run_does_not_go_on_with_other_data(micro, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for number in range(3):
        Image.new("RGB", (20, 20), (number, 0, 0)).save(data / f"{number}.png")
        (data / f"{number}.txt").write_text("dark")
    config = micro()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(data), size=32))
    train(config, tmp_path / "model", stage="tokenizer", console=QUIET)
    (data / "2.png").unlink()
    with pytest.raises(TrainingError, match=r"began with other data: 3 captioned images.*now it is 2 captioned images"):
        train(config, tmp_path / "model", resume=True, console=QUIET)


def test_a_stage_needs_the_ones_before_it(micro, tmp_path):
    with pytest.raises(TrainingError, match="has no tokenizer yet"):
        train(micro(), tmp_path / "model", stage="unet", console=QUIET)


def test_nothing_is_written_where_the_data_is_bad(micro, tmp_path):
    config = micro()
    bad = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(tmp_path / "nowhere")))
    with pytest.raises(DataError, match="no folder at"):
        train(bad, tmp_path / "model", console=QUIET)
    assert not (tmp_path / "model").exists()


def test_a_folder_of_pictures_trains_all_stages(micro, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        noise = rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(noise).save(data / f"{number}.png")
        (data / f"{number}.txt").write_text(f"noise number {number}")
    config = micro()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(data), size=32))
    out = train(config, tmp_path / "model", console=QUIET)
    assert Pipeline.from_pretrained(out)("noise number 3").images[0].size == (32, 32)


def test_images_of_several_aspects_train_all_stages_in_buckets(micro, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for number in range(12):
        noise = np.random.default_rng(number).integers(0, 255, (32, (32, 64, 20)[number % 3], 3), dtype=np.uint8)
        Image.fromarray(noise).save(data / f"{number}.png")
        (data / f"{number}.txt").write_text(f"noise number {number}")
    config = micro(steps=2, data=DataConfig(path=str(data), size=64, buckets=True))
    out = train(config, tmp_path / "model", console=QUIET)
    assert all(tensor.isfinite().all() for tensor in weights(out).values())


def test_a_loss_that_is_not_a_number_stops_before_the_step(tmp_path):
    class NoNumber(torch.nn.Linear):
        def forward(self, batch):
            return {"loss": self.weight.sum() * float("nan")}

    class Nothing:
        def to(self, device):
            return self

    class Broken:
        lr_ratios: ClassVar = {}
        name, is_divisible = "broken", True
        optim = dataclasses.replace(find_preset("nano").vae.optim, steps=3, batch_size=2)
        module = NoNumber(1, 1)

        def batch(self, step, rows):
            return Nothing()

        def describe(self, step):
            return "images 3, 1…"

        def evaluate(self, module, step, run):
            return None

    run = Run(folder=tmp_path, seed=0, device=torch.device("cpu"), save_every=1, sample_every=9, console=QUIET)
    before = Broken.module.weight.clone()
    with pytest.raises(TrainingError, match=r"stage broken, step 0, images 3, 1…: the loss is nan"):
        fit(Broken(), run)
    assert torch.equal(Broken.module.weight, before)


def test_a_run_begins_at_half_size(micro, tmp_path, monkeypatch):
    sizes, forward = [], UNetLoss.forward

    def spy(self, batch):
        sizes.append(tuple(batch.latents.shape[2:]))
        return forward(self, batch)

    monkeypatch.setattr(UNetLoss, "forward", spy)
    config = micro()
    config = dataclasses.replace(config, unet=dataclasses.replace(config.unet, half_size_steps=3), sample_every=100)
    folder = train(config, tmp_path / "run", console=QUIET)
    pipe = Pipeline.from_pretrained(folder)
    side, steps = pipe.unet.config.sample_size, config.unet.optim.steps
    assert sizes == [(side // 2, side // 2)] * 3 + [(side, side)] * (steps - 3)
    assert pipe("a red circle", steps=1).images[0].size == (64, 64)
    assert "Its first 3 steps were on images of half the size." in (folder / "README.md").read_text()


def test_half_size_latents_are_of_the_means_of_four_pixels(micro, tmp_path):
    recipe = FromScratch(micro(), tmp_path / "run", False, QUIET)
    vae = VAE(VAEConfig.nano()).eval()
    found, _ = recipe.latents(recipe.dataset, vae, "float32", is_half_size=True).read(torch.arange(4))
    images = recipe.dataset.images(range(4)).unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean(dim=(3, 5))
    with torch.no_grad():
        torch.testing.assert_close(found, vae.encode(images).mean, atol=1e-2, rtol=1e-2)  # they are kept in 16 bits
    full, _ = recipe.latents(recipe.dataset, vae, "float32").read(torch.arange(4))
    assert full.shape[2:] == (2 * found.shape[2], 2 * found.shape[3])


def test_all_steps_at_half_size_are_refused(micro):
    config = micro().unet
    with pytest.raises(UsageError, match=f"half_size_steps is {config.optim.steps}, of {config.optim.steps} steps"):
        dataclasses.replace(config, half_size_steps=config.optim.steps)


def test_differences_of_configurations_are_named():
    assert list(differences({"a": {"b": 1}, "c": 3}, {"a": {"b": 2}, "d": 4})) == [
        ("a.b", 1, 2),
        ("c", 3, None),
        ("d", None, 4),
    ]
    assert list(differences({"a": 1}, {"a": 1})) == []


def test_the_stages_are_named_in_order():
    assert STAGES == ("tokenizer", "text_encoder", "vae", "unet")


def test_it_is_a_call_of_the_library_and_silent_outside_a_terminal(micro, tmp_path, capfd):
    small = DataConfig(count=16, validation=0)
    folder = gobelin.train(micro(steps=1, precision="bfloat16", data=small, sample_every=9), str(tmp_path / "mine"))
    assert folder == tmp_path / "mine"
    assert capfd.readouterr() == ("", "")
    assert gobelin.Pipeline.from_pretrained(folder)("a red circle").images


def test_presets_are_found_from_the_package_and_anything_else_is_no_configuration(tmp_path):
    script = """
import gobelin
assert gobelin.training.find_preset("nano").unet.optim.steps == 2400
assert isinstance(gobelin.training.find_preset("tiny"), gobelin.TrainConfig)
gobelin.train("nano", "mine")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert "UsageError: config is 'nano': give a TrainConfig" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_an_unknown_stage_and_a_file_in_place_of_a_folder_are_refused(micro, tmp_path):
    with pytest.raises(UsageError, match="unknown stage 'magic': the choices are tokenizer, text_encoder, vae, unet"):
        train(micro(), tmp_path / "model", stage="magic", console=QUIET)
    assert not list(tmp_path.iterdir())
    (tmp_path / "model").write_text("dear")
    with pytest.raises(TrainingError, match="model is a file: choose a folder"):
        train(micro(), tmp_path / "model", console=QUIET)


@pytest.mark.parametrize("count", [1, 3])
def test_one_image_or_a_few_equal_ones_are_trained_on(count, micro, tmp_path):
    """A first test that everyone makes of a trainer."""
    data = tmp_path / "data"
    data.mkdir()
    for number in range(count):
        Image.new("RGB", (20, 20), "navy").save(data / f"{number}.png")
        (data / f"{number}.txt").write_text("dark blue")
    out = train(micro(steps=2, data=DataConfig(path=str(data), size=32)), tmp_path / "model", console=QUIET)
    assert all(tensor.isfinite().all() for tensor in weights(out).values())


def test_what_changes_no_weight_may_change_at_resume(micro, tmp_path):
    data = pictures(tmp_path / "data", 3)
    config = micro(data=DataConfig(path=str(data), size=32))
    train(config, tmp_path / "model", stage="tokenizer", console=QUIET)
    moved = data.rename(tmp_path / "moved")
    other = dataclasses.replace(
        config,
        save_every=7,
        sample_every=9,
        device="auto",
        data=dataclasses.replace(config.data, path=str(moved)),
        recommended=dataclasses.replace(config.recommended, steps=3),
    )
    train(other, tmp_path / "model", resume=True, stage="tokenizer", console=QUIET)
    assert json.loads((tmp_path / "model" / "training" / "config.json").read_text())["save_every"] == 7
    with pytest.raises(TrainingError, match="seed was 0 and is 5"):
        train(dataclasses.replace(other, seed=5), tmp_path / "model", resume=True, console=QUIET)


@pytest.mark.parametrize("what", ["image", "caption"])
def test_other_images_or_captions_of_the_same_number_are_other_data(what, micro, tmp_path):
    data = pictures(tmp_path / "data", 3)
    config = micro(data=DataConfig(path=str(data), size=32))
    train(config, tmp_path / "model", stage="tokenizer", console=QUIET)
    if what == "image":
        Image.new("RGB", (20, 20), "white").save(data / "1.png")
    else:
        (data / "1.txt").write_text("light")
    with pytest.raises(TrainingError, match="with other captions or images"):
        train(config, tmp_path / "model", resume=True, console=QUIET)


def test_a_stage_is_made_longer_while_its_rate_holds(micro, tmp_path):
    """The run that is made longer is the run that was longer from the beginning."""

    def config(steps: int):
        made = micro(steps=2)
        held = dataclasses.replace(made.vae.optim, steps=steps, hold=0.9, batch_size=4)
        return dataclasses.replace(
            made, vae=dataclasses.replace(made.vae, optim=held), data=DataConfig(count=8, validation=0)
        )

    whole = train(config(20), tmp_path / "whole", stage="vae", console=QUIET)
    out = tmp_path / "longer"
    with stopped_at(6), pytest.raises(KeyboardInterrupt):
        train(config(10), out, stage="vae", console=QUIET)
    train(config(20), out, resume=True, stage="vae", console=QUIET)
    for name, tensor in load_file(out / "vae" / "diffusion_pytorch_model.safetensors").items():
        assert torch.equal(tensor, load_file(whole / "vae" / "diffusion_pytorch_model.safetensors")[name])
    with pytest.raises(TrainingError, match=r"vae\.optim\.steps was 20 and is 30: .* it is done"):
        train(config(30), out, resume=True, stage="vae", console=QUIET)


@pytest.mark.parametrize("name", SHIPPED_MODELS)
def test_a_shipped_model_was_trained_with_its_preset(name):
    recorded = (shipped_model(name) / "training.json").read_text()
    recorded = json.loads(recorded.replace('"precision": "auto"', '"precision": "bfloat16"'))
    preset = json.dumps(dataclasses.asdict(find_preset(name)))
    preset = preset.replace('"precision": "auto"', '"precision": "bfloat16"')  # of the processor that it was trained on
    if recorded["data"]["size"] is not None:
        preset = preset.replace('"size": null', '"size": 64')  # as where none is named
    found = list(differences(recorded, json.loads(preset)))
    assert [one for one in found if one[1] is not None] == [], "settings that came later are not in its record"
