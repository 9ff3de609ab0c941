"""Shape and type checks at run time for every test, and the helpers that several test files share.

The oracles are diffusers and transformers: each network is compared with theirs over the same random weights.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar

import hypothesis
import jaxtyping
import pytest
import torch
from beartype import BeartypeConf, FrozenDict, beartype
from rich.console import Console
from torch import Tensor, nn

# Functions are decorated one by one, where beartype cannot know what Self is; an int may stand for a float (PEP 484).
_beartype = beartype(conf=BeartypeConf(hint_overrides=FrozenDict({Self: Any}), is_pep484_tower=True))


def type_checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Beartype, except for configurations: they hold what users wrote, and their own checks say what is wrong."""
    return function if "Config.__init__" in function.__qualname__ else _beartype(function)


# Before anything imports gobelin: every annotated type and shape in it is checked at every call.
jaxtyping.install_import_hook("gobelin", f"{__name__}.{type_checked.__name__}")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The oracles log what they miss (torchvision, accelerate), which no test needs.
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

torch.set_num_threads(1)  # for tensors this small, and on shared cores, more are many times slower

Network = TypeVar("Network", bound=nn.Module)

hypothesis.settings.register_profile("gobelin", deadline=None)  # a busy machine is not a bug
hypothesis.settings.load_profile("gobelin")


def pytest_configure(config: pytest.Config) -> None:
    # diffusers' own affair with NumPy 2
    for method in ("__array__ implementation", "__array_wrap__ must accept"):
        config.addinivalue_line("filterwarnings", f"ignore:{method}:DeprecationWarning")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def fill_(module: Network, seed: int = 0) -> Network:
    """Give every parameter, zero-initialised or on the meta device, random values of a useful size."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, tensor in module.state_dict().items():
        fan_in = tensor[0].numel() if tensor.ndim > 1 else 10
        values[name] = torch.randn(tensor.shape, generator=generator).mul_(fan_in**-0.5)
        if tensor.ndim == 1 and name.endswith("weight"):  # a norm's
            values[name] += 1
    module.load_state_dict(values, assign=True)
    return module.eval()


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """max |a − b| / max |b|."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def norm_eps(module: nn.Module) -> dict[str, float]:
    """The ε of every norm by its name: too small a number to show in outputs of ordinary size."""
    return {name: norm.eps for name, norm in module.named_modules() if isinstance(norm, nn.GroupNorm | nn.LayerNorm)}


def edit_config(folder: Path, **fields: object) -> None:
    """Change fields of a saved component's ``config.json``."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.fixture(scope="session")
def micro():
    """Makes a training configuration that takes seconds: every stage, a few steps, the smallest networks."""
    from gobelin.training.config import DataConfig, find_preset

    def make(steps: int = 4, **changes):
        preset = find_preset("nano")
        optim = {"steps": steps, "batch_size": 8, "warmup_steps": 2}
        config = dataclasses.replace(
            preset,
            save_every=2,
            sample_every=2,
            device="cpu",
            data=DataConfig(count=48),
            text=dataclasses.replace(preset.text, width=32, optim=dataclasses.replace(preset.text.optim, **optim)),
            vae=dataclasses.replace(preset.vae, optim=dataclasses.replace(preset.vae.optim, **optim)),
            unet=dataclasses.replace(preset.unet, optim=dataclasses.replace(preset.unet.optim, **optim)),
            recommended=dataclasses.replace(preset.recommended, steps=2),
        )
        return dataclasses.replace(config, **changes)

    return make


@pytest.fixture(scope="session")
def trained(micro, tmp_path_factory) -> Path:
    """The folder of a model that was trained for a moment."""
    from gobelin.training.recipes.from_scratch import train

    return train(micro(), tmp_path_factory.mktemp("trained") / "model", console=Console(quiet=True))


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tokenizer."""
    from gobelin.tokenizer import Tokenizer

    folder = tmp_path_factory.mktemp("words")
    Tokenizer.train(["a red circle left of a blue square"], vocab_size=560, max_length=16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_oracle(words: Path) -> Callable[..., Any]:
    """Makes diffusers' pipeline of a small model with random weights, always the same ones."""
    from tests.oracles import small_pipeline

    return lambda in_channels=4: small_pipeline(words, in_channels)


@pytest.fixture(scope="session")
def oracle(make_oracle: Callable[..., Any]) -> Any:
    return make_oracle()


@pytest.fixture(scope="session")
def oracle_folder(oracle: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder, as diffusers writes it."""
    folder = tmp_path_factory.mktemp("model")
    oracle.save_pretrained(folder)
    return folder
