"""Measurement of a row: what is compared, refused, left out, and counted."""

import pytest
import torch

from gobelin.bench import measure as measuring
from gobelin.bench import paired
from gobelin.bench.measure import Limits, measure, relative_rms
from gobelin.bench.peers import PEERS, Peer
from gobelin.bench.unet_contenders import UNetPass, unet_workload
from gobelin.bench.workload import Contender, Workload, count_operations
from gobelin.errors import UsageError

RIGHT = torch.linspace(-1, 1, 100)
LIMITS = Limits(rounds=5)


class Clock:
    """A clock that only contenders move, so that no test depends on how busy the machine is."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()


@pytest.fixture(autouse=True)
def _clock(monkeypatch):
    monkeypatch.setattr(paired, "perf_counter", CLOCK)
    monkeypatch.setattr(measuring, "perf_counter", CLOCK)


def taking(seconds: float, result: torch.Tensor = RIGHT):
    """What prepares a contender whose call takes that long and returns that result."""

    def call():
        CLOCK.now += seconds
        return result

    return lambda: call


def workload(*contenders: Contender) -> Workload:
    first = Contender(name="gobelin", prepare=taking(0.004))
    return Workload(contenders=[first, *contenders], reference=lambda: RIGHT)


def test_the_error_is_relative_to_the_reference():
    assert relative_rms(1.1 * RIGHT, RIGHT) == pytest.approx(0.1, rel=1e-5)
    assert relative_rms(RIGHT, RIGHT) == 0


def test_one_that_is_as_fast_is_level_and_one_that_takes_four_times_as_long_is_not():
    result = measure(
        workload(Contender(name="equal", prepare=taking(0.004)), Contender(name="slow", prepare=taking(0.016))),
        "float32",
        LIMITS,
    )
    assert result["contenders"]["equal"]["verdict"] == "level"
    assert result["contenders"]["slow"]["verdict"] == "slower"
    assert result["contenders"]["slow"]["ratio"]["median"] == pytest.approx(4)
    assert result["contenders"]["gobelin"]["verdict"] is None
    assert result["rounds"] == 5
    assert len(result["contenders"]["slow"]["values"]) == 5


@pytest.mark.parametrize(
    ("result", "why"),
    [
        (1.01 * RIGHT, "it computes something else: its error relative to float32 is 0.01, where 0.001 is allowed"),
        (torch.full((100,), torch.nan), "it computes something else"),
        (RIGHT[:50], "it returns [50], and not [100]"),
    ],
)
def test_one_that_computes_something_else_is_refused(result, why):
    measured = measure(workload(Contender(name="wrong", prepare=taking(0.001, result))), "float32", LIMITS)
    assert list(measured["contenders"]) == ["gobelin"]
    assert why in measured["failed"]["wrong"]


def test_bfloat16_may_round_but_not_compute_something_else():
    measured = measure(
        workload(
            Contender(name="rounded", prepare=taking(0.001, 1.01 * RIGHT)),
            Contender(name="wrong", prepare=taking(0.001, 1.2 * RIGHT)),
        ),
        "bfloat16",
        LIMITS,
    )
    assert list(measured["contenders"]) == ["gobelin", "rounded"]
    assert measured["contenders"]["rounded"]["error"] == pytest.approx(0.01, rel=1e-4)
    assert list(measured["failed"]) == ["wrong"]


def test_one_that_fails_is_left_out_with_its_sentence():
    def broken():
        raise RuntimeError("no compiler\nis there")

    measured = measure(workload(Contender(name="broken", prepare=broken)), "float32", LIMITS)
    assert measured["failed"] == {"broken": "no compiler is there"}
    with pytest.raises(UsageError, match="gobelin cannot be measured: no compiler is there"):
        measure(Workload(contenders=[Contender(name="gobelin", prepare=broken)]), "float32", LIMITS)


def test_a_peer_that_is_not_there_or_not_asked_for_is_passed_over(monkeypatch):
    monkeypatch.setitem(PEERS, "there", Peer(name="there", modules=("json",), distribution="x", install=""))
    monkeypatch.setitem(
        PEERS, "missing", Peer(name="missing", modules=("no_such_module",), distribution="x", install="")
    )
    contenders = [Contender(name=name, peer=name, prepare=taking(0.001)) for name in ("there", "missing")]
    assert list(measure(workload(*contenders), "float32", LIMITS, ["there", "missing"])["contenders"]) == [
        "gobelin",
        "there",
    ]
    assert list(measure(workload(*contenders), "float32", LIMITS, ["missing"])["contenders"]) == ["gobelin"]


def test_a_contender_is_divided_by_its_own_plain_pass_too():
    plain = Contender(name="theirs", prepare=taking(0.004))
    traced = Contender(name="theirs, traced", prepare=taking(0.012), against="theirs")
    against = measure(workload(plain, traced), "float32", LIMITS)["contenders"]["theirs, traced"]["against"]
    assert against["name"] == "theirs"
    assert against["median"] == pytest.approx(3)


def test_what_a_call_reports_is_taken_in_place_of_its_time():
    megabytes = [
        Contender(name=name, prepare=lambda size=size: lambda: size) for name, size in (("a", 10.0), ("b", 30.0))
    ]
    measured = measure(Workload(contenders=megabytes, unit="MB", is_timed=False), "float32", LIMITS)
    assert measured["contenders"]["b"]["ratio"] == {"median": 3.0, "low": 3.0, "high": 3.0}
    assert measured["spread"] == 1.0


def test_rounds_are_fewer_where_time_is_short(monkeypatch):
    measured = measure(workload(), "float32", Limits(rounds=1000, seconds=0.0))
    assert measured["rounds"] == measuring._LEAST


def test_the_share_of_the_peak_is_operations_a_second_by_those_of_a_matrix_product(monkeypatch):
    monkeypatch.setattr(measuring, "_matmul", lambda side, precision: taking(0.002)())
    counted = Workload(contenders=[Contender(name="gobelin", prepare=taking(0.01))], operations=lambda: 10**6)
    measured = measure(counted, "float32", LIMITS, peak_side=64)
    assert measured["peak"] == pytest.approx(2 * 64**3 / 0.002)
    assert measured["contenders"]["gobelin"]["peak_share"] == pytest.approx(10**6 / 0.01 / measured["peak"])
    assert measured["operations"] == 10**6


def test_operations_of_stable_diffusion_are_those_that_are_known():
    run = UNetPass(model="sd15", side=64, batch=1, precision="float32")
    assert run.operations() == pytest.approx(2 * 401.6e9, rel=1e-3)  # multiplications and additions


def test_attention_is_counted():
    from gobelin.attention import attention

    query, key = torch.zeros(1, 2, 10, 8), torch.zeros(1, 2, 7, 8)
    assert count_operations(lambda: attention(query, key, key)) == 2 * 2 * (2 * 10 * 7 * 8)


def test_a_small_unet_beside_diffusers_and_once_with_weights_that_are_not_the_same(monkeypatch):
    monkeypatch.undo()  # a real clock: these move none
    made = unet_workload("nano", 16, 1, "float32").limited_to(["diffusers"])
    measured = measure(made, "float32", Limits(rounds=3), ["diffusers"], peak_side=64)
    assert list(measured["contenders"]) == ["gobelin", "diffusers"]
    assert measured["contenders"]["diffusers"]["error"] < 1e-5

    from gobelin.bench import unet_contenders

    def other(unet):
        theirs = plain(unet)
        with torch.no_grad():
            theirs.conv_out.weight = torch.nn.Parameter(1.05 * theirs.conv_out.weight)
        return theirs

    plain = unet_contenders.diffusers_unet
    monkeypatch.setattr(unet_contenders, "diffusers_unet", other)
    measured = measure(made, "float32", Limits(rounds=3), ["diffusers"], peak_side=64)
    assert "it computes something else" in measured["failed"]["diffusers"]
