"""ONNX files against our own networks, in onnxruntime: names, free axes, odd sizes; all of the files or none."""

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import jaxtyping
import pytest
import torch
from tests.conftest import fill_, relative_error

from gobelin.checkpoint import Model
from gobelin.checkpoint.onnx_files import save_onnx
from gobelin.clip import TextEncoder, TextEncoderConfig
from gobelin.errors import ModelError, UsageError
from gobelin.pipeline import Pipeline
from gobelin.unet import UNet
from gobelin.unet_config import UNetConfig
from gobelin.vae import VAE, VAEConfig

ort = pytest.importorskip("onnxruntime", reason="needs onnxruntime (gobelin[onnx])")
pytest.importorskip("onnxscript", reason="needs onnxscript (gobelin[onnx])")


def small_model() -> Model:
    """Networks that are exported in a moment; of the tokenizer only its length is asked for."""
    unet = UNetConfig.of(
        *(8, 12),
        attention=(True, False),
        layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = VAEConfig(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=4)
    networks = {
        "unet": fill_(UNet(unet)),
        "vae": fill_(VAE(vae)),
        "text_encoder": fill_(TextEncoder(TextEncoderConfig.of(12, layers=2, heads=2, vocab_size=400))),
    }
    return cast(Model, SimpleNamespace(**networks, tokenizer=SimpleNamespace(max_length=32)))


@pytest.fixture(scope="module", params=["small", pytest.param("shipped", marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest) -> Model:
    return small_model() if request.param == "small" else Pipeline.from_pretrained(device="cpu").model


@pytest.fixture(scope="module")
def folder(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / "model"
    jaxtyping.config.update("jaxtyping_disable", True)  # symbolic shapes are none that it can check
    save_onnx(model, folder)
    return folder


def run(file: Path, **inputs: torch.Tensor) -> torch.Tensor:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == list(inputs)
    (output,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return torch.from_numpy(output)


@pytest.mark.parametrize(("batch", "height", "width", "length"), [(1, 16, 16, 32), (2, 15, 9, 32), (3, 5, 18, 20)])
@torch.no_grad()
def test_the_unet_predicts_as_ours_does(model: Model, folder: Path, batch: int, height: int, width: int, length: int):
    latents, text = (
        torch.randn(batch, 4, height, width),
        torch.randn(batch, length, model.unet.config.cross_attention_dim),
    )
    timesteps = torch.rand(batch) * 999
    theirs = run(folder / "unet.onnx", sample=latents, timestep=timesteps, encoder_hidden_states=text)
    assert relative_error(theirs, model.unet(latents, timesteps, text)) < 1e-4


@pytest.mark.parametrize("shape", [(1, 4, 16, 16), (3, 4, 5, 9)])
@torch.no_grad()
def test_the_decoder_decodes_as_ours_does(model: Model, folder: Path, shape: tuple[int, ...]) -> None:
    latents = torch.randn(shape)
    assert relative_error(run(folder / "vae_decoder.onnx", latent_sample=latents), model.vae.decode(latents)) < 1e-4


@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_the_text_encoder_encodes_as_ours_does(model: Model, folder: Path, batch: int) -> None:
    ids = torch.randint(0, 300, (batch, model.tokenizer.max_length))
    assert relative_error(run(folder / "text_encoder.onnx", input_ids=ids), model.text_encoder(ids)) < 1e-4


def test_nothing_is_left_of_what_fails(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gobelin.checkpoint.onnx_files._export", fail)
    with pytest.raises(ModelError, match=r"unet\.onnx cannot be written: too large"):
        save_onnx(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def fail(*_: object) -> None:
    raise RuntimeError("too large\nfor this")


def test_what_is_not_installed_is_said(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gobelin.checkpoint.onnx_files.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs onnx and onnxscript: pip install 'gobelin\\[onnx\\]'"):
        save_onnx(model, tmp_path / "model")
