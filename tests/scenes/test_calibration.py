from dataclasses import replace

import numpy as np
import pytest

from gobelin.scenes import NANO, RICH, Calibration, World, calibrate, grade, sample
from gobelin.scenes import calibration as module
from gobelin.scenes.blobs import BLOBS, blob
from gobelin.scenes.calibration import add_pixel_noise, blur, read_exactly


@pytest.fixture(scope="module")
def measured() -> Calibration:
    return calibrate(NANO, 40, through=lambda image: blur(image, 0.5))


def test_the_gates_hold(measured):
    for shares in (measured.renders, measured.round_trips):
        assert set(shares) == set(NANO.categories)
        assert min(shares.values()) == 1
    assert min(*measured.blurred.values(), *measured.noisy.values()) >= 0.95
    assert measured.swapped == {"two": 0.0, "relation": 0.0}
    assert measured.shuffled == pytest.approx(measured.chance, abs=0.01)
    assert measured.shuffled < 0.2


def test_the_ladders_fall(measured):
    for ladder in (measured.blur_ladder, measured.noise_ladder):
        shares = list(ladder.values())
        assert shares[0] == 1
        assert shares[-1] < 0.5
        assert shares == sorted(shares, reverse=True)


def test_blobs_are_rarely_called_a_shape(measured):
    assert set(measured.blobs) == set(BLOBS)
    assert max(measured.blobs[kind] for kind in ("curve", "half", "bite", "union")) < 0.25


def test_a_blob_that_is_a_shape_is_one(monkeypatch):
    """So that a low share is the grader's doing, and not that of the pictures."""
    monkeypatch.setitem(module.BLOBS, "curve", lambda rng, world: lambda x, y: np.hypot(x, y) - 0.88)
    assert module._looks_like_shape(NANO, "curve", 0)


@pytest.mark.parametrize("kind", BLOBS)
def test_blobs_are_single_things_that_differ(world: World, kind):
    one, other = (blob(np.random.default_rng(seed), world, kind) for seed in (1, 2))
    assert (one.shape, one.dtype) == ((64, 64, 3), np.uint8)
    assert not np.array_equal(one, other)
    assert np.array_equal(one, blob(np.random.default_rng(1), world, kind))
    assert len(grade(one, world)) >= 1


def test_a_grader_that_sees_nothing_fails(monkeypatch):
    monkeypatch.setattr(module, "grade", lambda image, world: [])
    measured = calibrate(NANO, 3)
    assert set(measured.renders.values()) == {0.0}
    assert measured.round_trips == {}


def test_reading_is_exact():
    made = sample(1, 0, replace(NANO, mix=(("two", 1.0),)))
    seen = grade(made.image, NANO)
    assert read_exactly(made, seen)
    assert not read_exactly(made, seen[:1])
    assert not read_exactly(made, [*seen, seen[0]])
    assert not read_exactly(made, [replace(seen[0], colour="pink"), seen[1]])
    assert read_exactly(made, [replace(thing, background="sand") for thing in seen])


def test_reading_a_rich_scene_is_reading_all_of_it():
    made = sample(1, 0, replace(RICH, mix=(("two", 1.0),)))
    seen = grade(made.image, RICH)
    assert read_exactly(made, seen)
    other = {"texture": "unknown", "size": "tall", "background": "plaid", "shape": "cube", "colour": "mauve"}
    for field, value in other.items():
        assert not read_exactly(made, [replace(seen[0], **{field: value}), seen[1]])


def test_spoiling_is_by_the_amount_asked_for():
    grey = np.full((64, 64, 3), 128, np.uint8)
    assert (add_pixel_noise(grey, 0.1).astype(float) - 128).std() == pytest.approx(25.5, rel=0.05)
    edge = grey.copy()
    edge[:, 32:] = 200
    assert np.abs(np.diff(blur(edge, 2).astype(float)[32, :, 0])).max() == pytest.approx(72 * 0.2, rel=0.1)
    assert np.array_equal(blur(edge, 0), edge)
