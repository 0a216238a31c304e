# SPDX-License-Identifier: Apache-2.0
"""How much memory can be had: of the node, within every control group."""

from pathlib import Path

import pytest

from rekindle.node.memory import available_bytes, within_groups

GIB = 1 << 30


def test_it_is_the_kernels_own_estimate(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 3 kB\nMemFree: 1 kB\nMemAvailable:        2 kB\n")
    assert available_bytes(meminfo) == 2048
    meminfo.write_text("MemTotal: 3 kB\n")
    assert available_bytes(meminfo) is None
    here = available_bytes()
    assert here is not None
    assert here > 1 << 20


def groups_of(place: Path, group: str = "0::/a/b\n") -> tuple[Path, Path]:
    """The files that say which control groups we are in."""
    (place / "cgroup").write_text(group)
    (place / "groups/a/b").mkdir(parents=True)
    return place / "cgroup", place / "groups"


def limit(directory: Path, most: object, current: object, inactive: object = 0) -> None:
    (directory / "memory.max").write_text(f"{most}\n")
    (directory / "memory.current").write_text(f"{current}\n")
    (directory / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\nactive_file 7\n")


def test_without_a_limit_it_is_what_the_node_has(tmp_path: Path) -> None:
    own, cgroups = groups_of(tmp_path)
    assert within_groups(10 * GIB, own, cgroups) == 10 * GIB
    limit(cgroups / "a/b", "max", 5 * GIB)
    assert within_groups(10 * GIB, own, cgroups) == 10 * GIB


@pytest.mark.parametrize("directory", ["a/b", "a", ""])
def test_a_limit_on_any_group_that_we_are_in_counts(tmp_path: Path, directory: str) -> None:
    own, cgroups = groups_of(tmp_path)
    limit(cgroups / directory, 4 * GIB, 3 * GIB, GIB // 2)
    assert within_groups(10 * GIB, own, cgroups) == GIB + GIB // 2


def test_the_tightest_limit_counts(tmp_path: Path) -> None:
    own, cgroups = groups_of(tmp_path)
    limit(cgroups, 9 * GIB, 0)
    limit(cgroups / "a", 8 * GIB, 2 * GIB)
    limit(cgroups / "a/b", 7 * GIB, 0)
    assert within_groups(10 * GIB, own, cgroups) == 6 * GIB


def test_in_a_container_the_group_is_the_root(tmp_path: Path) -> None:
    own, cgroups = groups_of(tmp_path, "0::/\n")
    limit(cgroups, 2 * GIB, GIB)
    assert within_groups(10 * GIB, own, cgroups) == GIB


def test_nothing_is_less_than_none(tmp_path: Path) -> None:
    own, cgroups = groups_of(tmp_path)
    limit(cgroups / "a/b", GIB, 2 * GIB)
    assert within_groups(10 * GIB, own, cgroups) == 0


@pytest.mark.parametrize("group", ["", "4:memory:/a/b\n0::/gone\n", "4:memory:/a/b\n"])
def test_groups_that_tell_nothing_are_no_limit(tmp_path: Path, group: str) -> None:
    own, cgroups = groups_of(tmp_path, group)
    limit(cgroups / "a/b", GIB, GIB)
    (cgroups / "a/memory.max").write_text("no number")
    assert within_groups(10 * GIB, own, cgroups) == 10 * GIB


def test_groups_of_version_1_count(tmp_path: Path) -> None:
    own, cgroups = groups_of(tmp_path, "4:memory:/a/b\n0::/\n")
    directory = cgroups / "memory/a"
    directory.mkdir(parents=True)
    (directory / "memory.limit_in_bytes").write_text(f"{4 * GIB}\n")
    (directory / "memory.usage_in_bytes").write_text(f"{3 * GIB}\n")
    (directory / "memory.stat").write_text(f"inactive_file 9\ntotal_inactive_file {GIB // 2}\n")
    assert within_groups(10 * GIB, own, cgroups) == GIB + GIB // 2
