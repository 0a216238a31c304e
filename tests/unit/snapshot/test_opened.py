# SPDX-License-Identifier: Apache-2.0
"""What the processes of a cell open is seen, and it is said if it is not."""

import ctypes
import errno
import os
import subprocess
import threading
from pathlib import Path

import pytest

from snapshot import opened
from snapshot.opened import OpenedFiles


class ThisProcess:
    """In place of a cell: its mounts are ours."""

    init_pid = os.getpid()
    root = Path("/proc/self/root")


class Libc:
    """A libc whose fanotify_init fails, or whose marks do."""

    def __init__(self, *, init: int) -> None:
        self._init = init

    def fanotify_init(self, *_: object) -> int:
        ctypes.set_errno(errno.EPERM)
        return os.dup(0) if self._init == 0 else -1

    def fanotify_mark(self, *_: object) -> int:
        return -1


@pytest.mark.parametrize(
    ("init", "problem"),
    [(-1, "fanotify: Operation not permitted"), (0, "fanotify: no mount of the cell can be watched")],
)
def test_without_fanotify_it_says_so(init: int, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opened, "_libc", Libc(init=init))
    before = len(os.listdir("/proc/self/fd"))
    with OpenedFiles(ThisProcess()) as watch:  # type: ignore[arg-type]
        assert watch.problem == problem
        assert len(os.listdir("/proc/self/fd")) == before
    assert not watch.read


@pytest.mark.skipif(os.geteuid() != 0, reason="fanotify needs root")
def test_files_of_others_are_seen_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "read").write_text("")
    os.mkfifo(tmp_path / "pipe")
    descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    with OpenedFiles(ThisProcess()) as watch:  # type: ignore[arg-type]
        assert watch.problem == ""
        script = "cat read; echo >written; : <>pipe; cat gone; rm -f written; echo >new; cat new"
        subprocess.run(["/bin/sh", "-c", script], cwd=tmp_path, capture_output=True, check=True)
        own = tmp_path / "own"
        own.write_text("")
    below = {Path(path).name for path in watch.read if path.startswith(f"{tmp_path}/")}
    assert below >= {"read", "new"}
    assert "own" not in below, "the init of a cell does not count"
    assert "pipe" not in below
    status = (tmp_path / "new").stat()
    assert (status.st_dev, status.st_ino) in watch.written
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == (descriptors, threads)


@pytest.mark.skipif(os.geteuid() != 0, reason="fanotify needs root")
def test_what_only_ended_processes_opened_is_told_apart(tmp_path: Path) -> None:
    for name in ("first", "second", "compiled"):
        (tmp_path / name).write_text("x")
    script = "exec 3<second 4<first; cat compiled; echo ready; read line"
    argv, pipe = ["/bin/sh", "-c", script], subprocess.PIPE
    with (
        OpenedFiles(ThisProcess()) as watch,  # type: ignore[arg-type]
        subprocess.Popen(argv, cwd=tmp_path, stdin=pipe, stdout=pipe) as shell,
    ):
        assert shell.stdout is not None
        assert shell.stdout.read(7) == b"xready\n"
        pid = shell.pid
    below = [Path(path).name for path in watch.read if path.startswith(f"{tmp_path}/")]
    lasting = [Path(path).name for path in watch.lasting([pid]) if path.startswith(f"{tmp_path}/")]
    assert below == ["second", "first", "compiled"]
    assert lasting == ["second", "first"]
    assert watch.lasting([]) == []
