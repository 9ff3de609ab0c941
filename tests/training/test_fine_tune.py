"""Training from a model: what each method changes, what stays bit for bit, and who else opens what it writes."""

import dataclasses
import io
import json
import os
import re
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionInpaintPipeline, StableDiffusionPipeline
from peft import PeftModel
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from tests.oracles import differences
from torch import Tensor

from gobelin.adapters.adapter_settings import AdapterConfig
from gobelin.cli.main import main
from gobelin.errors import TrainingError, UsageError
from gobelin.pipeline import Pipeline
from gobelin.training import FineTuneConfig, find_preset, trainer
from gobelin.training.config import DataConfig
from gobelin.training.fine_tune_config import NewWordConfig, PriorConfig
from gobelin.training.fine_tune_stages import draw_mask
from gobelin.training.recipes.fine_tune import FineTune
from gobelin.training.train_model import train

QUIET = Console(quiet=True)
PARTS = ("unet", "vae", "text_encoder")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty images of three aspects, one of them with two captions."""
    folder = tmp_path_factory.mktemp("images")
    lines = []
    for number in range(20):
        rng = np.random.default_rng(number)
        blocks = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        size = ((64, 64), (96, 48), (96, 48), (48, 96))[number % 4]
        Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).save(folder / f"{number:02d}.png")
        texts = [f"a photo of <new> number {number}", "<new>"] if number == 5 else f"a photo of <new> number {number}"
        lines.append(json.dumps({"file_name": f"{number:02d}.png", "text": texts}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def small(oracle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of Stable Diffusion 1.x's shape with random weights, that recommends two steps."""
    folder = tmp_path_factory.mktemp("small") / "base"
    Pipeline.from_pretrained(oracle_folder).save_pretrained(folder)
    (folder / "gobelin.json").write_text('{"sampler": "ddim", "steps": 2, "guidance": 2.0}')
    return folder


@pytest.fixture(scope="module")
def configure(images: Path, small: Path) -> Callable[..., FineTuneConfig]:
    """Makes a configuration of a preset with a few steps; other fields by their names."""

    def make(preset: str, steps: int = 2, **changes: Any) -> FineTuneConfig:
        config: FineTuneConfig = find_preset(preset)  # type: ignore[assignment]
        data, section = changes.pop("data", {}), "vae" if config.method == "vae" else "unet"
        trained = getattr(config, section)
        short = {"steps": steps, "batch_size": 2, "warmup_steps": 1, "precision": "float32", "ema": 0.5}
        trained = dataclasses.replace(
            trained, **changes.pop(section, {}), optim=dataclasses.replace(trained.optim, **short)
        )
        few = {"save_every": 100, "sample_every": 100, "samples": 0, "device": "cpu", "model": str(small)}
        made = DataConfig(**{"path": str(images), "validation": 0, **data})
        return dataclasses.replace(config, data=made, **{section: trained}, **{**few, **changes})

    return make


RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("finetune", {}),
    "dreambooth": ("dreambooth", {"prior": PriorConfig(prompts=("a photo",), count=2)}),
    "kohya": ("lora", {"adapter": AdapterConfig(rank=2, targets="all"), "unet": {"train_text_encoder": True}}),
    "diffusers": (
        "lora",
        {
            "adapter": AdapterConfig(rank=2, alpha=1.0, targets="transformer"),
            "layout": "diffusers",
            "unet": {"train_text_encoder": True},
        },
    ),
    "peft": ("lora", {"adapter": AdapterConfig(rank=2, alpha=4.0), "layout": "peft"}),
    "loha": ("lora", {"adapter": AdapterConfig(kind="loha", rank=2)}),
    "lokr": ("lora", {"adapter": AdapterConfig(kind="lokr", rank=2, factor=4)}),
    "word": ("textual-inversion", {}),
    "three vectors": ("textual-inversion", {"new_word": NewWordConfig(begin="red circle", vectors=3)}),
    "inpainting": ("inpainting", {}),
    "vae": ("vae", {}),
}


def slowly(*names: str) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def run(configure: Callable[..., FineTuneConfig], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Trains by the name of a run, once."""
    folder = tmp_path_factory.mktemp("runs")

    def trained(name: str) -> Path:
        out = folder / name.replace(" ", "-")
        if not out.exists():
            preset, changes = RUNS[name]
            train(configure(preset, **changes), out, console=QUIET)
        return out

    return trained


def weights(folder: Path, part: str) -> dict[str, Tensor]:
    return {name: one for file in (folder / part).glob("*.safetensors") for name, one in load_file(file).items()}


def changed(before: Path, after: Path, part: str) -> set[str]:
    """The names of a network's tensors that are not bit for bit the same."""
    old, new = weights(before, part), weights(after, part)
    assert old.keys() == new.keys()
    return {name for name in old if not torch.equal(old[name], new[name])}


def files(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of what is trained, by the file: not those of its history."""
    return {
        file.relative_to(folder).as_posix(): load_file(file)
        for file in sorted(folder.rglob("*.safetensors"))
        if "training" not in file.relative_to(folder).parts
    }


def reference(folder: Path) -> StableDiffusionPipeline:
    theirs = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config)
    return theirs


def painted_alike(ours: Pipeline, theirs: StableDiffusionPipeline, prompt: str) -> np.ndarray:
    """Paint one image with both, which must be the same; returns it."""
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        expected = theirs(prompt, latents=latents, num_inference_steps=2, guidance_scale=2.0, height=64, width=64)
    found = ours(prompt, latents=latents, steps=2, guidance=2.0, sampler="ddim", height=64, width=64).images[0]
    image = np.asarray(found, int)
    assert np.abs(image - np.asarray(expected.images[0], int)).max() <= 2
    return image


@pytest.mark.parametrize(("name", "parts"), [("full", ("unet",)), ("dreambooth", ("unet", "text_encoder"))])
def test_a_whole_model_is_written_and_the_frozen_rest_of_it_stays(run, small, name, parts):
    out = run(name)
    for part in PARTS:
        assert bool(changed(small, out, part)) == (part in parts), part
    # but for the queries and keys of attention over a single place, which have no gradient
    assert len(changed(small, out, "unet")) > 0.98 * len(weights(small, "unet"))
    theirs = reference(out)
    image = painted_alike(Pipeline.from_pretrained(out), theirs, "a photo")
    assert not np.array_equal(image, painted_alike(Pipeline.from_pretrained(small), reference(small), "a photo"))
    assert json.loads((out / "gobelin.json").read_text())["steps"] == 2, "what the model recommends stays"


def test_of_a_vae_the_decoder_alone_is_trained(run, small):
    out = run("vae")
    names = changed(small, out, "vae")
    assert {name.split(".")[0] for name in names} == {"decoder", "post_quant_conv"}
    assert not changed(small, out, "unet") | changed(small, out, "text_encoder")
    painted_alike(Pipeline.from_pretrained(out), reference(out), "a photo")


def test_a_unet_that_inpaints_begins_as_the_one_without_a_mask(run, small, images, tmp_path):
    out = run("inpainting")
    before, after = weights(small, "unet"), weights(out, "unet")
    assert before.pop("conv_in.weight").shape[1] == 4
    assert after.pop("conv_in.weight").shape[1] == 9
    assert not changed(small, out, "vae") | changed(small, out, "text_encoder")
    theirs = StableDiffusionInpaintPipeline.from_pretrained(out, dtype=torch.float32)
    ours = Pipeline.from_pretrained(out)
    assert max(differences(ours, theirs, torch.float64).values()) < 1e-8
    # gone on with, from its own nine channels
    mask = Image.new("L", (64, 64), 255)
    assert ours("a photo", init_image=str(images / "00.png"), mask=mask).images[0].size == (64, 64)


@pytest.mark.parametrize("name", ["kohya", "diffusers", "peft", *slowly("loha", "lokr")])
def test_an_adapter_is_one_file_that_changes_what_the_model_paints(run, small, name):
    out = run(name)
    assert sorted(files(out)) == (
        ["adapter/adapter_model.safetensors"] if name == "peft" else ["adapter.safetensors"]
    ), "and no model beside it"
    ours, before = Pipeline.from_pretrained(small), Pipeline.from_pretrained(small)("a photo").images[0]
    ours.load_lora(out / ("adapter" if name == "peft" else "adapter.safetensors"))
    assert np.any(np.asarray(ours("a photo").images[0]) != np.asarray(before))
    if name in ("kohya", "diffusers"):
        theirs = reference(small)
        theirs.load_lora_weights(out, weight_name="adapter.safetensors")
        painted_alike(ours, theirs, "a photo")
    if name == "peft":
        theirs = reference(small)
        theirs.unet = PeftModel.from_pretrained(theirs.unet, out / "adapter").merge_and_unload()
        painted_alike(ours, theirs, "a photo")


@pytest.mark.parametrize("name", ["word", *slowly("three vectors")])
def test_a_word_is_one_file_that_diffusers_reads_too(run, small, name):
    out = run(name)
    (file,) = files(out)
    (vectors,) = load_file(out / file).values()
    assert vectors.shape == (3 if name == "three vectors" else 1, 64)
    ours, theirs = Pipeline.from_pretrained(small), reference(small)
    before = Pipeline.from_pretrained(small)
    assert ours.load_textual_inversion(out / file) == "<new>"
    theirs.load_textual_inversion(str(out / file))
    painted_alike(ours, theirs, "a photo of <new>")
    ids = before.tokenizer(["a photo"])
    assert torch.equal(ours.text_encoder(ids), before.text_encoder(ids)), "other words mean what they did"


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


@pytest.mark.parametrize("name", ["kohya", "inpainting", *slowly("dreambooth", "three vectors", "vae")])
def test_an_interrupted_run_ends_with_the_same_bits(run, configure, tmp_path, name):
    preset, changes = RUNS[name]
    config = configure(preset, **changes)
    with stopped_at(0), pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", console=QUIET)
    train(config, tmp_path / "run", resume=True, console=QUIET)
    expected, found = files(run(name)), files(tmp_path / "run")
    assert expected.keys() == found.keys()
    for file, tensors in expected.items():
        assert tensors.keys() == found[file].keys()
        assert [key for key in tensors if not torch.equal(tensors[key], found[file][key])] == [], file


def test_a_prior_that_is_there_trains_as_the_same_one_painted(configure, tmp_path) -> None:
    """It is read with its captions, and known again when the run goes on."""
    changes: dict[str, Any] = {"adapter": AdapterConfig(rank=2)}
    painted, read = tmp_path / "painted", tmp_path / "read"
    train(configure("lora", prior=PriorConfig(prompts=("one", "two"), count=3), **changes), painted, console=QUIET)
    prior = shutil.copytree(painted / "training" / "prior", tmp_path / "prior")
    config = configure("lora", prior=PriorConfig(path=str(prior)), **changes)
    with stopped_at(1), pytest.raises(KeyboardInterrupt):
        train(config, read, console=QUIET)
    moved = dataclasses.replace(config, prior=PriorConfig(path=str(shutil.move(prior, tmp_path / "moved"))))
    (tmp_path / "moved" / "00002.png").rename(tmp_path / "00002.png")
    with pytest.raises(TrainingError, match=r"other data: 20 captioned images .* and as a prior 3 captioned images"):
        train(moved, read, resume=True, console=QUIET)
    (tmp_path / "00002.png").rename(tmp_path / "moved" / "00002.png")
    train(moved, read, resume=True, console=QUIET)
    expected, found = (load_file(out / "adapter.safetensors") for out in (painted, read))
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert "the images of moved" in (read / "README.md").read_text()


def test_captions_are_sampled_as_the_text_that_they_are(configure, tmp_path) -> None:
    """Other tools' prompts mean something else by these; a prompt that is asked for is refused before the run."""
    captions = ("a [cat|dog] AND (a bird", "<lora:style:1> embedding:nice [a:b:0.5]", "nice )) [[", "x" * 101_000)
    for number in range(8):
        Image.new("RGB", (64, 64), (30 * number, 0, 0)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(captions[number % 4])
    changes: dict[str, Any] = {"adapter": AdapterConfig(rank=2), "data": {"path": str(tmp_path)}, "steps": 1}
    out = train(configure("lora", samples=4, **changes), tmp_path / "run", console=QUIET)
    assert len(list((out / "training" / "samples").glob("unet-*.png"))) == 2
    with pytest.raises(UsageError, match=r"sample_prompts: the prompt has '<lora:style:1>'"):
        configure("lora", sample_prompts=("a cat", "<lora:style:1>"), **changes)


@pytest.mark.parametrize(
    "name", ["full", "kohya", "peft", "word", *slowly("dreambooth", "diffusers", "loha", "lokr", "inpainting", "vae")]
)
def test_the_card_says_commands_that_run(run, images, tmp_path, monkeypatch, name):
    out = run(name)
    text = (out / "README.md").read_text().replace("path/to/this/folder", str(out)).replace("…", "a photo")
    Image.open(images / "00.png").resize((64, 64)).save(tmp_path / "image.png")
    Image.new("L", (64, 64), 255).save(tmp_path / "mask.png")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(code, {})
    (command,) = re.findall(r"```sh\ngobelin (.*?)\n```", text, re.DOTALL)
    main([*shlex.split(command), "--steps", "2", "--out", "painted"])
    assert list((tmp_path / "painted").iterdir())
    assert list((tmp_path / "out").iterdir())
    assert "20 captioned images" in text
    assert "2 steps, 2 images each" in text


def test_a_single_file_in_half_precision_is_trained_in_float32(configure, clip_model, tmp_path):
    """It has another text width and CLIP's vocabulary, and the adapter fits the file that it came from."""
    Pipeline(clip_model()).save_single_file(tmp_path / "base.safetensors", dtype="float16")
    config = configure("lora", model=str(tmp_path / "base.safetensors"), adapter=AdapterConfig(rank=2))
    out = train(config, tmp_path / "run", console=QUIET)
    assert {one.dtype for one in load_file(out / "adapter.safetensors").values()} == {torch.float32}
    pipe = Pipeline.from_pretrained(tmp_path / "base.safetensors")
    before = np.asarray(pipe("a photo", steps=2).images[0])
    pipe.load_lora(out / "adapter.safetensors")
    assert np.any(np.asarray(pipe("a photo", steps=2).images[0]) != before)


@pytest.mark.slow
def test_a_model_of_velocity_learns_the_velocity(configure, small, tmp_path):
    """The loss of the first step is that of the model's own prediction type; what is written says it."""
    velocity = shutil.copytree(small, tmp_path / "velocity")
    scheduler = velocity / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": "v_prediction"}))
    out = train(configure("finetune", steps=1, model=str(velocity)), tmp_path / "run", console=QUIET)
    other = train(configure("finetune", steps=1), tmp_path / "other", console=QUIET)
    losses = [
        json.loads((one / "training" / "metrics.jsonl").read_text().splitlines()[0])["loss"] for one in (out, other)
    ]
    assert losses[0] != losses[1]
    assert json.loads((out / "scheduler" / "scheduler_config.json").read_text())["prediction_type"] == "v_prediction"


def test_the_shipped_model_learns_a_lora(configure, tmp_path):
    config = configure("lora", steps=1, model=None, adapter=AdapterConfig(rank=2))
    out = train(config, tmp_path / "run", console=QUIET)
    pipe = Pipeline.from_pretrained()
    before = np.asarray(pipe("a red circle", steps=2).images[0])
    pipe.load_lora(out / "adapter.safetensors", weight=100.0)
    assert np.any(np.asarray(pipe("a red circle", steps=2).images[0]) != before)
    assert "from_pretrained()" in (out / "README.md").read_text()


@pytest.mark.parametrize("preset", ["inpainting", *slowly("finetune")])
def test_images_of_many_aspects_and_mirrored_ones_are_trained_on(configure, tmp_path, preset):
    """At a size that is not the model's own, which the written model then paints at."""
    data = {"buckets": True, "flip": True, "size": 128}
    config = configure(preset, steps=2, data=data, samples=2, sample_prompts=("a photo",), sample_every=2)
    out = train(config, tmp_path / "run", console=QUIET)
    assert json.loads((out / "unet" / "config.json").read_text())["sample_size"] == 16
    shown = json.loads((out / "training" / "nearest.json").read_text())
    assert Image.open(out / "training" / shown[0]["sample"]).size != (128, 128), "as most of the images"
    if preset == "finetune":
        assert Pipeline.from_pretrained(out)("a photo").images[0].size == (128, 128)


def test_a_mask_is_laid_on_the_mirrored_image_where_the_latents_are_mirrored(configure, images, tmp_path):
    """What an inpainting U-Net sees outside the mask is the image whose latents it learns to predict."""
    config = configure("inpainting", data={"flip": True})
    recipe = FineTune(config, tmp_path / "run", False, QUIET)
    stages: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gobelin.training.recipes.fine_tune.fit", lambda stage, run: stages.append(stage) or stage.module)
        patch.setattr(FineTune, "_write", lambda self, pipeline, step: None)
        recipe.unet()
    (stage,) = stages
    mirrored = 0
    for step in range(8):
        batch = stage.batch(step, slice(None))
        *_, flips = stage.choices(stage.order.randoms(step, slice(None)))
        rows = stage.order.indices(step)
        plain = stage.dataset.images(rows.tolist())
        for sample, flipped in enumerate(flips.tolist()):
            image = plain[sample].flip(-1) if flipped else plain[sample]
            seen = image[None] * (stage_mask(stage, step, sample, plain) < 0.5)
            expected = recipe.model.vae.encode(seen).mean * recipe.model.vae.config.scaling_factor
            assert torch.allclose(batch.masked[sample, 1:], expected[0], atol=1e-4)
            mirrored += flipped
    assert 0 < mirrored < 16


def stage_mask(stage: Any, step: int, sample: int, images: Tensor) -> Tensor:
    """The mask of one sample of a batch, drawn anew."""
    random = stage.order.randoms(step, slice(None))[sample]
    return draw_mask(np.random.default_rng(random.integers(2**63, size=2)), *images.shape[-2:])


def test_a_nine_channel_model_is_trained_with_masks_by_every_method(configure, make_oracle, tmp_path):
    make_oracle(9).save_pretrained(tmp_path / "masked")
    (tmp_path / "masked" / "gobelin.json").write_text('{"steps": 2}')
    said = Console(file=io.StringIO(), width=200)
    for preset in ("finetune", "lora"):
        config = configure(preset, steps=1, model=str(tmp_path / "masked"), samples=1, data={"validation": 4})
        out = train(config, tmp_path / preset, console=said)
        assert (out / "training" / "samples" / "unet-000001.png").is_file()
    assert "no images are held out to measure the loss by caption: this U-Net sees a mask" in said.file.getvalue()
    assert "StableDiffusionInpaintPipeline" in (tmp_path / "finetune" / "README.md").read_text()


def test_a_new_word_learns_at_its_own_rate(configure, tmp_path):
    """The fraction of the rate is that of a text encoder that is trained, not that of a word."""
    word = weights_of_word(configure, tmp_path, 0.3)
    with pytest.raises(UsageError, match=r"unet\.text_lr_ratio is 0\.7 and would have no effect"):
        train(configure("textual-inversion", unet={"text_lr_ratio": 0.7}), tmp_path / "other", console=QUIET)
    assert word.abs().max() > 0


def weights_of_word(configure: Callable[..., FineTuneConfig], folder: Path, ratio: float) -> Tensor:
    """How far one step of AdamW, without weight decay, moves a word: by the learning rate."""
    config = configure("textual-inversion", steps=1, unet={"text_lr_ratio": ratio})
    config = dataclasses.replace(
        config,
        unet=dataclasses.replace(config.unet, optim=dataclasses.replace(config.unet.optim, ema=0.0, warmup_steps=0)),
    )
    out = train(config, folder / "word", console=QUIET)
    (vectors,) = load_file(out / "new.safetensors").values()
    assert config.model is not None
    table = Pipeline.from_pretrained(config.model).text_encoder.text_model.embeddings.token_embedding.weight
    moved = vectors - table.detach().mean(dim=0)
    assert moved.abs().median() == pytest.approx(config.unet.optim.learning_rate, rel=0.02)
    return moved


@pytest.mark.parametrize(("colour", "is_said"), [((28, 52, 110), True), ((190, 178, 156), False)])
def test_images_that_the_vae_does_not_reproduce_are_said(colour, is_said, tmp_path) -> None:
    """The shipped model's VAE knows light paper alone: dark blue comes back grey-green, and so would be painted."""
    data = tmp_path / "data"
    data.mkdir()
    for number in range(2):
        Image.new("RGB", (64, 64), colour).save(data / f"{number}.png")
        (data / f"{number}.txt").write_text(f"paper {number}")
    config = find_preset("lora")
    optim = dataclasses.replace(config.unet.optim, steps=1, batch_size=2)
    said = io.StringIO()
    train(
        dataclasses.replace(
            config,
            device="cpu",
            samples=0,
            data=dataclasses.replace(config.data, path=str(data)),
            unet=dataclasses.replace(config.unet, optim=optim),
        ),
        tmp_path / "run",
        console=Console(file=said, width=200),
    )
    assert ("train it on them first (--preset vae)" in said.getvalue()) == is_said
