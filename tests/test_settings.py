"""Settings: every wrong type, range and name is one sentence that names the field; one list feeds every door."""

import inspect
import pydoc
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

import numpy as np
import pytest
import torch
from annotated_types import Interval
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import sentence_of

from gobelin.attention import Trace
from gobelin.cli.options import SettingsOf, parse
from gobelin.cli.painting_options import PaintingOptions
from gobelin.errors import UsageError
from gobelin.guidance import classifier_free_guidance
from gobelin.pipeline import Pipeline
from gobelin.samplers import SAMPLERS
from gobelin.settings import OWN_SAMPLERS, EditSettings, Settings, takes_settings
from gobelin.validation import field_docs

NAMES = [field.name for field in fields(Settings)]
OPENED_LATER = ("init_image", "mask", "latents", "trace", "control")
ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(),
    st.lists(st.integers() | st.text() | st.floats() | st.none(), max_size=30),
    st.dictionaries(st.text(), st.integers()),
    st.sampled_from([object(), ..., np.zeros(3), torch.ones(2, 2), np.float64(2), np.int8(3), 1j, {1}, range(3)]),
)


@pytest.fixture(scope="module")
def pipe(trained) -> Pipeline:
    return Pipeline.from_pretrained(trained)


@given(name=st.sampled_from(sorted(set(NAMES) - set(OPENED_LATER))), value=ANYTHING)
def test_any_value_of_any_setting_is_taken_or_refused_in_one_sentence(name: str, value: Any) -> None:
    said = sentence_of(lambda: Settings(**{name: value}))
    if said is not None:
        assert said.startswith((f"{name} is ", f"unknown {name} ")), said
        assert "give " in said or "did you mean" in said or "the choices are" in said
        assert len(said) < 400


@given(name=st.sampled_from(OPENED_LATER), value=ANYTHING)
def test_what_is_opened_later_is_refused_in_one_sentence_too(pipe: Pipeline, name: str, value: Any) -> None:
    options = {"init_image": np.zeros((64, 64, 3), np.uint8)} if name == "mask" else {}
    said = sentence_of(lambda: pipe.start("a red circle", steps=1, **{**options, name: value}))
    if said is not None and name in ("latents", "trace", "control"):
        assert name in said


@pytest.mark.filterwarnings("ignore:the prompt is longer")
@given(prompt=ANYTHING | st.lists(st.text(max_size=9) | st.integers(), max_size=3))
def test_any_prompt_is_taken_or_refused_in_one_sentence(pipe: Pipeline, prompt: Any) -> None:
    said = sentence_of(lambda: pipe.start(prompt, steps=1, weights="none"))
    if not isinstance(prompt, str | list):
        assert said is not None
        assert said.startswith("the prompt is ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": "2"}, "steps is '2': give a whole number from 1 to 1000"),
        ({"steps": 2.5}, "steps is 2.5: give a whole number from 1 to 1000"),
        ({"steps": 0}, "steps is 0: give a whole number from 1 to 1000"),
        ({"steps": True}, "steps is True: give a whole number from 1 to 1000"),
        ({"seed": -1}, "seed is -1: give a whole number of 0 or more, or one for each image"),
        ({"seed": 2**63}, f"seed is {2**63}: give a whole number of 0 or more, or one for each image"),
        ({"seed": "1"}, "seed is '1': give a whole number of 0 or more, or one for each image"),
        ({"seed": 1.5}, "seed is 1.5: give a whole number of 0 or more, or one for each image"),
        ({"guidance": "7"}, "guidance is '7': give a number, or a function of gobelin.guidance"),
        ({"guidance": float("nan")}, "guidance is nan: give a number, or a function of gobelin.guidance"),
        ({"guidance_rescale": 1.1}, "guidance_rescale is 1.1: give a fraction from 0 to 1"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt is ['a', 'b']: give text"),
        ({"count": 0}, "count is 0: give a whole number from 1 to 10000"),
        ({"strength": -0.1}, "strength is -0.1: give a fraction from 0 to 1"),
        ({"weights": "compel"}, "weights is 'compel': give one of 'a1111', 'comfyui', 'none'"),
        ({"sampler": "euler_a"}, "unknown sampler 'euler_a': did you mean 'euler'?"),
        ({"sampler": 3}, "sampler is 3: give text"),
        ({"tile": 4}, "tile is 4: give a whole number of 16 or more"),
        ({"guidance_scale": 7}, "unknown setting 'guidance_scale': did you mean 'guidance'?"),
        ({"num_inference_steps": 7}, "unknown setting 'num_inference_steps': did you mean 'steps'?"),
        ({"negativ_prompt": "x"}, "unknown setting 'negativ_prompt': did you mean 'negative_prompt'?"),
        ({"edit": ()}, f"unknown setting 'edit': the choices are {', '.join(NAMES)}"),
    ],
)
def test_mistakes_are_said(pipe: Pipeline, options: dict, message: str) -> None:
    for call in (lambda: Settings(**options), lambda: pipe("a cat", **options), lambda: pipe.start("a cat", **options)):
        assert sentence_of(call) == message


def test_samplers_are_known_without_pytorch() -> None:
    assert sorted(OWN_SAMPLERS) == sorted(SAMPLERS)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_is_a_setting(sampler: str) -> None:
    assert Settings(sampler=sampler).sampler == sampler
    assert sampler.removesuffix("_karras") in field_docs(Settings)["sampler"]


def test_numpys_numbers_are_numbers() -> None:
    settings = Settings(seed=np.int64(3), steps=np.int32(4), guidance=np.float32(2.5))
    assert (settings.seed, settings.steps, settings.guidance) == (3, 4, 2.5)
    assert type(settings.guidance) is float


def test_settings_are_passed_on_as_keywords(pipe: Pipeline) -> None:
    settings = Settings(steps=2, seed=3, guidance=2, control=(), negative_prompt="blue")
    assert dict(settings) == {"steps": 2, "seed": 3, "guidance": 2.0, "negative_prompt": "blue"}
    assert Settings(**settings) == settings
    assert repr(settings) == "Settings(negative_prompt='blue', seed=3, steps=2, guidance=2.0)"
    one, other = (
        pipe("a red circle", **settings),
        pipe("a red circle", steps=2, seed=3, guidance=2, negative_prompt="blue"),
    )
    assert torch.equal(one.latents, other.latents)
    image = np.zeros((64, 64, 3), np.uint8)
    assert "\n" not in repr(EditSettings(init_image=image, reweight={"red": 2.0}))
    assert "0, 0" not in repr(Settings(init_image=image, latents=torch.zeros(1, 4, 8, 8), trace=Trace()))


def test_what_goes_unsaid_is_filled_in_from_what_a_model_recommends() -> None:
    recommended = Settings(steps=9, guidance=2.0, sampler="ddim", negative_prompt="blurred")
    filled = Settings(steps=4, seed=1).filled(recommended)
    assert dict(filled) == {"steps": 4, "seed": 1, "guidance": 2.0, "sampler": "ddim", "negative_prompt": "blurred"}
    assert Settings().filled(recommended) == recommended


@pytest.mark.parametrize(("method", "settings"), [("__call__", Settings), ("start", Settings), ("edit", EditSettings)])
def test_help_and_signature_list_every_setting(method: str, settings: type) -> None:
    function = getattr(Pipeline, method)
    names = [field.name for field in fields(settings)]
    signature = inspect.signature(function)
    assert [name for name in signature.parameters if name in names] == list(inspect.signature(settings).parameters)
    assert set(names) <= set(signature.parameters)
    documented = field_docs(settings)
    assert list(documented) == names
    shown = pydoc.plain(pydoc.render_doc(function))
    for name, text in documented.items():
        assert f"{name}: {text[:20]}" in shown
        assert "\n" not in text
        assert text.endswith(".")


def test_settings_are_given_by_name(pipe: Pipeline) -> None:
    with pytest.raises(UsageError, match="settings are given by name, as in steps=20"):
        pipe("a red circle", 20)
    for call in (lambda: pipe(), lambda: pipe.start(), lambda: pipe(steps=2)):
        assert sentence_of(call) == "prompt is missing: say in a few words what to paint"
    assert sentence_of(lambda: pipe.edit("a cat")) == "to is missing: say in a few words what to paint"
    named = pipe.start(prompt="a red circle", steps=1, seed=0)
    assert named.settings[0]["prompt"] == "a red circle"


# A new option is one more field.


@dataclass(frozen=True, kw_only=True, repr=False)
class WithEta(Settings):
    """Settings with one more."""

    eta: Annotated[float, Interval(ge=0, le=1)] = 0.0
    """Share of fresh noise in each step, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class Options(PaintingOptions):
    """Options of a made-up command."""

    settings: Annotated[dict[str, Any], SettingsOf(WithEta)] = field(default_factory=dict)


class Painter:
    """Something that takes settings."""

    @takes_settings(WithEta)
    def paint(self, prompt: str, settings: WithEta) -> WithEta:
        """Paint."""
        return settings


def test_an_option_is_one_more_field() -> None:
    painter = Painter()
    assert painter.paint("a cat", eta=1, steps=3) == WithEta(eta=1.0, steps=3)
    assert sentence_of(lambda: painter.paint("a cat", eta=2)) == "eta is 2: give a number from 0 to 1"
    assert sentence_of(lambda: painter.paint("a cat", etta=1)) == "unknown setting 'etta': did you mean 'eta'?"
    assert "eta: Share of fresh noise in each step" in (Painter.paint.__doc__ or "")
    assert "eta" in inspect.signature(Painter.paint).parameters
    assert repr(WithEta(eta=0.5)) == "WithEta(eta=0.5)"


def test_an_option_is_on_the_command_line_as_well(capsys: pytest.CaptureFixture[str]) -> None:
    options = parse(Options, "made-up", ["--eta", "0.5", "--steps", "3", "--lora", "x"])
    assert WithEta(**options.settings) == WithEta(eta=0.5, steps=3)
    assert options.lora == ("x",)
    assert "eta" in (sentence_of(lambda: parse(Options, "made-up", ["--eta", "much"])) or "")
    assert sentence_of(lambda: parse(Options, "made-up", ["--etta", "1"])) is not None
    with pytest.raises(SystemExit):
        parse(Options, "made-up", ["--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--eta FLOAT" in shown
    assert "Share of fresh noise in each step" in shown
    for name in NAMES:
        hidden = name in ("latents", "trace", "control")
        assert (f"--{name.replace('_', '-')} " in shown) != hidden


def test_a_function_is_a_guidance_and_is_named_in_the_image(pipe: Pipeline) -> None:
    painting = pipe.start("a red circle", guidance=classifier_free_guidance(3.0), steps=1)
    assert isinstance(painting.settings[0]["guidance"], str)
    assert painting.settings[0]["control"] is True
