"""Concept erasure: the closed form against a regression that is solved in another way, and what stays as it was."""

import json
from collections.abc import Iterator, Sequence
from copy import deepcopy

import pytest
import torch
from PIL import Image

from gobelin.concept_erasure import erase_from_cross_attention
from gobelin.errors import UsageError
from gobelin.evaluate import erasure
from gobelin.evaluate.erasure import erasure_report, measure_erasure
from gobelin.evaluate.image_list import RequestedImage
from gobelin.layers import Attention
from gobelin.pipeline import Pipeline
from gobelin.scenes import CORE, Scene, SceneObject, render


@pytest.fixture
def pipe(trained) -> Pipeline:
    return Pipeline.from_pretrained(trained)


def keys_and_values(pipe: Pipeline) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{part}": getattr(module, part).weight.detach().clone()
        for name, module in pipe.unet.named_modules()
        if isinstance(module, Attention) and name.endswith("attn2")
        for part in ("to_k", "to_v")
    }


def test_weights_are_those_of_least_squares(pipe: Pipeline) -> None:
    width = pipe.unet.config.cross_attention_dim
    concept, target, preserved = torch.randn(5, width), torch.randn(5, width), torch.randn(3, width)
    before = keys_and_values(pipe)
    erase_from_cross_attention(pipe.unet, concept=concept, target=target, preserved=preserved, ridge=0.01)
    inputs = torch.cat([concept, preserved]).double()
    ridge = 0.01 * inputs.square().sum(dim=0).mean()
    stacked = torch.cat([inputs, ridge.sqrt() * torch.eye(width, dtype=torch.float64)])
    for name, weight in keys_and_values(pipe).items():
        old = before[name].double()
        wanted = torch.cat([target.double() @ old.T, preserved.double() @ old.T, ridge.sqrt() * old.T])
        oracle = torch.linalg.lstsq(stacked, wanted).solution.T
        assert torch.allclose(weight.double(), oracle, atol=1e-5)
        assert not torch.allclose(weight, before[name], atol=1e-3)


def test_only_keys_and_values_of_words_change(pipe: Pipeline) -> None:
    before = deepcopy(pipe.unet.state_dict())
    pipe.erase("red", "green")
    changed = {name for name, weight in pipe.unet.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {f"{name}.weight" for name in keys_and_values(pipe)}


def test_the_word_is_read_as_what_stands_in_its_place_and_others_as_before(pipe: Pipeline) -> None:
    def heard(prompt: str) -> torch.Tensor:
        """Keys and values of all sites, [tokens, features]."""
        text = pipe.encode_text(prompt).embeddings[0]
        return torch.cat([text @ weight.T for weight in keys_and_values(pipe).values()], dim=1)

    red, green, blue = map(heard, ("a red circle", "a green circle", "a blue square"))
    other = deepcopy(pipe.unet)
    pipe.erase("red", "green", prompts=["a red circle"], preserve=["a blue square"], ridge=1e-6)
    assert (heard("a red circle") - green).norm() < 0.75 * (red - green).norm(), "few directions for many texts"
    moved = (heard("a blue square") - blue).norm()
    pipe.unet.load_state_dict(other.state_dict())
    pipe.erase("red", "green", prompts=["a red circle"], ridge=1e-6)
    assert moved < 0.75 * (heard("a blue square") - blue).norm()


@pytest.mark.parametrize("instead", ["", "green", "deep green", "ä ☃", "green " * 40])
def test_whatever_stands_in_its_place_is_read(pipe: Pipeline, instead: str) -> None:
    before = pipe("a red circle", seed=0, steps=2).latents
    assert pipe.erase(["red", "circle"], instead) is pipe
    found = pipe("a red circle", seed=0, steps=2).latents
    assert found.isfinite().all()
    assert not torch.equal(found, before)


def test_nothing_is_erased_by_itself(pipe: Pipeline) -> None:
    before = keys_and_values(pipe)
    pipe.erase("red", "red")
    assert all(torch.equal(weight, before[name]) for name, weight in keys_and_values(pipe).items())


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        ("", {}, "'' is no word"),
        ([], {}, "words is"),
        (3, {}, "words is"),
        ("red", {"instead": None}, "instead is None"),
        ("red", {"preserve": "a circle"}, "preserve is 'a circle'"),
        ("red", {"prompts": [1]}, "prompts is"),
        ("red", {"ridge": 0}, "ridge is 0"),
        ("red", {"ridge": float("nan")}, "ridge is nan"),
        ("red", {"ridge": "much"}, "ridge is 'much'"),
    ],
)
def test_what_cannot_be_erased_is_said(pipe: Pipeline, words, options: dict, message: str) -> None:
    before = keys_and_values(pipe)
    with pytest.raises(UsageError, match=message) as raised:
        pipe.erase(words, **options)
    assert "\n" not in str(raised.value)
    assert all(torch.equal(weight, before[name]) for name, weight in keys_and_values(pipe).items())


def test_it_is_saved_with_the_model(pipe: Pipeline, tmp_path) -> None:
    pipe.erase("red")
    pipe.save_pretrained(tmp_path / "erased")
    again = Pipeline.from_pretrained(tmp_path / "erased")
    assert torch.equal(again("a red circle", seed=1, steps=2).latents, pipe("a red circle", seed=1, steps=2).latents)


@pytest.mark.slow
def test_the_shipped_model_forgets_stars_and_its_own_weights_stay() -> None:
    pipe = Pipeline.from_pretrained()
    before = keys_and_values(pipe)
    found = measure_erasure(pipe, CORE, "star", "circle", 5).to_json()
    assert all(torch.equal(weight, before[name]) for name, weight in keys_and_values(pipe).items())
    assert found["states"]["erased"]["shows"]["value"] < 0.5 * found["states"]["before"]["shows"]["value"]


def test_the_measurement_tells_what_is_gone_from_what_broke(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def scene_of(request: RequestedImage, *, forgets: bool) -> Image.Image:
        """An image of a prompt's objects in two rows, in which an erased star is a circle."""
        is_said = any(word in request.prompt.text for word in ("star", "pentagram"))
        things = [
            SceneObject(
                shape="circle" if shape == "star" and (forgets or not is_said) else shape or "ring",
                colour=colour or "red",
                x=16.0 + 32 * (place % 2),
                y=16.0 + 32 * (place // 2),
                radius=10.0,
            )
            for place, (shape, colour, *_) in enumerate(request.prompt.objects)
        ]
        return Image.fromarray(render(Scene(objects=tuple(things), background="grey"))[0])

    def painted(pipeline: Pipeline, requests: Sequence[RequestedImage], advance) -> Iterator[Image.Image]:
        advance(len(requests))
        return (scene_of(request, forgets=pipeline is not pipe) for request in requests)

    monkeypatch.setattr(erasure, "generate_images", painted)
    images: list[int] = []
    measured = measure_erasure(pipe, CORE, "star", "circle", 6, advance=images.append)
    found, asking, others = measured.to_json()["states"], measured.prompts, measured.other_prompts
    assert sum(images) == 3 * asking + 2 * others
    assert asking + others == 36
    assert found["before"]["shows"]["value"] > 0.7
    assert found["erased"]["shows"]["value"] == found["another word in the prompt"]["shows"]["value"] == 0
    assert found["before"]["others_right"] == found["erased"]["others_right"]
    assert found["erased"]["others_moved"]["value"] == 0
    report = erasure_report(json.loads(json.dumps(measured.to_json(), allow_nan=False)))
    assert "“star” read as “circle”" in report.markdown()
    with pytest.raises(UsageError, match="did you mean 'star'"):
        measure_erasure(pipe, CORE, "starr", "", 3)
