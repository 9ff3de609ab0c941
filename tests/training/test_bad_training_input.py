"""Training that cannot be: each said in one sentence, before anything is trained or written."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from tests.conftest import sentence_of

from gobelin.adapters.adapter_settings import AdapterConfig
from gobelin.pipeline import Pipeline
from gobelin.training import TRAINING_PRESETS, find_preset
from gobelin.training.config import DataConfig
from gobelin.training.fine_tune_config import NewWordConfig, PriorConfig
from gobelin.training.presets import refuse_scenes_of_folder, refuse_without_effect
from gobelin.training.train_model import train

QUIET = Console(quiet=True)
FOLDER = DataConfig(path="images")


@pytest.fixture(autouse=True)
def _nothing_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail at once where a stage begins, rather than train a thousand steps of it."""
    for recipe in ("fine_tune", "from_scratch"):
        monkeypatch.setattr(f"gobelin.training.recipes.{recipe}.fit", lambda stage, run: pytest.fail("it trains"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number in range(3):
        Image.new("RGB", (64, 64), (80 * number, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a <dog> of {number}")
    return folder


def changed(config: Any, path: str, value: Any) -> Any:
    """The configuration with the field of a dotted path replaced."""
    name, _, rest = path.partition(".")
    return dataclasses.replace(config, **{name: changed(getattr(config, name), rest, value) if rest else value})


@pytest.mark.parametrize(
    ("preset", "changes", "sentence"),
    [
        ("lora", {"unet.optim.learning_rate": -1.0}, "learning_rate is -1.0: give a number above 0"),
        ("lora", {"unet.optim.betas": (2.0, 3.0)}, "betas is (2.0, 3.0): give two fractions"),
        ("lora", {"unet.optim.steps": 0}, "steps is 0: give a whole number of 1 or more"),
        ("lora", {"adapter.rank": 0}, "rank is 0: give a whole number of 1 or more"),
        ("lora", {"adapter.factor": 4}, "factor is 4, and the adapter a lora: only a lokr has a factor"),
        ("lora", {"method": "dora"}, "method is 'dora': give one of 'full', 'adapter'"),
        ("lora", {"model": 3}, "model is 3: give the name of a model"),
        ("lora", {"sample_prompts": "a dog"}, "sample_prompts is 'a dog': give a list of prompts"),
        ("textual-inversion", {"new_word.word": "two words"}, "word is 'two words': give one word without spaces"),
        ("textual-inversion", {"new_word.vectors": 0}, "vectors is 0: give a whole number of 1 or more"),
        # one with another
        ("vae", {"prior.prompts": ("a dog",)}, "a prior is given: the method vae has none"),
        (
            "inpainting",
            {"prior.prompts": ("a dog",)},
            "a prior is given: the method inpainting has none",
        ),
        (
            "textual-inversion",
            {"prior.prompts": ("a dog",)},
            "a prior is given: the method textual_inversion has none",
        ),
        ("inpainting", {"prior.path": "dogs"}, "a prior is given: the method inpainting has none"),
        (
            "lora",
            {"prior.prompts": ("a dog",), "prior.path": "dogs"},
            "prior.prompts and prior.path are both given: the prior is painted, or read from a folder",
        ),
        ("lora", {"prior.prompts": ("a dog", " ")}, "prior.prompts: one is empty: say what to paint"),
        ("lora", {"sample_prompts": ("",)}, "sample_prompts: one is empty: say what to paint"),
        ("lora", {"prior.path": ""}, "path is '': give the name of a folder, . for this one"),
        ("nano", {"data.path": ""}, "path is '': give the name of a folder, . for this one"),
        ("lora", {"prior.caption_column": "x"}, "prior.caption_column is 'x', and there is no prior.path to read it"),
        (
            "lora",
            {"data": FOLDER, "prior.path": "images/of/dogs"},
            "prior.path is 'images/of/dogs' and data.path 'images': give two folders apart",
        ),
        ("lora", {"prior.count": 7, "prior.path": "dogs"}, "prior.count is 7: with prior.path, all of its images are"),
        ("vae", {"unet.train_text_encoder": True}, "unet.train_text_encoder is True: the method vae trains no text"),
        ("textual-inversion", {"unet.train_text_encoder": True}, "unet.train_text_encoder is True: the method textual"),
        ("lora", {"layout": "peft", "unet.train_text_encoder": True}, "layout is 'peft', which holds a U-Net alone"),
        (
            "lora",
            {"adapter": AdapterConfig(kind="loha"), "layout": "diffusers"},
            "layout is 'diffusers': a loha is written",
        ),
        ("vae", {"data": DataConfig(path="a", buckets=True)}, "data.buckets is True: the VAE is trained on squares"),
        (
            "dreambooth",
            {"data": DataConfig(path="a", buckets=True), "prior": PriorConfig(prompts=("a dog",))},
            "data.buckets is True: beside a prior",
        ),
        # without effect
        ("finetune", {"adapter.rank": 4}, "adapter is given, and the method is full: adapter alone reads it"),
        ("finetune", {"layout": "peft"}, "layout is given, and the method is full: adapter alone reads it"),
        ("lora", {"new_word.vectors": 3}, "new_word is given, and the method is adapter: textual_inversion alone"),
        ("lora", {"prior.weight": 2.0}, "prior is given without prior.prompts or prior.path: say what"),
        ("vae", {"sample_prompts": ("a dog",)}, "sample_prompts are given: the method vae shows images"),
        ("finetune", {"data.buckets": True}, "buckets is True, and scenes have none: give path, a folder"),
        ("nano", {"data.fit": "pad"}, "fit is 'pad', and scenes have none: give path, a folder"),
        ("nano", {"data.caption_column": "title"}, "caption_column is 'title', and scenes have none: give path"),
        ("nano", {"data.background": "red"}, "background is 'red', and scenes have none: give path"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_at_once(preset: str, changes: dict, sentence: str) -> None:
    def make() -> None:
        config = find_preset(preset)
        fields: dict[str, Any] = {}
        for path, value in changes.items():
            name, _, rest = path.partition(".")
            before = fields.get(name, getattr(config, name))
            fields[name] = changed(before, rest, value) if rest else value
        dataclasses.replace(config, **fields)

    said = sentence_of(make)
    assert said is not None
    assert sentence in said


@pytest.mark.parametrize(
    ("preset", "path", "value", "sentence"),
    [
        ("vae", "unet.optim.steps", 7, "unet.optim.steps is 7 and would have no effect, as the method is vae"),
        ("vae", "unet.offset_noise", 0.1, "unet.offset_noise is 0.1 and would have no effect, as the method is vae"),
        ("vae", "vae.kl", 1.0, "vae.kl is 1.0 and would have no effect, as the encoder stays as it is"),
        ("lora", "vae.l1", 2.0, "vae.l1 is 2.0 and would have no effect, as the method is adapter"),
        ("lora", "unet.text_lr_ratio", 0.5, "unet.text_lr_ratio is 0.5 and would have no effect, as the text encoder"),
        ("nano", "unet.text_lr_ratio", 0.5, "unet.text_lr_ratio is 0.5 and would have no effect, as the text encoder"),
    ],
)
def test_settings_that_a_run_would_not_read_are_refused(preset, path, value, sentence, tmp_path) -> None:
    config = changed(find_preset(preset), path, value)
    said = sentence_of(lambda: train(config, tmp_path / "run", console=QUIET))
    assert said is not None
    assert said.startswith(sentence)
    assert not (tmp_path / "run").exists()


def test_settings_of_every_preset_have_an_effect_and_so_have_those_that_a_section_reads() -> None:
    for preset in TRAINING_PRESETS:
        refuse_without_effect(find_preset(preset))
        refuse_scenes_of_folder(dataclasses.replace(find_preset(preset), data=FOLDER))
    refuse_without_effect(changed(find_preset("vae"), "vae.l1", 2.0))
    refuse_without_effect(changed(find_preset("dreambooth"), "unet.text_lr_ratio", 0.5))
    refuse_without_effect(changed(find_preset("lora"), "unet.optim.steps", 7))


@pytest.fixture(scope="module")
def refused(images: Path, oracle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Trains what cannot be trained; gives back the sentence, and finds that nothing was written."""

    def run(preset: str, model: Any = oracle_folder, data: Any = None, **changes: Any) -> str:
        config = find_preset(preset)
        data = dataclasses.replace(config.data, **{"path": str(images), **(data or {})})
        config = dataclasses.replace(config, model=str(model), device="cpu", data=data, **changes)
        out = tmp_path_factory.mktemp("out") / "run"
        said = sentence_of(lambda: train(config, out, console=QUIET))
        assert said is not None
        assert not out.exists()
        return said

    return run


def test_a_word_is_new_and_in_a_caption(refused, oracle_folder) -> None:
    known = next(iter(Pipeline.from_pretrained(oracle_folder).tokenizer.vocab)).removesuffix("</w>")
    inversion = "textual-inversion"
    assert refused(inversion, new_word=NewWordConfig(word=known)).startswith(
        f"new_word.word is {known!r}, which this model has already: give another"
    )
    assert refused(inversion, new_word=NewWordConfig(word="<do>")).startswith(
        "the new word '<do>' is in none of the 3 captions: write it into them, as in 'a photo of <do>'"
    )
    assert refused(inversion, new_word=NewWordConfig(word="<dog>", vectors=15)).startswith(
        "new_word.vectors is 15: give 14 at most"
    )
    said = refused(inversion, new_word=NewWordConfig(word="<dog>", begin=" "))
    assert said.startswith("new_word.begin is ' ': give a word that the model knows")


def test_a_model_is_there_and_whole(refused, oracle_folder, small_files, tmp_path) -> None:
    assert refused("lora", model=tmp_path / "nowhere").startswith(f"no model at {tmp_path / 'nowhere'}: expected")
    assert "has no VAE" in refused("lora", model=small_files["no vae"])
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter.safetensors").write_bytes(small_files["adapter"].read_bytes())
    assert "no model at" in refused("lora", model=tmp_path / "adapter")
    assert "adapter.safetensors" in refused("lora", model=tmp_path / "adapter" / "adapter.safetensors")


def test_sizes_and_data_fit_the_model(refused, tmp_path) -> None:
    assert refused("lora", data={"size": 80}) == "data.size is 80: this model needs a multiple of 64"
    assert refused("lora", data={"background": "nope"}).startswith("background is 'nope': give an opaque colour")
    assert refused("lora", data={"path": str(tmp_path / "none")}).startswith("no folder at")


def test_a_unet_that_sees_a_mask_has_no_prior(refused, make_oracle, tmp_path) -> None:
    make_oracle(9).save_pretrained(tmp_path / "masked")
    said = refused("dreambooth", model=tmp_path / "masked", prior=PriorConfig(prompts=("a dog",)))
    assert said == "a prior is given: a U-Net that sees a mask has none, leave it out"


def test_a_prior_is_there_and_captioned(refused, tmp_path) -> None:
    assert refused("lora", prior=PriorConfig(path=str(tmp_path / "none"))).startswith(f"no folder at {tmp_path}")
    (tmp_path / "empty").mkdir()
    said = refused("lora", prior=PriorConfig(path=str(tmp_path / "empty")))
    assert said.startswith(f"{tmp_path / 'empty'} has no captioned images")
    Image.new("RGB", (64, 64)).save(tmp_path / "empty" / "a.png")
    (tmp_path / "empty" / "a.json").write_text('{"text": "a dog"}')
    said = refused("lora", prior=PriorConfig(path=str(tmp_path / "empty"), caption_column="title"))
    assert "no 'title' in its JSON" in said


SHORT_OF_MEMORY = """
import resource, sys
from pathlib import Path

import torch

from gobelin.cli.main import main

torch.randn(64, 64) @ torch.randn(64, 64)
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30,) * 2)
options = ["--unet.optim.batch-size", "2048", "--data.count", "32", "--data.validation", "0", "--samples", "0"]
main(["train", "--preset", "finetune", "--out", sys.argv[1], *options])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="no limit of a process's addresses here")
def test_a_batch_that_does_not_fit_into_memory_is_said(tmp_path) -> None:
    """The limit is real: a gigabyte more than what the process has when it begins."""
    command = [sys.executable, "-c", SHORT_OF_MEMORY, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 1, done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("gobelin: ")]
    assert said.startswith("gobelin: stage unet: a batch of 2048 images does not fit into memory: give a smaller one")
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def small_files(oracle: Any, oracle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A single file without a VAE, and an adapter."""
    from safetensors.torch import load_file, save_file
    from tests.oracles import original_weights

    from gobelin.adapters.adapter_file import write_adapter
    from gobelin.adapters.trainable import add_adapters_

    folder = tmp_path_factory.mktemp("files")
    weights = original_weights(oracle)
    kept = {name: one for name, one in weights.items() if not name.startswith("first_stage_model.")}
    save_file(kept, folder / "no-vae.safetensors")
    unet = Pipeline.from_pretrained(oracle_folder).unet
    add_adapters_(unet, AdapterConfig(rank=2))
    write_adapter(folder / "adapter.safetensors", {"unet": unet})
    assert load_file(folder / "adapter.safetensors")
    return {"no vae": folder / "no-vae.safetensors", "adapter": folder / "adapter.safetensors"}
