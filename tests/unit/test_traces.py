# SPDX-License-Identifier: Apache-2.0
"""Which processes are ours is told by descent, whatever they and others are called."""

from pathlib import Path

from tests.traces import descendants


def process(proc: Path, pid: int, parent: int, *, name: str = "python", state: str = "S") -> None:
    (proc / str(pid)).mkdir()
    (proc / str(pid) / "stat").write_text(f"{pid} ({name}) {state} {parent} 1 1 0 -1 4194560 0 0\n")
    (proc / str(pid) / "cmdline").write_bytes(f"{name}\0--flag\0".encode())


def test_descendants_are_ours_and_what_is_called_alike_is_not(tmp_path: Path) -> None:
    process(tmp_path, 1, 0)
    process(tmp_path, 10, 1)
    process(tmp_path, 11, 1, name="workhorse")
    process(tmp_path, 12, 11, name="rekindle")
    process(tmp_path, 100, 20, name="grandchild with ) 1 (")
    process(tmp_path, 20, 10)
    process(tmp_path, 30, 10, state="Z")
    (tmp_path / "sys").mkdir()
    (tmp_path / "40").mkdir()  # it has ended meanwhile
    assert descendants(tmp_path, of=10) == {20: "python --flag", 100: "grandchild with ) 1 ( --flag"}
