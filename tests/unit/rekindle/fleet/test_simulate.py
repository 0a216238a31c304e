# SPDX-License-Identifier: Apache-2.0
"""Test the simulation against what queueing theory says, and the plan against other policies."""

import math
import statistics

import pytest

from rekindle.fleet import plan
from rekindle.fleet.estimate import estimate
from rekindle.fleet.policies import ScalingPolicy, planned, rivals
from rekindle.fleet.simulate import simulate
from tests.samples.fleet import GIB, diurnal, fleet, model, node_class


def warm(count: int, periods: int = 24) -> ScalingPolicy:
    return ScalingPolicy(name="warm", warm=[{"chat": count}] * periods)


def test_requests_come_at_the_rate_of_their_time() -> None:
    day = fleet(model(demand=[0.0, 2.0]), periods=24)
    outcome = simulate(day, warm(20), 1)
    assert outcome.requests == pytest.approx(12 * 3600 * 2, abs=4 * math.sqrt(12 * 3600 * 2))


def test_waits_are_those_of_erlangs_formula() -> None:
    """M/M/c with c = 8 slots and a load of 6: Erlang C gives the share that waits, and how long."""
    servers, load, service = 8, 6.0, 5.0
    day = fleet(
        model(demand=[load / service], concurrency=8, gpus=4),
        periods=50,
        wait=0.0,
        classes=[node_class(nodes=1, boot_seconds=0.0)],
    )
    outcomes = [simulate(day, warm(1, 50), seed) for seed in range(4)]
    blocked = load**servers / math.factorial(servers) * servers / (servers - load)
    waits = blocked / (sum(load**k / math.factorial(k) for k in range(servers)) + blocked)
    assert statistics.fmean(each.late_share for each in outcomes) == pytest.approx(waits, rel=0.05)
    p99 = service / (servers - load) * math.log(waits / 0.01)
    assert statistics.fmean(each.p99_seconds for each in outcomes) == pytest.approx(p99, rel=0.1)


def test_the_same_seed_gives_the_same_outcome_and_another_does_not() -> None:
    day = diurnal(4, 20)
    policy = planned(plan.make(day))
    assert simulate(day, policy, 7) == simulate(day, policy, 7) != simulate(day, policy, 8)


def test_a_request_waits_for_the_start_of_a_replica() -> None:
    day = fleet(model(demand=[0.002], concurrency=1), classes=[node_class(boot_seconds=0.0)], periods=24)
    fixed = ScalingPolicy(
        name="ready",
        warm=[{}] * 24,
        classes=[{"chat": "l4"}] * 24,
        copies=[{"chat": 1}] * 24,
        nodes=[{"l4": 1}] * 24,
        idle_seconds=10.0,
    )
    ready = simulate(day, fixed, 1)
    assert ready.p50_seconds == 1.0
    assert ready.absent_starts == 0
    scaled = [node_class(boot_seconds=0.0)]
    rare = fleet(model(demand=[0.0002], service_seconds=0.1), classes=scaled, periods=24)
    absent = simulate(rare, ScalingPolicy(name="absent", warm=[{}] * 24, idle_seconds=1.0), 1)
    assert absent.p50_seconds == 30.0  # a node that was switched on for it has no image
    assert absent.cost < ready.cost


def test_the_least_recently_used_gives_way() -> None:
    small = [node_class(nodes=1, gpus=1, boot_seconds=0.0)]
    two = fleet(model("a", [0.01]), model("b", [0.01]), classes=small, periods=24)
    outcome = simulate(two, ScalingPolicy(name="lru", warm=[{}] * 24, evicts=True), 1)
    assert outcome.starts > 200  # they take turns
    assert outcome.late_share < 0.9


def test_a_disk_holds_only_so_many_images() -> None:
    def absent(disk: int) -> int:
        small = [node_class(nodes=1, gpus=1, boot_seconds=0.0, disk_bytes=disk * GIB)]
        two = fleet(model("a", [0.01]), model("b", [0.01]), classes=small, periods=24)
        return simulate(two, ScalingPolicy(name="lru", warm=[{}] * 24, evicts=True), 1).absent_starts

    assert absent(20) == 2
    assert absent(10) > 200


def test_a_node_that_fails_loses_its_replicas_and_requests_wait_again() -> None:
    fragile = [node_class(nodes=2, hours_between_failures=2.0, boot_seconds=0.0)]
    day = fleet(model(demand=[1.0]), classes=fragile, periods=24)
    outcome = simulate(day, warm(2), 1)
    solid = [node_class(nodes=2, boot_seconds=0.0)]
    sturdy = simulate(fleet(model(demand=[1.0]), classes=solid, periods=24), warm(2), 1)
    assert outcome.failures > 5
    assert outcome.late_share > sturdy.late_share


def test_a_plan_costs_less_than_what_it_is_compared_with() -> None:
    """On a day with bursts: at most half of all warm, and less than any keep-alive of the same service."""
    day = diurnal(12, 60)
    made = plan.make(day)
    own = simulate(day, planned(made), 1)
    assert own.late_share <= day.service.late_share
    # Nodes boot ahead of their hour, and stay on until their last replica is idle.
    assert made.cost <= own.cost <= 1.1 * made.cost
    others = {each.name: simulate(day, each, 1) for each in rivals(day, made, [30, 60, 120, 300, 600])}
    assert own.cost <= 0.5 * others["all-warm"].cost
    kept = [
        each.cost
        for name, each in others.items()
        if name.startswith("keep") and each.p99_seconds <= own.p99_seconds and each.late_share <= 0.01
    ]
    assert own.cost < min(kept)


def test_estimates() -> None:
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half_width == pytest.approx(4.303 / math.sqrt(3))
    assert estimate([1.0]).half_width == math.inf
    assert estimate([0.0, 1.0] * 10).half_width == pytest.approx(2.093 * 0.513 / math.sqrt(20), rel=0.01)
