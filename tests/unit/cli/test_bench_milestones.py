# SPDX-License-Identifier: Apache-2.0
"""The start of a server within a restore is divided by what its log shows, and nothing is lost by that."""

import pytest

from cli._bench_milestones import with_milestones

PHASES = {"start": 0.5, "extract": 1.5, "server": 10.0, "oracle": 0.25}


def divided(**milestones: float) -> dict[str, float]:
    document = {"phases": [{"name": name, "seconds": each} for name, each in PHASES.items()], "bytes": {}}
    found = with_milestones(document, milestones)
    assert found["bytes"] == {}
    return {phase["name"]: phase["seconds"] for phase in found["phases"]}


def test_the_first_milestone_counts_from_the_start_of_rekindle() -> None:
    assert divided(imports=6.0, weights=3.0) == {
        "start": 0.5,
        "extract": 1.5,
        "imports": 4.0,
        "weights": 3.0,
        "ready": 3.0,
        "oracle": 0.25,
    }


def test_without_milestones_it_is_one_phase() -> None:
    assert divided() == PHASES


@pytest.mark.parametrize(
    "milestones", [{"a": 0.0, "b": 1.0}, {"a": 100.0, "b": 5.0}, {"a": 2.0, "b": 10.0}, {"a": 1.0, "b": 99.0}]
)
def test_the_sum_stays_the_same(milestones: dict[str, float]) -> None:
    found = divided(**milestones)
    assert sum(found.values()) == pytest.approx(sum(PHASES.values()))
    assert all(each >= 0 for each in found.values())
