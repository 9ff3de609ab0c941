"""The page's folder: its graphs against our own networks, what is stored, what is refused."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.conftest import relative_error, sentence_of
from tests.static_page.conftest import NO_RUNTIME, SCRIPTS, make_small_model

from gobelin.checkpoint import Model
from gobelin.look.sharp_maps import sharp_trace
from gobelin.pipeline import Pipeline
from gobelin.samplers import find_noise_levels
from gobelin.settings import Settings
from gobelin.static_page import write_page
from gobelin.static_page.browser_graphs import DECODER, TEXT_ENCODER, UNET, store_in_half
from gobelin.tokenizer import Tokenizer
from gobelin.unet_config import UNetConfig

onnx = pytest.importorskip("onnx", reason="needs onnx (gobelin[onnx])")
ort = pytest.importorskip("onnxruntime", reason="needs onnxruntime (gobelin[onnx])")
pytest.importorskip("onnxscript", reason="needs onnxscript (gobelin[onnx])")


@pytest.fixture(scope="module", params=["small", "weighted", pytest.param("shipped", marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest) -> Model:
    name = request.param
    return request.getfixturevalue(name if name == "shipped" else f"{name}_model")


@pytest.fixture(scope="module")
def folder(model: Model, request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"{model.name if model.name in ('small', 'weighted') else 'shipped'}_page")


def run(file: Path, **inputs: torch.Tensor) -> list[torch.Tensor]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == list(inputs)
    return [torch.from_numpy(one) for one in session.run(None, {name: one.numpy() for name, one in inputs.items()})]


@torch.no_grad()
def test_the_unet_predicts_and_looks_as_ours_does(model: Model, folder: Path) -> None:
    config = model.unet.config
    latents = torch.randn(1, 4, config.sample_size, config.sample_size)
    text = torch.randn(2, model.tokenizer.max_length, config.cross_attention_dim)
    timestep = torch.tensor([321.0])
    prediction, cross, own = run(folder / UNET, latents=latents, timestep=timestep, text_embeddings=text)
    trace = sharp_trace(model.unet.attention_sites, (config.sample_size,) * 2, model.head_weights)
    ours, maps = model.unet.trace(latents, timestep, text, sites=trace.sites, reduce="none", rows=slice(1, 2))
    assert relative_error(prediction, ours) < 1e-4
    heads = {kind: [maps[site][0] for site in maps if site.kind == kind] for kind in ("cross", "self")}
    assert len(heads["cross"]) >= 1
    weights = trace.head_weights
    assert (weights is None) == (model.name == "small")
    if weights is None:
        assert relative_error(cross, torch.stack([each.mean(dim=0) for each in heads["cross"]])) < 1e-4
        assert relative_error(own, torch.cat(heads["self"]).mean(dim=0)[None]) < 1e-4
    else:
        by_name = {site.name: probs[0] for site, probs in maps.items()}
        assert relative_error(cross, torch.cat([by_name[name] for name in weights.cross])) < 1e-4
        assert relative_error(own, torch.cat([by_name[name] for name in weights.own])) < 1e-4


@torch.no_grad()
def test_the_text_encoder_encodes_as_ours_does(model: Model, folder: Path) -> None:
    ids = model.tokenizer(["", "a red ring and a star"]).int()
    (embeddings,) = run(folder / TEXT_ENCODER, token_ids=ids)
    assert relative_error(embeddings, model.text_encoder(ids)) < 1e-4


@torch.no_grad()
def test_the_decoder_gives_the_bytes_of_an_image(model: Model, folder: Path) -> None:
    side = model.unet.config.sample_size
    latents = 1.5 * torch.randn(1, 4, side, side)
    (levels,) = run(folder / DECODER, latents=latents)
    image = model.vae.latents_to_images(latents)[0].permute(1, 2, 0).clamp(-1, 1)
    assert (levels.dtype, levels[..., 3].unique().tolist()) == (torch.uint8, [255])
    assert (levels[..., :3].float() - (image + 1) * 127.5).abs().max() < 0.51


def test_weights_that_half_precision_holds_are_stored_in_it(model: Model, folder: Path) -> None:
    for name, network in ((UNET, model.unet), (TEXT_ENCODER, model.text_encoder)):
        count = sum(weight.numel() for weight in network.parameters())
        assert 2 * count < (folder / name).stat().st_size < 2.1 * count + 300_000
        stored = onnx.load(folder / name).graph.initializer
        large = [one for one in stored if np.prod(one.dims) > 2000]
        assert large
        assert all(one.data_type == onnx.TensorProto.FLOAT16 for one in large)


def test_other_weights_stay_as_they_are() -> None:
    weights = {
        "exact": [[0.5, -65504.0], [2.0**-24, 0.0]],
        "longer": [[0.1, 0.5], [0.5, 0.5]],
        "larger": [[1e6, 0.5], [0.5, 0.5]],
        "smaller": [[1e-30, 0.5], [0.5, 0.5]],
    }
    values = {name: np.array(each, dtype=np.float32) for name, each in weights.items()}
    proto = onnx.helper.make_model(
        onnx.helper.make_graph(
            [onnx.helper.make_node("Sum", list(values), ["sum"])],
            "sum",
            [],
            [onnx.helper.make_tensor_value_info("sum", onnx.TensorProto.FLOAT, [2, 2])],
            [onnx.numpy_helper.from_array(each, name) for name, each in values.items()],
        ),
        opset_imports=[onnx.helper.make_opsetid("", 18)],
        ir_version=9,
    )
    store_in_half(proto)
    onnx.checker.check_model(proto)
    kinds = {one.name: one.data_type == onnx.TensorProto.FLOAT16 for one in proto.graph.initializer}
    assert kinds == {"exact_half": True, "longer": False, "larger": False, "smaller": False}
    (summed,) = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {})
    assert np.array_equal(summed, sum(values.values()))


def test_the_model_is_described(model: Model, folder: Path) -> None:
    described = json.loads((folder / "model.json").read_text())
    asked = model.recommended
    assert [described[name] for name in ("sampler", "steps", "guidance")] == [
        asked.sampler,
        asked.steps,
        asked.guidance,
    ]
    for steps, levels in described["levels"].items():
        ours = find_noise_levels(asked.sampler or "", model.schedule, int(steps))
        assert levels["timesteps"] == ours.timesteps
        assert levels["alphas"] == ours.alphas_cumprod
        assert levels["nextAlphas"] == ours.next_alphas_cumprod
        seen = [model.schedule.progress(t) >= 0.5 for t in ours.timesteps]
        assert seen.index(True) == levels["mapsFrom"] if any(seen) else levels["mapsFrom"] == len(seen) - 1
    for file in described["files"]:
        assert (folder / file["name"]).stat().st_size == file["bytes"]
    assert described["tokenizer"]["vocab"] == model.tokenizer.vocab


def test_the_folder_holds_all_that_its_files_name(folder: Path) -> None:
    """Every script, style and picture beside this test's subject is copied, and nothing of Python."""
    there = {file.name for file in folder.iterdir()}
    assert {file.name for file in SCRIPTS.iterdir() if file.suffix not in (".py", "")} < there
    assert not list(folder.rglob("*.py"))
    for file in folder.glob("*.js"):
        text = file.read_text()
        for other in there | {"word_map.js"}:
            assert f'"./{other}"' not in text or (folder / other).is_file()
    assert "https://" not in (folder / "index.html").read_text()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"recommended": Settings(sampler="heun", steps=4, guidance=2.0)}, "recommends the sampler heun, and the page"),
        ({"tokenizer": Tokenizer.train(["a"], vocab_size=540, max_length=77)}, "in chunks of 77 tokens"),
    ],
)
def test_models_that_the_page_cannot_paint_with_are_refused(tmp_path: Path, changes: dict, said: str) -> None:
    model = make_small_model()
    for name, value in changes.items():
        object.__setattr__(model, name, value)
    sentence = sentence_of(lambda: write_page(model, tmp_path / "page", NO_RUNTIME))
    assert sentence is not None
    assert said in sentence
    assert list(tmp_path.iterdir()) == []


def test_an_inpainting_model_is_refused(tmp_path: Path) -> None:
    from gobelin.unet import UNet

    model = make_small_model()
    config: UNetConfig = dataclasses.replace(model.unet.config, in_channels=9)
    object.__setattr__(model, "unet", UNet(config))
    assert "inpainting model" in (sentence_of(lambda: write_page(model, tmp_path / "page", NO_RUNTIME)) or "")


def test_nothing_is_left_of_what_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("too large\nfor this")

    monkeypatch.setattr("gobelin.checkpoint.onnx_files._export", fail)
    said = sentence_of(lambda: write_page(make_small_model(), tmp_path / "page", NO_RUNTIME))
    assert said == "text_encoder.onnx cannot be written: too large"
    assert list(tmp_path.iterdir()) == []


def test_a_small_model_paints_in_python_too(small_model: Model) -> None:
    """The model of these tests is one that a pipeline takes."""
    assert Pipeline(small_model)("a red ring", seed=1).images[0].size == (16, 16)
