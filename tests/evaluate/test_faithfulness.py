"""Scores: intervals, judging what was painted, the state of the instruments."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gobelin import scenes
from gobelin.evaluate import faithfulness
from gobelin.evaluate.faithfulness import Share, check_instruments, contact_sheet, score, shuffled
from gobelin.pipeline import Pipeline


@given(hits=st.integers(0, 60), misses=st.integers(0, 60))
def test_intervals_hold_their_share(hits, misses):
    share = Share.of([True] * hits + [False] * misses)
    assert share.n == hits + misses
    if share.n:
        assert 0 <= share.low <= share.value <= share.high <= 1


def test_an_interval_known_from_the_books():
    share = Share.of([True] * 8 + [False] * 2)  # Wilson's interval for 8 of 10
    assert (share.low, share.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))


@pytest.fixture(scope="module")
def pipe(trained):
    return Pipeline.from_pretrained(trained)


@pytest.fixture
def perfect_painter(monkeypatch):
    """A stand-in for a model: it renders what each prompt asks for."""

    def paint(pipeline, texts, advance=None):
        asked = {p.text: p for task in faithfulness.TASKS for p in scenes.prompts(scenes.NANO, task, "dev", 40)}
        for text in texts:
            yield Image.fromarray(render(asked[text]))

    monkeypatch.setattr(faithfulness, "paint", paint)


def render(prompt):
    places = {
        "left of": ((18, 32), (46, 32)),
        "right of": ((46, 32), (18, 32)),
        "above": ((32, 18), (32, 46)),
        "below": ((32, 46), (32, 18)),
        None: ((18, 18), (46, 46)),
    }[prompt.relation]
    things = tuple(
        scenes.SceneObject(shape=shape or "circle", colour=colour or "red", x=x, y=y, radius=11)
        for (shape, colour), (x, y) in zip(prompt.objects, places, strict=False)
    )
    return scenes.render(scenes.Scene(objects=things, background="paper", relation=prompt.relation, size=64))[0]


def test_a_perfect_painter_scores_one_and_its_shuffled_prompts_chance(perfect_painter, pipe):
    scores, pictures = score(pipe, scenes.NANO, splits=("dev",), limit=40)
    assert [row.task for row in scores] == ["single_object", "two_objects", "position"]
    for row in scores:
        assert row.correct.value == row.colour.value == row.shape.value == row.exact.value == 1
    by_chance = faithfulness.chance(pictures)
    # 40 prompts over 26 combinations: 14 of them are asked for twice.
    assert by_chance["single_object, dev"] == pytest.approx(28 / (40 * 39))
    for row in shuffled(pictures):
        assert row.correct.value <= max(0.1, 2 * by_chance[f"{row.task}, dev"])


def test_a_sheet_frames_what_is_wrong(perfect_painter, pipe):
    _, pictures = score(pipe, scenes.NANO, tasks=("single_object",), splits=("dev",), limit=12)
    sheet = contact_sheet(pictures)
    assert (214, 39, 40) not in sheet.get_flattened_data()
    _, wrong = score(pipe, scenes.NANO, tasks=("single_object",), splits=("dev",), limit=1)
    blank = [faithfulness.Painted(**{**vars(wrong[0]), "verdict": scenes.judge(wrong[0].prompt, [])})]
    assert (214, 39, 40) in contact_sheet(blank).get_flattened_data()


def test_instruments_of_an_untrained_vae(pipe):
    instruments = check_instruments(pipe.vae, scenes.NANO, count=60)
    assert instruments.renders.value >= 0.99
    assert instruments.round_trips.value < 0.5, "four steps of training are not a VAE"
    blurred, noisy = (list(values.values()) for values in (instruments.blurred, instruments.noisy))
    for values in (blurred, noisy):
        assert instruments.renders.value >= values[0] >= values[1] >= values[2]
        assert values[2] < 0.5


def test_the_shipped_vae_keeps_what_matters():
    instruments = check_instruments(Pipeline.from_pretrained().vae, scenes.NANO, count=100)
    assert instruments.round_trips.value >= 0.97
    assert instruments.psnr >= 30


def test_the_shipped_model_paints_single_objects():
    """Far below its published score, far above chance: a broken sampler, tokenizer or weight file fails it."""
    scores, pictures = score(
        Pipeline.from_pretrained(), scenes.NANO, tasks=("single_object",), splits=("dev",), limit=30
    )
    assert scores[0].colour.value >= 0.7
    assert scores[0].shape.value >= 0.6
    assert shuffled(pictures)[0].correct.value <= 0.2
