"""Engines whose graphs are compiled against the eager one: numbers, traced maps, what is kept, and what changes it."""

import dataclasses
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.conftest import fill_, relative_error
from torch import Tensor

from gobelin.attention import AttentionEdit, ExtraWords
from gobelin.checkpoint import Model
from gobelin.engines import EngineName, find_engine
from gobelin.engines.graph_networks import Compile, GraphUNet, RunGraph
from gobelin.engines.watched_weights import WatchedWeights
from gobelin.errors import UsageError
from gobelin.pipeline import Pipeline
from gobelin.shortcuts import DeepFeatures, Shortcuts
from gobelin.unet import UNet
from gobelin.unet_config import UNetConfig
from gobelin.vae import VAE, VAEConfig

needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="needs openvino (gobelin[openvino])")
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))) or "GOBELIN_COMPILE" not in os.environ,
    reason="needs a C++ compiler and minutes: set GOBELIN_COMPILE",
)
EVERY = [pytest.param("openvino", marks=needs_openvino), pytest.param("compiled", marks=[needs_compiler])]
SIZES = [(1, 5, 3, None), (3, 1, 4, 6)]
"""Batch, height, width of latents; length of text where it is masked."""


@dataclasses.dataclass(frozen=True)
class Small:
    """The networks of a small model."""

    unet: UNet
    vae: VAE


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gobelin"


@pytest.fixture
def small() -> Small:
    unet = UNetConfig.of(
        *(8, 12),
        attention=(True, False),
        layers_per_block=1,
        cross_attention_dim=6,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = VAEConfig(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=4)
    return Small(fill_(UNet(unet)), fill_(VAE(vae)))


def inputs(batch: int, height: int, width: int, length: int | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    made = {
        "noisy_latents": torch.randn(batch, 4, height, width, generator=generator),
        "timesteps": torch.rand(batch, generator=generator) * 999,
        "text_embeddings": torch.randn(batch, length or 7, 6, generator=generator),
    }
    if length is not None:
        made["text_mask"] = torch.arange(length) < torch.arange(1, batch + 1)[:, None]
    return made


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_numbers_and_maps_are_those_of_eager(small: Small, name: EngineName, size: tuple[int, int, int, int | None]):
    warnings.simplefilter("error", UserWarning)  # such as that PyTorch goes on
    engine, given = find_engine(name)(small), inputs(*size)
    sites, rows = small.unet.attention_sites, slice(-1, None)
    plain = engine.unet(**given)
    assert relative_error(plain, small.unet(**given)) < 1e-5
    prediction, maps = engine.unet.trace(**given, sites=sites, rows=rows, reduce="none")
    expected = small.unet.trace(**given, sites=sites, rows=rows, reduce="none")[1]
    assert torch.equal(prediction, plain)
    assert list(maps) == list(expected)
    for site in sites:
        assert relative_error(maps[site], expected[site]) < 1e-5
    latents = given["noisy_latents"]
    assert relative_error(engine.vae.latents_to_images(latents), small.vae.latents_to_images(latents)) < 1e-5


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_several_texts_an_image_are_those_of_eager(small: Small, name: EngineName) -> None:
    warnings.simplefilter("error", UserWarning)
    unet, given = find_engine(name)(small).unet, inputs(4, 5, 3, 6)
    given |= {"noisy_latents": given["noisy_latents"][:2], "timesteps": given["timesteps"][:2]}
    plain = unet(**given)
    assert relative_error(plain, small.unet(**given)) < 1e-5
    prediction, maps = unet.trace(**given, sites="*", rows=slice(-2, None))
    expected = small.unet.trace(**given, sites="*", rows=slice(-2, None))[1]
    assert torch.equal(prediction, plain)
    assert list(maps) == list(expected)
    assert all(relative_error(maps[site], expected[site]) < 1e-5 for site in maps)


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
@pytest.mark.slow  # two graphs are exported and compiled
def test_words_beside_and_the_other_half_are_those_of_eager(small: Small, name: EngineName) -> None:
    warnings.simplefilter("error", UserWarning)
    unet, given = find_engine(name)(small).unet, inputs(4, 5, 3, 6)
    given |= {"noisy_latents": given["noisy_latents"][:2], "timesteps": given["timesteps"][:2]}
    also = ExtraWords(embeddings=torch.randn(4, 6), lengths=(1, 3))
    prediction, maps = unet.trace(**given, sites="*", also=also, unedited=2)
    expected = small.unet.trace(**given, sites="*", also=also, unedited=2)[1]
    assert torch.equal(prediction, unet(**given))
    assert all(relative_error(maps[site], expected[site]) < 1e-5 for site in expected)
    assert {(len(probs), probs.shape[2]) for site, probs in maps.items() if site.kind == "cross"} == {(4, 10)}
    other = ExtraWords(embeddings=torch.randn(4, 6), lengths=(2, 2))  # other words of as many tokens
    again = unet.trace(**given, sites="*", also=other)[1]
    expected = small.unet.trace(**given, sites="*", also=other)[1]
    assert all(relative_error(again[site], expected[site]) < 1e-5 for site in expected)


@needs_openvino
@torch.no_grad()
def test_half_precision_is_as_near_to_the_truth_as_eager(small: Small) -> None:
    given = inputs(2, 4, 7)
    truth = small.unet(**given)
    small.unet.to(torch.bfloat16)
    half = {name: one if name == "timesteps" else one.to(torch.bfloat16) for name, one in given.items()}
    engine = find_engine("openvino")(small)
    with warnings.catch_warnings(action="error", category=UserWarning):  # such as that PyTorch goes on
        prediction = engine.unet(**half)
        traced, _ = engine.unet.trace(**half)
    assert prediction.dtype == torch.bfloat16
    assert torch.equal(prediction, traced)
    assert relative_error(prediction.float(), truth) < 2 * relative_error(small.unet(**half).float(), truth)


@needs_openvino
@torch.no_grad()
def test_controls_and_gradients_are_left_to_pytorch_and_that_is_said_once(small: Small) -> None:
    engine, given = find_engine("openvino")(small), inputs(2, 4, 4)
    edit = AttentionEdit(change=lambda site, probs: probs.flip(-1))
    with pytest.warns(UserWarning, match="has no attention controls: PyTorch runs the passes that they change"):
        edited, _ = engine.unet.trace(**given, edits=[edit])
    assert torch.equal(edited, small.unet.trace(**given, edits=[edit])[0])
    engine.unet.trace(**given, edits=[edit])  # not said again: a warning would be an error
    with torch.enable_grad():
        latents = given["noisy_latents"].requires_grad_()
        with pytest.warns(UserWarning, match="has no gradients"):
            engine.unet(**given).sum().backward()
    assert latents.grad is not None


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_graphs_are_kept_and_neither_exported_nor_compiled_again(
    small: Small, name: EngineName, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = inputs(1, 4, 4)
    first = find_engine(name)(small).unet(**given)
    (file,) = (cache / name).iterdir()
    with monkeypatch.context() as without:
        without.setattr("torch.export.export", None)
        assert torch.equal(find_engine(name)(small).unet(**given), first)
    written = bytearray(file.read_bytes())
    written[len(written) // 2] ^= 1
    file.write_bytes(written)
    with pytest.warns(UserWarning, match="is damaged, or others may write to it: it is compiled anew"):
        assert torch.equal(find_engine(name)(small).unet(**given), first)
    assert torch.equal(find_engine(name)(small).unet(**given), first)
    monkeypatch.setattr("gobelin.__version__", "2099.1")
    find_engine(name)(small).unet(**given)
    assert len(list((cache / name).iterdir())) == 2, "another version makes its own"


@needs_openvino
@torch.no_grad()
def test_a_folder_that_others_write_to_is_not_used(small: Small, cache: Path) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    given = inputs(1, 4, 4)
    with pytest.warns(UserWarning, match="can be written to by others"):
        assert relative_error(find_engine("openvino")(small).unet(**given), small.unet(**given)) < 1e-5
    assert not list(cache.rglob("*.blob"))


@torch.no_grad()
def test_what_cannot_be_compiled_is_said_and_pytorch_goes_on(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    engine, given = find_engine("compiled")(small), inputs(1, 4, 4)
    with pytest.warns(UserWarning, match="cannot run this network, so PyTorch does: there is no C\\+\\+ compiler"):
        assert torch.equal(engine.unet(**given), small.unet(**given))
    assert torch.equal(engine.unet.trace(**given)[0], small.unet(**given))


def test_an_engine_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gobelin.engines.openvino_runtime.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs OpenVINO: pip install 'gobelin\\[openvino\\]'"):
        Pipeline.from_pretrained("/nowhere", engine="openvino")


@needs_openvino
def test_another_device_or_precision_is_refused_or_said(clip_model: Callable[..., Model]) -> None:
    pipe = Pipeline(clip_model()).use("openvino")
    assert "engine='openvino'" in repr(pipe)
    assert pipe.to(torch.bfloat16).engine == "openvino"
    with pytest.warns(UserWarning, match=r"does not compute in torch.float64.*; until then the engine is eager"):
        pipe.to(torch.float64)
    assert pipe.engine == "eager"
    with pytest.raises(UsageError, match="the choices are float32, bfloat16, float16"):
        pipe.use("openvino")


@needs_openvino
def test_a_lora_that_is_loaded_later_changes_the_image_as_in_eager(
    small: Small, clip_model: Callable[..., Model], tmp_path: Path
) -> None:
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
    lora = tmp_path / "style.safetensors"
    save_file({f"{layer}.lora_A.weight": torch.randn(2, 32), f"{layer}.lora_B.weight": torch.randn(12, 2)}, lora)
    unet = fill_(UNet(dataclasses.replace(small.unet.config, cross_attention_dim=32)))
    pipe = Pipeline(dataclasses.replace(clip_model(), unet=unet)).use("openvino")
    options = {"seed": 1, "steps": 2, "guidance": 1.0, "height": 64, "width": 64}
    without = pipe("a castle", **options).latents
    pipe.load_lora(lora)
    changed = pipe("a castle", **options).latents
    assert relative_error(changed, Pipeline(pipe.model)("a castle", **options).latents) < 1e-4
    assert relative_error(changed, without) > 1e-3
    pipe.loras.remove("style")
    assert torch.equal(pipe("a castle", **options).latents, without)


def test_watched_weights_see_every_way_of_changing_them() -> None:
    network = torch.nn.Linear(3, 2)
    watched = WatchedWeights(network)
    assert watched.have_changed()
    assert not watched.have_changed()
    before = watched.fingerprint()
    with torch.no_grad():
        network.weight.mul_(2)
    assert watched.have_changed()
    assert watched.fingerprint() != before
    network.weight = torch.nn.Parameter(network.weight.detach() / 2)
    assert watched.have_changed()
    assert watched.fingerprint() == before
    for _ in range(10):  # the allocator gives the memory of the one before last to the next
        network.weight = torch.nn.Parameter(torch.rand(2, 3))
        assert watched.have_changed()
    network.to(torch.bfloat16)
    assert watched.have_changed()


def test_a_write_that_is_not_counted_is_seen_by_reading() -> None:
    network = torch.nn.Linear(3, 5)
    watched = WatchedWeights(network)
    assert watched.have_changed(read=True)
    network.weight.data[1, 2] += 1
    network.bias.data[4] -= 1
    assert not watched.have_changed()
    assert watched.have_changed(read=True)
    assert not watched.have_changed(read=True)


@needs_openvino
@torch.no_grad()
def test_an_engine_that_is_asked_for_its_network_has_the_weights_that_there_are(small: Small) -> None:
    engine = find_engine("openvino")(small)
    before = engine.unet(**inputs(1, 4, 4))
    small.unet.conv_out.weight.data.mul_(2)
    assert not torch.equal(engine.unet(**inputs(1, 4, 4)), before)
    small.unet.conv_out.weight.data.div_(2)
    assert torch.equal(engine.unet(**inputs(1, 4, 4)), before)


@needs_openvino
def test_another_process_finds_the_graphs(small: Small, cache: Path, tmp_path: Path) -> None:
    unet, vae = tmp_path / "unet", tmp_path / "vae"
    small.unet.save_pretrained(unet)
    small.vae.save_pretrained(vae)
    program = f"""
import torch, warnings
from types import SimpleNamespace
from gobelin.engines import find_engine
from gobelin.unet import UNet
from gobelin.vae import VAE
warnings.simplefilter("error", UserWarning)
torch.set_num_threads(1)
torch.export.export = None
model = SimpleNamespace(unet=UNet.from_pretrained({str(unet)!r}), vae=VAE.from_pretrained({str(vae)!r}))
with torch.no_grad():
    print(find_engine("openvino")(model).unet(torch.ones(1, 4, 4, 4), torch.ones(1), torch.ones(1, 7, 6)).sum().item())
"""
    with torch.no_grad():
        ours = find_engine("openvino")(small).unet(torch.ones(1, 4, 4, 4), torch.ones(1), torch.ones(1, 7, 6))
    with warnings.catch_warnings():
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    assert float(done.stdout) == pytest.approx(ours.sum().item(), abs=0)


@torch.no_grad()
def test_passes_that_take_shortcuts_are_pytorchs_which_is_said_once(small: Small) -> None:
    compiled: list[str] = []

    def compile_graph(asked: Compile) -> RunGraph:
        compiled.append(str(asked.graph))
        return lambda given: asked.graph(**given)

    unet, given = GraphUNet("made-up", small.unet, compile_graph), inputs(2, 4, 6)
    shortcuts = Shortcuts(merge_tokens=0.5, deep=DeepFeatures())
    expected, _ = small.unet.trace(**given, sites=(), shortcuts=Shortcuts(merge_tokens=0.5))
    with pytest.warns(UserWarning, match="the engine made-up takes no shortcuts: PyTorch runs the passes that do"):
        prediction, _ = unet.trace(**given, sites=(), shortcuts=shortcuts)
    with warnings.catch_warnings(action="error"):
        again, _ = unet.trace(**given, sites=(), shortcuts=shortcuts)
    assert torch.equal(prediction, expected)
    assert torch.equal(again, expected)
    assert compiled == []
    unet(**given)
    assert len(compiled) == 1


SIGNALLED = """
import faulthandler, gc, os, signal
from gobelin.pipeline import Pipeline

faulthandler.enable()  # gives the main thread a stack for signals, as pytest does
first, second = (Pipeline.from_pretrained(engine="openvino") for _ in range(2))
del first
gc.collect()
del second
gc.collect()
signal.signal(signal.SIGTERM, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_signal_finds_its_stack_after_engines_are_gone():
    """Each ``openvino.Core`` takes the thread's stack for signals, and gives back the one that it found."""
    pytest.importorskip("openvino")
    done = subprocess.run([sys.executable, "-c", SIGNALLED], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr
