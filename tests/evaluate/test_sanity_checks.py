"""The grader's gates, and what a VAE loses."""

from dataclasses import replace

import pytest

from gobelin import scenes
from gobelin.evaluate.intervals import Share
from gobelin.evaluate.sanity_checks import run_sanity_checks
from gobelin.pipeline import Pipeline


def test_instruments_of_an_untrained_vae(trained):
    checks = run_sanity_checks(Pipeline.from_pretrained(trained).vae, scenes.NANO, each=20)
    assert set(checks.renders) == {"single", "two", "relation"}
    assert all(share.value == 1 and share.n == 20 for share in checks.renders.values())
    assert checks.round_trips is not None
    assert all(share.value < 0.5 for share in checks.round_trips.values()), "four steps are not a VAE"
    for values in (checks.blurred, checks.noisy):
        one, two, three = values.values()
        assert 1 >= one >= two >= three
        assert three <= 0.75
    held = {gate.name: gate.passed for gate in checks.gates}
    assert held["true renders: two"]
    assert not held["VAE round trips: two"]
    assert held["renders with noise of 0.05, 0.1, 0.2"]


def test_gates_fail_where_they_should_and_need_no_vae():
    checks = run_sanity_checks(None, scenes.CORE, each=10)
    assert set(checks.renders) == {"single", "two", "relation", "count"}
    assert (checks.round_trips, checks.psnr) == (None, None)
    assert all(gate.passed for gate in checks.gates)
    blind = replace(checks, renders={"single": Share.of([True] * 98 + [False] * 2)}, noisy={"1": 0.1, "2": 0.2})
    assert [gate.passed for gate in blind.gates] == [False, True, False]
    assert blind.to_json()["gates"][0]["required"] == "≥ 0.995"


def test_the_shipped_vae_keeps_what_matters():
    pipe = Pipeline.from_pretrained()
    assert pipe.model.world is not None
    checks = run_sanity_checks(pipe.vae, scenes.WORLDS[pipe.model.world], each=15)
    assert checks.round_trips is not None
    assert checks.psnr is not None
    assert Share.mean(list(checks.round_trips.values())).value >= 0.97
    assert checks.psnr >= 30


@pytest.mark.slow
def test_the_gates_of_every_world_hold():
    for world in scenes.WORLDS.values():
        for gate in run_sanity_checks(None, world, each=400).gates:
            assert gate.passed, (world.name, gate)
