"""Contenders compute the same thing: traced passes, training steps, our engines. Each at the size of a nano model."""

import time
from types import SimpleNamespace

import jaxtyping
import pytest

from gobelin.bench import our_engines, unet_contenders
from gobelin.bench.measure import Limits, measure
from gobelin.bench.rows import find_rows
from gobelin.bench.trace_contenders import LOOK_INTO, trace_workload
from gobelin.bench.training_contenders import train_workload
from gobelin.bench.training_loops import time_steps
from gobelin.bench.unet_contenders import unet_workload
from gobelin.bench.workloads import refuse_unknown_contenders
from gobelin.engines import ENGINES
from gobelin.engines.eager import EagerEngine
from gobelin.engines.int8_weights import can_multiply_int8

ONE = Limits(rounds=1)
PEERS = ("diffusers", "peft")


def test_passes_are_the_same_traced_or_not():
    measured = measure(trace_workload("nano", 16, "float32"), "float32", ONE, PEERS, peak_side=64)
    assert measured["failed"] == {}
    ours = measured["contenders"]
    assert list(ours) == ["gobelin", "gobelin, trace=True", 'gobelin, trace="sharp"', "diffusers", LOOK_INTO]
    assert [one["error"] for one in ours.values()] == pytest.approx([0] * 5, abs=1e-5)
    assert ours["gobelin, trace=True"]["against"]["name"] == "gobelin"


@pytest.mark.parametrize("lora", [False, True])
def test_training_begins_at_the_same_loss(lora):
    jaxtyping.config.update(
        "jaxtyping_disable", True
    )  # diffusers' network stands in for ours; the fixture puts it back
    made = train_workload("nano", 16, 2, "float32", lora=lora).limited_to(["diffusers"])
    measured = measure(made, "float32", ONE, PEERS)
    assert measured["failed"] == {}
    assert measured["contenders"]["diffusers"]["error"] < 1e-5


def test_a_loop_alone_is_timed_after_its_first_steps():
    turns = []

    def loop(turn):
        while True:
            turn()
            turns.append(1)
            time.sleep(1.0 if len(turns) <= 2 else 0.01)

    assert 0.01 <= time_steps(loop, warm=2, count=3) < 0.5
    assert len(turns) == 5


def test_an_engine_of_ours_is_a_contender(monkeypatch):
    changed = SimpleNamespace(by=1.0)

    def run_by(engine="eager", unet=None):
        if engine == "eager":
            return SimpleNamespace(unet=unet)
        return SimpleNamespace(unet=lambda *inputs: changed.by * unet(*inputs))

    monkeypatch.setattr(unet_contenders, "other_engines", lambda: ("made-up",))
    monkeypatch.setattr(unet_contenders, "run_by", run_by)
    made = unet_workload("nano", 16, 1, "float32").limited_to(["gobelin, made-up"])
    assert measure(made, "float32", ONE, (), 64)["contenders"]["gobelin, made-up"]["error"] == 0
    changed.by = 1.01
    assert "gobelin, made-up" in measure(made, "float32", ONE, (), 64)["failed"]


@pytest.mark.skipif(not can_multiply_int8(), reason="needs a CPU that multiplies int8 and bfloat16")
def test_int8_is_a_contender_in_bfloat16_whose_error_is_stated():
    made = unet_workload("nano", 16, 2, "bfloat16").limited_to(["gobelin, int8"])
    measured = measure(made, "bfloat16", ONE, (), 64)
    assert measured["failed"] == {}
    ours = measured["contenders"]
    assert ours["gobelin"]["error"] < ours["gobelin, int8"]["error"] < 0.1
    assert "gobelin, int8" not in {one.name for one in unet_workload("nano", 16, 2, "float32").contenders}
    refuse_unknown_contenders(["gobelin, int8"], find_rows(["unet-64"]))


def test_engines_beside_the_default_one_are_those_of_the_package():
    assert {our_engines.DEFAULT, our_engines.ROUNDED, *our_engines.other_engines()} == set(ENGINES)
    assert our_engines.DEFAULT not in our_engines.other_engines()
    assert EagerEngine.name == our_engines.DEFAULT
