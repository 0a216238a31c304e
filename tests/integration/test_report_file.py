# SPDX-License-Identifier: Apache-2.0
"""A report is written where a file can be written, also where it cannot be replaced."""

import json
from pathlib import Path

import pytest

from tests.conftest import Rekindle

pytestmark = pytest.mark.criu

MOUNTED = 'mount --bind "$1" "$1" && shift && exec "$@"'


def test_a_mounted_file_is_written_in_place(rekindle: Rekindle, tmp_path: Path) -> None:
    """As Kubernetes mounts /dev/termination-log: a rename onto it is refused (EBUSY)."""
    report = tmp_path / "termination-log"
    report.write_text("what was there before, and was longer than what comes\n" * 200)
    rekindle.prefix = ["unshare", "--mount", "sh", "-c", MOUNTED, "sh", str(report)]
    inode = report.stat().st_ino
    done = rekindle("restore", "nothing-here", "--report", str(report))
    assert done.status == 12, done.stderr
    assert json.loads(report.read_text())["error"]["code"] == "not-found"
    assert report.stat().st_ino == inode
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".termination-log")]


def test_a_file_in_a_directory_that_is_read_only_is_written_in_place(
    rekindle: Rekindle, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    report = place / "report.json"
    report.touch()
    outside = tmp_path / "real.json"
    outside.touch()
    program = (
        'mount --bind "$1" "$1" && mount --bind "$2" "$1/report.json" && '
        'mount -o remount,bind,ro "$1" && shift 2 && exec "$@"'
    )
    rekindle.prefix = ["unshare", "--mount", "sh", "-c", program, "sh", str(place), str(outside)]
    done = rekindle("restore", "nothing-here", "--report", str(report))
    assert done.status == 12, done.stderr
    assert json.loads(outside.read_text())["error"]["code"] == "not-found"


@pytest.mark.parametrize("path", ["/dev/null", "/proc/self/report.json", "/nowhere/report.json"])
def test_what_cannot_be_a_report_is_refused_before_any_work(rekindle: Rekindle, path: str) -> None:
    done = rekindle("restore", "nothing-here", "--report", path)
    assert done.status == 2, done.stderr
    assert path in done.stderr


def test_a_link_to_the_output_stays_a_link(rekindle: Rekindle, tmp_path: Path) -> None:
    """As /dev/stdout is one, which a root's rename would replace for all."""
    link, file = tmp_path / "stdout", tmp_path / "file"
    file.write_text("old")
    link.symlink_to(file)
    done = rekindle("restore", "nothing-here", "--report", str(link))
    assert done.status == 12
    assert link.is_symlink()
    assert json.loads(file.read_text())["error"]["code"] == "not-found"


@pytest.mark.parametrize("option", ["--report", "--picture"])
def test_bench_refuses_a_file_that_it_cannot_write_before_it_begins(rekindle: Rekindle, option: str) -> None:
    done = rekindle("bench", option, "/none/such/file", "--", "vllm", "serve", "model")
    assert done.status == 2
    assert f"cannot write {option} /none/such/file" in done.stderr
