# SPDX-License-Identifier: Apache-2.0
"""The CPUs that we may use, and the quota of our control groups."""

import os
from pathlib import Path

import pytest

from rekindle.node import cpus


@pytest.mark.parametrize("text", ["", "0", "0-3,8", "1,3,5-6", "0-9999", "63-64"])
def test_text_and_mask_are_inverse(text: str) -> None:
    assert cpus.as_text(cpus.mask(text)) == text


def test_numbers_are_those_of_the_text() -> None:
    assert cpus.numbers("0-2,9") == [0, 1, 2, 9]
    assert cpus.numbers(cpus.of_thread()) == sorted(os.sched_getaffinity(0))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/a/b\n", {}, 0.0),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n"}, 0.0),
        ("0::/a/b\n", {"a/b/cpu.max": "250000 100000\n"}, 2.5),
        ("0::/a/b\n", {"a/b/cpu.max": "400000 100000\n", "a/cpu.max": "150000 100000\n"}, 1.5),
        ("4:cpu,cpuacct:/a\n1:memory:/x\n", {"cpu,cpuacct/a/cpu.cfs_quota_us": "-1\n"}, 0.0),
        (
            "4:cpu,cpuacct:/a\n0::/\n",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "50000\n", "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n"},
            0.5,
        ),
        ("nonsense\n", {"cpu.max": "nonsense\n"}, 0.0),
    ],
)
def test_the_smallest_quota_of_all_groups_counts(
    tmp_path: Path, groups: str, files: dict[str, str], expected: float
) -> None:
    write(tmp_path / "own", groups)
    for name, text in files.items():
        write(tmp_path / "cgroup" / name, text)
    assert cpus.quota(tmp_path / "own", tmp_path / "cgroup") == expected
