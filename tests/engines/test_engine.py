"""Engines as a pipeline and the command line choose them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gobelin.checkpoint import Model
from gobelin.engines import ENGINES, Engine, LatentDecoder, NoisePredictor
from gobelin.engines.eager import EagerEngine
from gobelin.errors import UsageError
from gobelin.pipeline import Pipeline


@pytest.fixture(scope="module")
def pipe(clip_model: Callable[..., Model]) -> Pipeline:
    return Pipeline(clip_model())


def test_networks_are_what_painting_needs(pipe: Pipeline) -> None:
    assert isinstance(pipe.unet, NoisePredictor)
    assert isinstance(pipe.vae, LatentDecoder)
    assert isinstance(EagerEngine.of(pipe.model), Engine)


def test_an_engine_that_there_is_not_is_refused_before_a_model_is_opened(pipe: Pipeline) -> None:
    with pytest.raises(UsageError, match="engine is 'fast': give one of 'eager'"):
        pipe.use("fast")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="engine is 'fast'"):
        Pipeline.from_pretrained("/nowhere", engine="fast")  # type: ignore[arg-type]
    assert pipe.engine == "eager"


def test_the_representation_names_an_engine_that_is_not_eager(pipe: Pipeline) -> None:
    assert "engine" not in repr(pipe)


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_is_named_in_the_how_to(name: str) -> None:
    page = Path(__file__).parents[2] / "docs" / "how-to" / "engines.md"
    assert f"`{name}`" in page.read_text(encoding="utf-8")


def test_a_painting_runs_what_the_engine_gives(pipe: Pipeline) -> None:
    before = pipe("a red circle", seed=1, steps=2)
    unet = pipe.unet

    passes = []
    handle = unet.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        after = pipe.use("eager")("a red circle", seed=1, steps=2)
    finally:
        handle.remove()
    assert passes
    assert torch.equal(before.latents, after.latents)
