"""Every kind of file that people have opens to the oracle's numbers, or is refused by its name in one sentence."""

import re
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
from tests.oracles import differences, original_weights

from gobelin.checkpoint import open_model
from gobelin.checkpoint.audit import audit_model, compare_models
from gobelin.checkpoint.single_file import save_single_file
from gobelin.errors import ModelError
from gobelin.formats import ldm
from gobelin.pipeline import Pipeline

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
    for name in (*KINDS, *FOREIGN_FILES, *FOREIGN_TENSORS):
        assert name in rows, f"{name} is not on the page: python -m scripts.site.compatibility"
    millionths = [float(number) for number in re.findall(r"\| (\d+\.\d) (?=\|)", page)]
    assert len(millionths) == sum(len(dtypes_of(kind)) for kind in KINDS.values())
    assert max(millionths) <= 20


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w: {k: t for k, t in w.items() if not k.startswith(ldm.VAE_PREFIX)}, r"has no VAE: give one, as vae"),
        (lambda w: {k: t for k, t in w.items() if not k.startswith(ldm.TEXT_PREFIX)}, "has no text encoder"),
        (
            lambda w: {ldm.map_ema_key(k) if k.startswith(ldm.UNET_PREFIX) else k: t for k, t in w.items()},
            r"has only the average \(EMA\) of its U-Net's weights: take it, with ema",
        ),
        (
            lambda w: w | {f"{ldm.UNET_PREFIX}label.weight": torch.ones(2)},
            "holds 'model.diffusion_model.label.weight', which no part of Stable Diffusion 1.x has",
        ),
        (
            lambda w: w | {f"{ldm.VAE_PREFIX}decoder.mid.attn_2.q.weight": torch.ones(2)},
            "holds 'first_stage_model.decoder.mid.attn_2.q.weight', which no part",
        ),
        (
            lambda w: w | {"sampling.shift": torch.ones(1)},
            "holds the marker 'sampling.shift', whose meaning is unknown",
        ),
        (lambda w: w | {"edm_vpred.sigma_max": torch.ones(1)}, "was trained with EDM's noise levels"),
        (
            lambda w: (
                w
                | {f"{ldm.UNET_PREFIX}out.2.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)}
            ),
            "says 'nvfp4', and only float8 is read",
        ),
        (
            lambda w: {k: t.to(torch.int8) if k == f"{ldm.UNET_PREFIX}out.2.weight" else t for k, t in w.items()},
            "is of int8: weights quantized to whole numbers are not read",
        ),
    ],
)
def test_what_would_change_an_image_is_refused(change, sentence, oracle, words, tmp_path):
    save_file(change(original_weights(oracle)), tmp_path / "model.safetensors")
    assert re.search(sentence, said_of(tmp_path / "model.safetensors", tokenizer=words))


@pytest.mark.parametrize(("channels", "what"), [(8, "InstructPix2Pix"), (5, "depth2img"), (7, "upscaler")])
def test_other_channels_are_named(channels, what, make_oracle, words, tmp_path):
    save_file(original_weights(make_oracle(channels)), tmp_path / "model.safetensors")
    assert re.search(
        f"takes {channels} channels, as .*{what}", said_of(tmp_path / "model.safetensors", tokenizer=words)
    )


@pytest.mark.parametrize(
    ("metadata", "configuration", "sentence"),
    [
        (
            {"modelspec.prediction_type": "epsilon"},
            None,
            r"'v_prediction' by its key 'v_pred' and 'epsilon' by its metadata",
        ),
        ({}, "model: {params: {parameterization: eps}}", r"and 'epsilon' by .*model\.yaml: say which"),
        ({"modelspec.prediction_type": "flow"}, None, "prediction_type is 'flow', expected epsilon or v"),
        ({}, "model: {params: {parameterization: x0}}", "parameterization is 'x0', expected eps or v"),
        (
            {},
            "model: {params: {beta_schedule: cosine, parameterization: v}}",
            "beta_schedule is 'cosine', expected linear",
        ),
        ({}, "model: {params: {parameterization: v, linear_start: x}}", "linear_start is 'x', expected a number"),
        ({}, "a: [", r"has no model\.params"),
        ({}, "[]", r"has no model\.params"),
    ],
)
def test_what_contradicts_itself_asks_which(metadata, configuration, sentence, oracle, words, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(original_weights(oracle) | {"v_pred": torch.zeros(0)}, path, metadata)
    if configuration is not None:
        path.with_suffix(".yaml").write_text(configuration)
    assert re.search(sentence, said_of(path, tokenizer=words))
    if "by" in sentence:
        pipe = Pipeline.from_pretrained(path, "cpu", tokenizer=words, prediction_type="epsilon")
        assert pipe.schedule.prediction_type == "epsilon"


def test_a_yaml_says_the_vaes_scale_the_heads_and_the_betas(oracle, words, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(original_weights(oracle), path)
    path.with_suffix(".yaml").write_text(
        "model: {params: {scale_factor: 0.2, linear_start: 0.001, linear_end: 0.01, "
        "unet_config: {params: {num_heads: 4}}}}"
    )
    model = open_model(path, torch.device("cpu"), torch.float32, tokenizer=words)
    assert model.vae.config.scaling_factor == 0.2
    assert model.unet.config.attention_head_dim == 4
    assert (model.schedule.config.beta_start, model.schedule.config.beta_end) == (0.001, 0.01)


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
