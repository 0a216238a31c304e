# SPDX-License-Identifier: Apache-2.0
"""What CRIU cannot dump is named before the dump, with a remedy that works."""

import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Rekindle, workhorse, workhorse_flags

NothingLeft = Callable[[], None]


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ("vsock", "family unknown to CRIU"),
        ("loop", "device unknown to CRIU"),
        ("perf", "kernel object unknown to CRIU; end the profiler"),
        ("sysv", "System V semaphores"),
        ("unix", "which replicas would take from each other"),
        ("link", "is a deleted file with other hard links"),
        ("daemon", "has left the server's process tree"),
        (
            "mptcp",
            "Multipath TCP, which CRIU does not know; turn it off",
        ),
        ("epoll", "watches a file that this process has closed (it was descriptor"),
        ("queue", "is a POSIX message queue"),
        ("netlink", "has messages that were not read"),
        ("unread", "bytes that its peer does not read"),
        ("multicast", "has joined the multicast group 239.1.2.3"),
        ("multicast-6", "has joined the multicast group ff15::123"),
        ("shell-in-a-terminal", "is its controlling terminal, which process 1002 ("),
        ("headless", "has ended its main thread, and runs on in others"),
        ("namespace-20000", "is in a mount namespace of its own"),
        ("namespace-4000000", "is in a UTS namespace of its own"),
        ("namespace-8000000", "is in an IPC namespace of its own"),
        ("namespace-40000000", "is in a network namespace of its own"),
        ("namespace-2000000", "is in a cgroup namespace of its own"),
    ],
)
def test_what_cannot_be_dumped_is_named(
    rekindle: Rekindle, port: int, tmp_path: Path, held: str, words: str, nothing_left: NothingLeft
) -> None:
    done = rekindle.snapshot_workhorse("horse", port, f"hold={held}", f"path={tmp_path / 'held'}")
    assert done.status == 32, done.stderr
    assert words in done.stderr
    nothing_left()


def test_files_that_replicas_would_share_are_named(rekindle: Rekindle, port: int, tmp_path: Path) -> None:
    path = tmp_path / "before"
    for name in ("before", "before-locked"):
        (tmp_path / name).write_text("there before the server\n")
    os.mkfifo(tmp_path / "before-pipe")
    done = rekindle.snapshot_workhorse("horse", port, "hold=files", f"path={path}")
    assert done.status == 32, done.stderr
    for held, words in {
        f"({path})": "is open for writing, and was there before the server",
        f"({path}-pipe)": "is open for writing, and was there before the server",
        f"({path}-large)": "bytes on the disk, more than are copied for a replica",
        f"({path}-direct)": "is open for writing past the page cache (O_DIRECT)",
        f"({path}-database)": "is a database of SQLite, which knows its file by the inode",
        "(/dev/shm/tmp/database)": "is a database of SQLite, which knows its file by the inode",
        f"({path}-locked)": "is locked for this process alone",
        f"({tmp_path})": "is locked for this process alone",
    }.items():
        assert [line for line in done.stderr.splitlines() if held in line and words in line], held


@pytest.mark.parametrize(
    "held",
    [
        "idle-sockets",  # no table of /proc/net lists them
        "child-of-a-thread",  # not among the children of the main thread
        "fork-storm",
        "sparse-deleted",  # 4 GiB, of which one block is stored
        "epoll-emptied",
        "not-accepted",  # a connection that its listener has not taken
    ],
)
def test_what_only_looks_like_an_obstacle_can_be_dumped(
    rekindle: Rekindle, port: int, tmp_path: Path, held: str
) -> None:
    done = rekindle.snapshot_workhorse("horse", port, f"hold={held}", f"path={tmp_path / 'held'}")
    assert done.status == 0, done.stderr


def test_a_traced_process_is_named(rekindle: Rekindle, port: int, nothing_left: NothingLeft) -> None:
    strace = ["strace", "--follow-forks", "--output", os.devnull]
    done = rekindle("snapshot", "horse", *workhorse_flags(port), "--", *strace, *workhorse(port))
    assert done.status == 32, done.stderr
    assert "is traced by a debugger" in done.stderr
    nothing_left()


def test_a_connection_to_an_agent_is_named(
    rekindle: Rekindle, port: int, tmp_path: Path, nothing_left: NothingLeft
) -> None:
    place = tmp_path / "agent.sock"
    with socket.socket(socket.AF_UNIX) as agent:
        agent.bind(str(place))
        agent.listen()
        done = rekindle.snapshot_workhorse("horse", port, "hold=agent", f"path={place}")
    assert done.status == 32, done.stderr
    assert "is connected to a unix socket outside of the server, which has not accepted it" in done.stderr
    nothing_left()


def test_a_connection_to_an_agent_is_named_with_its_process(
    rekindle: Rekindle, port: int, tmp_path: Path
) -> None:
    place = tmp_path / "agent.sock"
    with socket.socket(socket.AF_UNIX) as agent:
        agent.bind(str(place))
        agent.listen()
        accept = "import socket, time; kept = socket.socket(fileno=0).accept(); time.sleep(1000)"
        accepting = subprocess.Popen(["python3", "-c", accept], stdin=agent.fileno())
        try:
            done = rekindle.snapshot_workhorse("horse", port, "hold=agent", f"path={place}")
        finally:
            accepting.kill()
            accepting.wait()
    assert done.status == 32, done.stderr
    assert f"is connected to {place} of python3 (PID {accepting.pid}), outside of the server" in done.stderr


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Path]:
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    layers = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    merged = tmp_path / "merged"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, merged], check=True)
    yield merged
    subprocess.run(["umount", merged], check=True)


def test_a_watch_on_overlayfs_is_named(
    rekindle: Rekindle, port: int, overlay: Path, nothing_left: NothingLeft
) -> None:
    done = rekindle.snapshot_workhorse("horse", port, "hold=watch", f"path={overlay}")
    assert done.status == 32, done.stderr
    assert "watches a file on overlayfs" in done.stderr
    nothing_left()
    elsewhere = rekindle.snapshot_workhorse("horse", port, "hold=watch-elsewhere")
    assert elsewhere.status == 0, elsewhere.stderr


def test_another_user_without_the_capability_is_named(
    rekindle: Rekindle, port: int, nothing_left: NothingLeft
) -> None:
    """CRIU may not read the limits of another user's process without CAP_SYS_RESOURCE."""
    rekindle.prefix = ["setpriv", "--bounding-set", "-sys_resource", "--inh-caps", "-sys_resource", "--"]
    done = rekindle.snapshot_workhorse("horse", port, "uid=65534")
    assert done.status == 32, done.stderr
    assert "runs as another user (65534)" in done.stderr
    assert "SYS_RESOURCE" in done.stderr
    nothing_left()
    if _has_sys_resource():  # not every container of root has it
        rekindle.prefix = []
        allowed = rekindle.snapshot_workhorse("horse", port, "uid=65534")
        assert allowed.status == 0, allowed.stderr


def _has_sys_resource() -> bool:
    status = Path("/proc/self/status").read_text()
    return bool(int(status.split("CapEff:")[1].split()[0], 16) >> 24 & 1)
