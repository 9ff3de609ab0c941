"""Every kind of file that people have opens to the oracle's numbers, or is refused by its name in one sentence."""

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.checkpoint.file_kinds import (
    FOREIGN_FILES,
    FOREIGN_TENSORS,
    KINDS,
    PRECISIONS,
    Files,
    copy_tokenizer,
    dtypes_of,
    rounded,
)
from tests.checkpoint.refused_kinds import CHANGES, CONTRADICTIONS
from tests.oracles import differences, original_weights
from transformers import CLIPTokenizerFast

from gobelin.checkpoint import open_model
from gobelin.checkpoint.audit import audit_model, compare_models
from gobelin.checkpoint.single_file import save_single_file
from gobelin.errors import ModelError
from gobelin.formats import ldm
from gobelin.pipeline import Pipeline
from gobelin.tokenizer import Tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
# Each kind in one precision, in turn; all of them are slow tests.
CELLS = [
    pytest.param(
        name, dtype, marks=[] if place % len(dtypes_of(kind)) == number % len(dtypes_of(kind)) else pytest.mark.slow
    )
    for number, (name, kind) in enumerate(KINDS.items())
    for place, dtype in enumerate(dtypes_of(kind))
]


_ORACLES: dict[int, Any] = {}


@pytest.fixture
def files(make_oracle, words, tmp_path):
    def make(channels: int = 4) -> Files:
        if channels not in _ORACLES:
            _ORACLES[channels] = make_oracle(channels)
        files = Files(oracle=_ORACLES[channels], make_oracle=make_oracle, words=words, folder=tmp_path)
        copy_tokenizer(files)
        return files

    return make


@pytest.mark.parametrize(("name", "dtype"), CELLS)
def test_a_kind_opens_to_the_oracles_numbers(name, dtype, files):
    kind = KINDS[name]
    there = files(kind.channels)
    path = kind.write(there, PRECISIONS[dtype])
    options = {key: there.folder / "vae.safetensors" if key == "vae" else one for key, one in kind.options.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe = Pipeline.from_pretrained(path, "cpu", **options)
    found = differences(pipe, rounded(there.oracle, there.make_oracle, PRECISIONS[dtype], kind.scaled))
    assert max(found.values()) <= 2e-5, found
    assert {key: getattr(pipe.schedule.config, key) for key in kind.schedule} == kind.schedule
    assert kind.schedule or pipe.schedule.prediction_type == "epsilon"


def said_of(path: Path, **options) -> str:
    with pytest.raises(ModelError) as error:
        Pipeline.from_pretrained(path, "cpu", **options)
    said = str(error.value)
    assert str(path.with_suffix("")) in said
    assert "\n" not in said
    assert len(said) < 600
    return said


@pytest.mark.parametrize("name", FOREIGN_FILES)
def test_a_file_of_no_weights_is_named(name, tmp_path):
    content, sentence = FOREIGN_FILES[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert re.search(sentence, said_of(path))
    assert "truncated" not in said_of(path, allow_pickle=True)


@pytest.mark.parametrize("name", FOREIGN_TENSORS)
def test_a_file_of_another_kind_is_named(name, tmp_path):
    tensor, sentence = FOREIGN_TENSORS[name]
    path = tmp_path / "model.safetensors"
    save_file({tensor: torch.ones(2)}, path)
    assert re.search(sentence, said_of(path))


def test_the_page_has_every_kind(tmp_path):
    page = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \|", page, re.MULTILINE)
    for name in (*KINDS, *FOREIGN_FILES, *FOREIGN_TENSORS, *CHANGES, *CONTRADICTIONS):
        assert name in rows, f"{name} is not on the page: python -m scripts.site.compatibility"
    millionths = [float(number) for number in re.findall(r"\| (\d+\.\d) (?=\|)", page)]
    assert len(millionths) == sum(len(dtypes_of(kind)) for kind in KINDS.values())
    assert max(millionths) <= 20


@pytest.mark.parametrize("name", CHANGES)
def test_what_would_change_an_image_is_refused(name, oracle, words, tmp_path):
    change, sentence = CHANGES[name]
    save_file(change(original_weights(oracle)), tmp_path / "model.safetensors")
    assert re.search(sentence, said_of(tmp_path / "model.safetensors", tokenizer=words))


@pytest.mark.parametrize(("channels", "what"), [(8, "InstructPix2Pix"), (5, "depth2img"), (7, "upscaler")])
def test_other_channels_are_named(channels, what, make_oracle, words, tmp_path):
    save_file(original_weights(make_oracle(channels)), tmp_path / "model.safetensors")
    assert re.search(
        f"takes {channels} channels, as .*{what}", said_of(tmp_path / "model.safetensors", tokenizer=words)
    )


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_what_contradicts_itself_asks_which(name, oracle, words, tmp_path):
    metadata, configuration, sentence = CONTRADICTIONS[name]
    path = tmp_path / "model.safetensors"
    save_file(original_weights(oracle) | {"v_pred": torch.zeros(0)}, path, metadata)
    if configuration is not None:
        path.with_suffix(".yaml").write_text(configuration)
    assert re.search(sentence, said_of(path, tokenizer=words))
    if re.search(r"\bby (its|\.\*)", sentence):
        pipe = Pipeline.from_pretrained(path, "cpu", tokenizer=words, prediction_type="epsilon")
        assert pipe.schedule.prediction_type == "epsilon"


def test_a_yaml_says_the_vaes_scale_the_heads_and_the_betas(oracle, words, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(original_weights(oracle), path)
    path.with_suffix(".yaml").write_text(
        "model: {params: {scale_factor: 0.2, linear_start: 1e-3, linear_end: 0.01, "
        "unet_config: {params: {num_heads: 4}}}}"
    )
    model = open_model(path, torch.device("cpu"), torch.float32, tokenizer=words)
    assert model.vae.config.scaling_factor == 0.2
    assert model.unet.config.attention_head_dim == 4
    assert (model.schedule.config.beta_start, model.schedule.config.beta_end) == (0.001, 0.01)
    save_file(dict(oracle.vae.state_dict()), tmp_path / "vae.safetensors")
    assert "scaling_factor is 0.18215 by its metadata or the VAE given and 0.2 by the .yaml" in said_of(
        path, tokenizer=words, vae=tmp_path / "vae.safetensors"
    )


def test_a_vae_file_with_other_layers_is_refused(oracle, oracle_folder, tmp_path):
    other = {"encoder.mid_block.attentions.0.to_gate.weight": torch.ones(2)}
    save_file(dict(oracle.vae.state_dict()) | other, tmp_path / "vae.safetensors")
    with pytest.raises(ModelError, match=r"vae\.safetensors is no VAE of .*: its attention has 'to_gate'"):
        Pipeline.from_pretrained(oracle_folder, "cpu", vae=tmp_path / "vae.safetensors")


def test_a_broken_link_says_so(oracle_folder, tmp_path):
    """As in a cache of the Hub from which a file was deleted."""
    folder = tmp_path / "model"
    folder.mkdir()
    for part in oracle_folder.iterdir():
        (folder / part.name).symlink_to(part)
    (folder / "unet").unlink()
    (folder / "unet").mkdir()
    (folder / "unet" / "config.json").symlink_to(oracle_folder / "unet" / "config.json")
    link = folder / "unet" / "diffusion_pytorch_model.safetensors"
    link.symlink_to(tmp_path / "blobs" / "gone")
    with pytest.raises(
        ModelError, match=r"diffusion_pytorch_model\.safetensors is a link to .*gone, which is not there"
    ):
        Pipeline.from_pretrained(folder, "cpu")
    with pytest.raises(ModelError, match=r"no VAE at .*nothing: expected a file"):
        Pipeline.from_pretrained(oracle_folder, "cpu", vae=tmp_path / "nothing")


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "mixed"])
def test_what_is_written_is_what_was_opened(dtype, oracle, words, tmp_path):
    """Each tensor in its own precision, as a folder and as a single file, with the schedule; other tools' marks too."""
    weights = original_weights(oracle)
    kinds = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
    for number, (name, tensor) in enumerate(weights.items()):
        weights[name] = tensor.to(kinds[number % len(kinds)] if dtype == "mixed" else PRECISIONS[dtype])
    save_file(weights | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, tmp_path / "x.safetensors")
    model = open_model(tmp_path / "x.safetensors", torch.device("cpu"), None, tokenizer=words)
    audit = audit_model(model)
    assert audit.sound
    held = {name for network in audit.networks.values() for name in network.dtypes}
    assert held == {str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()}
    save_single_file(model, tmp_path / "y.safetensors")
    again = load_file(tmp_path / "y.safetensors")
    assert again.keys() - weights.keys() == {"v_pred", "ztsnr"}
    for name, tensor in weights.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name].float(), tensor.float())
    plain = open_model(tmp_path / "y.safetensors", torch.device("cpu"), torch.float32, tokenizer=words)
    assert plain.schedule.config == model.schedule.config
    compared = compare_models(model, plain).differences
    assert all(value == 0 for blocks in compared.values() for value in blocks.values())


@pytest.mark.parametrize("ema_alone", [False, True])
def test_with_the_average_unknown_layers_are_refused_too(ema_alone, oracle, words, tmp_path):
    weights = original_weights(oracle)
    weights |= {ldm.map_ema_key(key): t.clone() for key, t in weights.items() if key.startswith(ldm.UNET_PREFIX)}
    extra = ldm.map_ema_key(f"{ldm.UNET_PREFIX}extra.weight") if ema_alone else f"{ldm.UNET_PREFIX}extra.weight"
    save_file(weights | {extra: torch.ones(2)}, tmp_path / "model.safetensors")
    assert "extra" in said_of(tmp_path / "model.safetensors", tokenizer=words, ema=True)


@pytest.mark.parametrize(
    ("beside", "metadata", "sentence"),
    [
        ({"conditioner.embedders.0.x": torch.ones(2)}, {}, "is Stable Diffusion XL"),
        ({f"{ldm.VAE_PREFIX}decoder.mid.attn_2.q.weight": torch.ones(2)}, {}, "attn_2.q.weight', which no part"),
        (
            {},
            {"modelspec.architecture": "stable-diffusion-xl-v1-base/vae"},
            "is of Stable Diffusion XL, as its metadata",
        ),
    ],
)
def test_a_whole_model_given_as_vae_is_checked_too(beside, metadata, sentence, oracle, oracle_folder, tmp_path):
    save_file(original_weights(oracle) | beside, tmp_path / "vae.safetensors", metadata)
    with pytest.raises(ModelError, match=sentence):
        Pipeline.from_pretrained(oracle_folder, "cpu", vae=tmp_path / "vae.safetensors")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler"},
            "is a 'FlowMatchEulerDiscreteScheduler', whose kind of noise",
        ),
        ({"_class_name": "EDMEulerScheduler"}, "whose kind of noise Gobelin does not have"),
        ({"beta_start": None}, "lacks the field 'beta_start'"),
    ],
)
def test_a_scheduler_of_another_kind_is_refused(changes, sentence, oracle_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(oracle_folder, folder)
    file = folder / "scheduler" / "scheduler_config.json"
    said = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in said.items() if value is not None}))
    assert sentence in said_of(folder)


def test_one_tensor_under_two_names_in_a_folder_is_refused(oracle_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(oracle_folder, folder)
    file = next((folder / "text_encoder").glob("*.safetensors"))
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("final_layer_norm.weight"))
    other = name.removeprefix("text_model.") if name.startswith("text_model.") else f"text_model.{name}"
    save_file(weights | {other: weights[name] + 1}, file, {"format": "pt"})
    assert "which are the same tensor" in said_of(folder)


def test_a_variant_that_no_file_has_is_refused(oracle_folder):
    assert "has no file of the variant 'non-ema'" in said_of(oracle_folder, variant="non-ema")


@pytest.mark.parametrize(
    "name",
    ["tokenizer/added_tokens.json", "tokenizer/tokenizer_config.json", "gobelin.json", "tokenizer/tokenizer.json"],
)
def test_a_broken_link_beside_the_weights_says_so(name, oracle_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(oracle_folder, folder)
    if name == "tokenizer/added_tokens.json":
        (folder / "tokenizer" / "tokenizer_config.json").unlink()
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "gone")
    with pytest.raises(ModelError, match=r"is a link to .*gone, which is not there"):
        Pipeline.from_pretrained(folder, "cpu")


@pytest.mark.parametrize("option", ["model", "vae", "tokenizer"])
@pytest.mark.parametrize("path", ["x" * 5000, "y\0"])
def test_what_is_no_path_is_one_sentence(option, path, oracle_folder):
    options = {} if option == "model" else {option: path}
    with pytest.raises(ModelError, match=f"no (model|VAE|tokenizer) at '{path[0]}"):
        Pipeline.from_pretrained(path if option == "model" else oracle_folder, "cpu", **options)


def test_a_tokenizer_of_another_vocabulary_is_refused(oracle, oracle_folder, tmp_path):
    other = Tokenizer.train(["a red circle"], vocab_size=520, max_length=16)
    other.save_pretrained(tmp_path / "words")
    with pytest.raises(ModelError, match=r"the tokenizer ends a text with token \d+, and the text encoder expects"):
        Pipeline.from_pretrained(oracle_folder, "cpu", tokenizer=tmp_path / "words")


def test_the_tokenizer_beside_a_file_may_be_of_newer_transformers(oracle, oracle_folder, words, tmp_path):
    save_file(original_weights(oracle), tmp_path / "model.safetensors")
    folder = tmp_path / "tokenizer"
    CLIPTokenizerFast.from_pretrained(words).save_pretrained(folder)
    for old in ("vocab.json", "merges.txt"):
        (folder / old).unlink(missing_ok=True)
    pipe = Pipeline.from_pretrained(tmp_path / "model.safetensors", "cpu")
    assert pipe.tokenizer.vocab == Tokenizer.from_pretrained(words).vocab


def test_tied_tensors_are_written(oracle, words, tmp_path):
    """As a pickle may hold two names of one storage."""
    weights = original_weights(oracle)
    norm = f"{ldm.UNET_PREFIX}out.0."
    weights[f"{norm}bias"] = weights[f"{norm}weight"]
    torch.save(weights, tmp_path / "model.ckpt")
    model = open_model(tmp_path / "model.ckpt", torch.device("cpu"), None, tokenizer=words, allow_pickle=True)
    save_single_file(model, tmp_path / "y.safetensors")
    again = load_file(tmp_path / "y.safetensors")
    assert torch.equal(again[f"{norm}bias"], again[f"{norm}weight"])


def test_a_saved_folder_has_no_files_of_the_tokenizer_before(oracle_folder, tmp_path):
    pipe = Pipeline.from_pretrained(oracle_folder, "cpu")
    folder = tmp_path / "used" / "tokenizer"
    folder.mkdir(parents=True)
    (folder / "added_tokens.json").write_text('{"<x>": 7}')
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {}, "merges": []}}')
    pipe.save_pretrained(tmp_path / "used")
    assert Pipeline.from_pretrained(tmp_path / "used", "cpu").tokenizer.vocab == pipe.tokenizer.vocab
