# SPDX-License-Identifier: Apache-2.0
"""Test plans by what they decide."""

import pytest

from rekindle.fleet import plan
from rekindle.fleet.need import Need
from rekindle.fleet.problem import StartSeconds
from tests.samples.fleet import GIB, diurnal, fleet, model, node_class

SLOW = {"l4": StartSeconds(ready=3.0, absent=30.0)}


def test_what_starts_in_time_lies_ready_and_what_does_not_runs() -> None:
    quick, slow = model("quick", [0.01]), model("slow", [0.01], starts=SLOW)
    made = plan.make(fleet(quick, slow))
    by_name = {each.model: each for each in made.periods[0].models}
    enough = Need.of(quick, 0).quantile(0.995)
    assert by_name["quick"].running + by_name["quick"].ready == enough
    assert (by_name["slow"].running, by_name["slow"].ready) == (enough, 0)


def test_seldom_asked_models_share_the_room_that_is_kept() -> None:
    models = [model(f"m{number}", [0.005]) for number in range(40)]
    shared = plan.make(fleet(*models)).cost
    apart = plan.make(fleet(*(model(each.name, each.demand, starts=SLOW) for each in models))).cost
    assert apart == 20.0  # each runs on a GPU of its own: ten nodes
    assert shared <= 0.4 * apart


def test_nodes_follow_the_demand() -> None:
    made = plan.make(fleet(model(demand=[0.1, 20.0], starts=SLOW), periods=2))
    night, day = (period.nodes["l4"] for period in made.periods)
    assert night == 1
    assert day >= 26 / 4
    assert made.cost == 2.0 * (night + day)


def test_the_cheaper_class_is_taken_if_it_starts_in_time() -> None:
    classes = [node_class("l4"), node_class("old", price=0.5)]
    both = {"l4": StartSeconds(ready=1.0, absent=30.0), "old": StartSeconds(ready=1.9, absent=60.0)}
    made = plan.make(fleet(model(starts=both), classes=classes))
    assert made.periods[0].models[0].node_class == "old"
    assert made.periods[0].nodes["l4"] == 0


def test_memory_limits_where_no_gpu_does() -> None:
    classes = [node_class(gpus=0, memory_bytes=20 * GIB)]
    made = plan.make(fleet(model(demand=[4.0], gpus=0, starts=SLOW), classes=classes))
    running = made.periods[0].models[0].running
    assert made.periods[0].nodes["l4"] == -(-running // 6)  # 8 GiB are shared, 2 are each one's own
    assert made.bottlenecks[0].periods.keys() <= {"memory"}


def test_images_that_lie_ready_take_disk() -> None:
    classes = [node_class(disk_bytes=30 * GIB)]
    models = [model(f"m{number}", [0.0001]) for number in range(9)]
    made = plan.make(fleet(*models, classes=classes))
    assert made.periods[0].nodes["l4"] == 3


def test_nodes_that_are_missing_are_told_and_what_another_would_save() -> None:
    short = plan.make(fleet(model(demand=[20.0], starts=SLOW), classes=[node_class(nodes=5)]))
    assert short.missing == {"l4": short.periods[0].nodes["l4"] - 5}
    cheap = [node_class("l4", nodes=2, price=1.0), node_class("big", price=9.0)]
    both = dict.fromkeys(("l4", "big"), StartSeconds(ready=3.0, absent=30.0))
    made = plan.make(fleet(model(demand=[8.0], starts=both), classes=cheap))
    assert not made.missing
    assert {each.node_class: each.saving > 0 for each in made.bottlenecks}["big"] is False


@pytest.mark.parametrize("models", [6, 30])
def test_no_plan_is_far_from_its_bound(models: int) -> None:
    made = plan.make(diurnal(models, 200))
    assert made.bound <= made.program_cost
    assert made.cost <= made.program_cost
    assert made.gap <= 0.02
    assert not made.missing


def test_a_large_program_is_decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = plan.make(diurnal(6, 60, classes=2))
    monkeypatch.setattr(plan, "_WHOLE_COLUMNS", 0)
    parts = plan.make(diurnal(6, 60, classes=2))
    assert 0.9 * whole.program_cost <= parts.program_cost <= 1.3 * whole.program_cost
    assert parts.bound <= whole.program_cost
