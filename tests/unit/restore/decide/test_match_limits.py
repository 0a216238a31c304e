# SPDX-License-Identifier: Apache-2.0
"""Which limits and CPUs of a node keep a server from running as it did, and which are only told."""

from typing import Any

import pytest
from msgspec import structs

from rekindle.cell.settings import ProcessSettings, ThreadSettings
from restore.decide import match_limits
from restore.decide.rules import RULES
from tests.samples.record import NODE, RECORD

HERE = structs.replace(
    NODE, cpus="0-3", limits={"nofile": (1000, 2000), "memlock": (100, 100)}, capabilities=1
)


def codes(
    here: dict[str, Any], *, node: dict[str, Any] | None = None, **settings: Any
) -> list[tuple[str, bool]]:
    """The codes of the differences, and whether they are hard, for a process with these settings."""
    recorded = structs.replace(HERE, **(node or {}))
    process = structs.replace(RECORD.process, settings=(ProcessSettings(pid=1002, **settings),))
    record = structs.replace(RECORD, node=recorded, process=process)
    found = match_limits.compare(record, structs.replace(HERE, **here))
    return [(each.code, RULES[each.code].hard) for each in found]


LIMIT = [("limit", True)]
ALL = (1 << 41) - 1


@pytest.mark.parametrize(
    ("settings", "here", "expected"),
    [
        ({}, {}, []),
        ({"open_files": 1000}, {}, []),
        ({"open_files": 1001}, {}, LIMIT),
        ({"open_files": 1001}, {"limits": {}}, []),
        ({"open_files": 1001}, {"limits": {"nofile": (-1, -1)}}, []),
        ({"open_files": 1001, "limits": {"nofile": (2000, None)}}, {}, []),
        ({"open_files": 11, "limits": {"nofile": (10, None)}}, {}, LIMIT),
        ({"limits": {"nofile": (2001, None)}}, {}, LIMIT),
        ({"limits": {"nofile": (2001, None)}}, {"capabilities": ALL}, LIMIT),  # setrlimit would have failed
        ({"limits": {"nofile": (None, 3000)}}, {}, LIMIT),
        ({"limits": {"nofile": (None, -1)}}, {}, LIMIT),
        ({"limits": {"nofile": (None, 3000)}}, {"capabilities": ALL}, []),
        ({"limits": {"nofile": (-1, None)}}, {}, LIMIT),
        ({"limits": {"new": (-1, None)}}, {}, []),
        ({"locked_bytes": 101}, {}, LIMIT),
        ({"locked_bytes": 101}, {"capabilities": ALL}, []),
        ({"address_bytes": 101}, {"limits": {"as": (100, 200)}}, LIMIT),
        ({"memory_policy": "bind:0"}, {}, [("memory-policy", False)]),
        ({"memory_policy": "bind:0"}, {"memory_nodes": "0"}, []),
        ({"memory_policy": "bind:0"}, {"memory_nodes": "0-1"}, [("memory-policy", False)]),
        ({"memory_policy": "bind:1"}, {"memory_nodes": "0"}, [("memory-policy", False)]),
        ({"memory_policy": "bind=static:0-3 interleave:0,1-2"}, {"memory_nodes": "0-2"}, []),
        ({"memory_policy": "bind:0-1 prefer:1"}, {"memory_nodes": "0-1"}, [("memory-policy", False)]),
        ({"memory_policy": "prefer"}, {"memory_nodes": "0"}, [("memory-policy", False)]),
    ],
)
def test_limits(settings: dict[str, Any], here: dict[str, Any], expected: list[tuple[str, bool]]) -> None:
    assert codes(here, **settings) == expected


@pytest.mark.parametrize(
    ("bound", "here", "expected"),
    [
        ("2", {"cpus": "0-3"}, []),
        ("2", {"cpus": "2-5"}, []),
        ("2", {"cpus": "4-7"}, ["cpu-affinity"]),
        ("", {"cpus": "4-7"}, []),
        ("", {"cpus": "0-1"}, ["cpu-count"]),
        ("0-3", {"cpus": "0-1"}, ["cpu-count", "cpu-affinity"]),
        ("9", {"cpus": ""}, []),
        ("", {"cpu_quota": 1.5}, ["cpu-quota"]),
    ],
)
def test_cpus_are_only_told(bound: str, here: dict[str, Any], expected: list[str]) -> None:
    found = codes(here, threads=(ThreadSettings(tid=1003, cpus=bound),))
    assert found == [(code, False) for code in expected]


def test_an_older_record_is_not_compared() -> None:
    record = structs.replace(RECORD, process=structs.replace(RECORD.process, settings=None))
    assert not list(match_limits.compare(record, HERE))
