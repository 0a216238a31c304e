# SPDX-License-Identifier: Apache-2.0
"""Fleets for tests."""

import math
import random
from collections.abc import Sequence

from rekindle.fleet.problem import Fleet, NodeClass, ServedModel, Service, StartSeconds

GIB = 1 << 30


def node_class(name: str = "l4", **changes: object) -> NodeClass:
    facts: dict[str, object] = {
        "nodes": 50,
        "price": 2.0,
        "memory_bytes": 128 * GIB,
        "disk_bytes": 2000 * GIB,
        "gpus": 4,
        "boot_seconds": 120.0,
    }
    return NodeClass(name=name, **{**facts, **changes})  # type: ignore[arg-type]


def model(name: str = "chat", demand: Sequence[float] = (1.0,), **changes: object) -> ServedModel:
    facts: dict[str, object] = {
        "image_bytes": 10 * GIB,
        "own_bytes": 2 * GIB,
        "shared_bytes": 8 * GIB,
        "gpus": 1,
        "concurrency": 4,
        "service_seconds": 5.0,
        "starts": {"l4": StartSeconds(ready=1.0, absent=30.0)},
    }
    return ServedModel(name=name, demand=tuple(demand), **{**facts, **changes})  # type: ignore[arg-type]


def fleet(
    *models: ServedModel, classes: Sequence[NodeClass] = (), periods: int = 1, wait: float = 2.0
) -> Fleet:
    return Fleet(
        service=Service(wait_seconds=wait),
        classes=tuple(classes) or (node_class(),),
        models=models,
        periods=periods,
    )


def diurnal(models: int, nodes: int, *, classes: int = 1, seed: int = 1) -> Fleet:
    """A day of models whose demand rises and falls, each at its own time, with bursts of ten minutes."""
    chance = random.Random(seed)
    kinds = [
        node_class(f"c{index}", nodes=nodes // classes, price=(2.0, 4.2, 1.1)[index], gpus=(4, 8, 2)[index])
        for index in range(classes)
    ]
    made = []
    for number in range(models):
        peak, noon = chance.choice([0.02, 0.05, 0.2, 1.0, 3.0]), chance.uniform(0, 24)
        demand = [
            peak * (0.1 + 0.9 * max(0.0, math.sin((minute / 60 - noon) * math.tau / 24)) ** 2)
            for minute in range(24 * 60)
        ]
        for _ in range(6):
            begin = chance.randrange(len(demand))
            for minute in range(begin, min(len(demand), begin + 10)):
                demand[minute] = min(demand[minute] * 3, peak * 3)
        made.append(
            model(
                f"m{number}",
                demand,
                step_seconds=60.0,
                concurrency=chance.choice([4, 8]),
                service_seconds=chance.choice([2.0, 5.0, 10.0]),
                starts={
                    each.name: StartSeconds(ready=chance.choice([1.0, 1.5, 3.0]), absent=40.0)
                    for each in kinds
                },
            )
        )
    return fleet(*made, classes=kinds, periods=24)
