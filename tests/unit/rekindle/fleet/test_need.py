# SPDX-License-Identifier: Apache-2.0
"""Test the distribution of the replicas that are needed."""

import math
import random

import numpy as np
import pytest

from rekindle.fleet.need import Need, quantile_of_sum
from tests.samples.fleet import model


@pytest.mark.parametrize("rate", [0.0, 0.01, 1.0, 40.0, 2000.0])
def test_probabilities_add_up_and_have_the_mean_of_littles_law(rate: float) -> None:
    need = Need.of(model(demand=[rate], concurrency=1), 0)
    assert math.isclose(sum(need.of_time), 1.0)
    assert math.isclose(sum(need.of_requests), 1.0)
    assert math.isclose(need.above(0), rate * 5.0, rel_tol=1e-6, abs_tol=1e-9)


def test_what_requests_see_is_what_time_sees_and_themselves() -> None:
    need = Need.of(model(demand=[1.0], concurrency=1), 0)
    assert need.of_requests[1:] == pytest.approx(need.of_time)


def test_replicas_that_serve_several_at_once_are_fewer() -> None:
    one, four = (Need.of(model(demand=[4.0], concurrency=each), 0) for each in (1, 4))
    assert one.quantile(0.99) == 32
    assert four.quantile(0.99) == 8


def test_no_more_than_the_promised_share_finds_all_replicas_full() -> None:
    need = Need.of(model(demand=[4.0]), 0)
    enough = need.quantile(0.99)
    assert need.late_share(enough) <= 0.01 < need.late_share(enough - 1)


def test_a_burst_counts_by_its_requests() -> None:
    calm, burst = (Need.of(model(demand=[each]), 0) for each in (0.1, 10.0))
    both = Need.of(model(demand=[0.1] * 59 + [10.0], step_seconds=60.0), 0)
    assert both.quantile(0.99) > calm.quantile(0.99)
    rest = 1 - 5.9 / 15.9  # of the requests are in a sixtieth of the time
    assert abs(burst.quantile(0.5) - both.quantile(1 - rest / 2)) <= 1


def test_an_hour_takes_its_own_part_of_the_demand_which_begins_anew() -> None:
    day = model(demand=[0.0, 5.0])
    assert Need.of(day, 0).most == 0
    assert Need.of(day, 1).of_time == Need.of(day, 3).of_time
    assert Need.of(day, 0).quantile(0.99) == 0


@pytest.mark.parametrize("theta", [1e-2, 0.5, 3.0])
def test_the_room_for_all_suffices_but_for_the_share(theta: float) -> None:
    needs = [Need.of(model(demand=[rate]), 0) for rate in (0.05, 0.2, 1.0, 2.0)]
    base, share = [0, 0, 1, 2], 0.05
    room = sum(each.effective(number, 1.0, theta) for each, number in zip(needs, base, strict=True))
    room += math.log(1 / share) / theta
    chance = np.random.default_rng(1)
    total = np.zeros(100_000)
    for each, number in zip(needs, base, strict=True):
        drawn = chance.choice(len(each.of_time), size=len(total), p=each.of_time)
        total += np.maximum(drawn - number, 0)
    assert (total > room).mean() <= share
    exact = quantile_of_sum([(each, number, 1.0) for each, number in zip(needs, base, strict=True)], share)
    assert exact == np.quantile(total, 1 - share, method="inverted_cdf")
    assert exact <= room


def test_effective_bandwidth_is_between_the_mean_and_the_most() -> None:
    chance = random.Random(1)
    for _ in range(50):
        need = Need.of(model(demand=[chance.uniform(0, 50)]), 0)
        base, theta = chance.randrange(10), 10 ** chance.uniform(-3, 4)
        found = need.effective(base, 0.25, theta)
        assert need.above(base) * 0.25 - 1e-9 <= found <= max(0, need.most - base) * 0.25 + 1e-9
