# SPDX-License-Identifier: Apache-2.0
"""Policies of a fleet: when replicas and nodes are switched on and off."""

import math
from collections.abc import Iterator, Mapping, Sequence

from msgspec import Struct

from rekindle.fleet.plan import FleetPlan
from rekindle.fleet.problem import Fleet


class ScalingPolicy(Struct, frozen=True, kw_only=True):
    """When replicas and nodes are switched on and off.

    `warm` replicas of each model run in each period, of which `classes` names the class. A replica beyond
    them ends when it was idle for `idle_seconds`; `evicts` says that one without anything to do ends when
    another model needs its room. `nodes` are on in each period, by class; None scales them: on when they
    are needed, off when they are empty.
    """

    name: str
    warm: Sequence[Mapping[str, int]]
    classes: Sequence[Mapping[str, str]] = ()
    nodes: Sequence[Mapping[str, int]] | None = None
    copies: Sequence[Mapping[str, int]] = ()
    idle_seconds: float = math.inf
    evicts: bool = False


def planned(plan: FleetPlan, idle_seconds: float = 10.0) -> ScalingPolicy:
    """Return the policy of a plan: replicas beyond those that run hibernate again after a while."""
    return ScalingPolicy(
        name="plan",
        warm=[{each.model: each.running for each in period.models} for period in plan.periods],
        classes=[{each.model: each.node_class for each in period.models} for period in plan.periods],
        copies=[{each.model: each.copies for each in period.models} for period in plan.periods],
        nodes=[period.nodes for period in plan.periods],
        idle_seconds=idle_seconds,
    )


def rivals(fleet: Fleet, plan: FleetPlan, keep_seconds: Sequence[float]) -> Iterator[ScalingPolicy]:
    """Yield policies to compare with: all warm, keep-alive with several times, and least recently used."""
    most: dict[str, int] = {}
    for period in plan.periods:
        for each in period.models:
            most[each.model] = max(most.get(each.model, 0), each.running + each.ready, 1)
    none: list[Mapping[str, int]] = [{}] * fleet.periods
    yield ScalingPolicy(name="all-warm", warm=[most] * fleet.periods)
    for seconds in keep_seconds:
        yield ScalingPolicy(name=f"keep-{seconds:.0f}s", warm=none, idle_seconds=seconds)
    yield ScalingPolicy(name="lru", warm=none, evicts=True)
