# SPDX-License-Identifier: Apache-2.0
"""The tasks that control groups still allow."""

from pathlib import Path

import pytest

from rekindle.node.tasks import available


def group(root: Path, path: str, limit: str, used: int) -> None:
    directory = root / path
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "pids.max").write_text(f"{limit}\n")
    (directory / "pids.current").write_text(f"{used}\n")


def test_the_tightest_group_counts(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("0::/pods/one/server\n")
    group(tmp_path, "pods/one/server", "max", 5)
    assert available(own, tmp_path) is None
    group(tmp_path, "pods/one", "100", 30)
    group(tmp_path, "pods", "1000", 990)
    assert available(own, tmp_path) == 10
    group(tmp_path, "pods", "900", 990)
    assert available(own, tmp_path) == 0


def test_without_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert available(tmp_path / "none", tmp_path) is None


@pytest.mark.parametrize("seen", ["pods/one", ""])
def test_groups_of_version_1_count(tmp_path: Path, seen: str) -> None:
    """In a container, the path is the host's, and the group is at the top."""
    own = tmp_path / "cgroup"
    own.write_text("9:cpu,cpuacct:/x\n8:pids:/pods/one\n0::/\n")
    group(tmp_path / "pids", seen, "50", 20)
    assert available(own, tmp_path) == 30
