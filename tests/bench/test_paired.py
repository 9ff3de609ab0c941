"""Ratios of neighbours, the spread of equals, and verdicts, on times that are made up."""

import random

import pytest

from gobelin.bench.paired import Ratio, equals_spread, paired_ratio, take_turns, timed, verdict


def made_up(factor: float, rounds: int = 15, noise: float = 0.05, seed: int = 0) -> list[float]:
    """Seconds of a contender: the machine is up to twice as slow in some rounds, the same ones for all."""
    weather = [1 + random.Random(number).random() for number in range(rounds)]
    own = random.Random(seed)
    return [factor * slow * (1 + own.uniform(-noise, noise)) for slow in weather]


def test_ratios_are_those_of_neighbours():
    ratio = paired_ratio([2.0, 20.0, 3.0, 4.0, 50.0], [1.0, 10.0, 1.0, 4.0, 10.0])  # 2, 2, 3, 1, 5
    assert ratio == Ratio(median=2.0, low=2.0, high=3.0)
    assert str(ratio) == "2.000 (2.000–3.000)"


def test_weather_that_all_share_is_no_difference():
    one = made_up(1.0, noise=0.0)
    assert paired_ratio(made_up(1.3, noise=0.0), one).low == pytest.approx(1.3)
    assert paired_ratio(made_up(1.3, noise=0.0), one).high == pytest.approx(1.3)


def test_the_spread_of_equals_counts_either_way():
    assert equals_spread([1.0, 1.0, 1.0], [1.0, 1.0, 1.0]) == 1.0
    slower = equals_spread([1.0] * 20, [1.25] * 20)
    assert slower == pytest.approx(1.25)
    assert equals_spread([1.25] * 20, [1.0] * 20) == pytest.approx(slower)


def test_one_round_of_many_does_not_widen_the_spread():
    assert equals_spread([1.0] * 30, [1.0] * 29 + [9.0]) == 1.0
    assert equals_spread([1.0] * 3, [1.0] * 2 + [9.0]) > 2


@pytest.mark.parametrize("seed", range(20))
def test_equal_contenders_are_level(seed):
    first, again, other = (made_up(1.0, seed=3 * seed + number) for number in range(3))
    assert verdict(paired_ratio(other, first), equals_spread(first, again)) == "level"


@pytest.mark.parametrize(("factor", "said"), [(2.0, "slower"), (0.5, "faster"), (1.3, "slower"), (1 / 1.3, "faster")])
def test_contenders_that_differ_are_not(factor, said):
    first, again, other = made_up(1.0, seed=1), made_up(1.0, seed=2), made_up(factor, seed=3)
    assert verdict(paired_ratio(other, first), equals_spread(first, again)) == said


def test_nothing_inside_of_the_spread_of_equals_is_claimed():
    first, again, other = made_up(1.0, noise=0.0), made_up(1.2, noise=0.0), made_up(1.15, noise=0.0)
    assert verdict(paired_ratio(other, first), equals_spread(first, again)) == "level"
    assert verdict(paired_ratio(other, first), 1.1) == "slower"


def test_turns_go_to_and_fro():
    order = []

    def turn(name):
        def take():
            order.append(name)
            return float(len(order))

        return take

    taken = take_turns({name: turn(name) for name in "ABC"}, rounds=3)
    assert "".join(order) == "ABC" + "CBA" + "ABC"
    assert taken == {"A": [1, 6, 7], "B": [2, 5, 8], "C": [3, 4, 9]}


def test_rounds_end_when_there_are_enough():
    taken = take_turns({"A": lambda: 1.0}, rounds=100, enough=lambda done: done == 4)
    assert len(taken["A"]) == 4


def test_a_time_is_that_of_one_call():
    calls = []
    assert timed(lambda: calls.append(1), 5) >= 0
    assert len(calls) == 5
