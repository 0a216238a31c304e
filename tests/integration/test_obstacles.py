# SPDX-License-Identifier: Apache-2.0
"""What CRIU cannot dump is named before the dump, with a remedy that works."""

import os
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rekindle.criu.faults import WATCH_ON_OVERLAYFS
from tests.conftest import Done, Rekindle, Replica, free_port, workhorse, workhorse_flags

NothingLeft = Callable[[], None]
Restore = Callable[..., Replica]


# What is held (tests/servers/holds.py), what is said of it, and the remedy.
OBSTACLES = {
    "vsock": ("family unknown to CRIU", "close it"),
    "loop": ("is a device unknown to CRIU", "close it"),
    "perf": ("kernel object unknown to CRIU", "end the profiler"),
    "userfaultfd": ("kernel object unknown to CRIU", "turn off the feature that handles page faults"),
    "bpf": ("kernel object unknown to CRIU", "end the tracer"),
    "landlock-rules": ("kernel object unknown to CRIU", "close it"),
    "secret": ("is secret memory, which the OS kernel hides from CRIU", "turn it off"),
    "secret-mapped": ("is secret memory, which the OS kernel hides from CRIU", "turn it off"),
    "sysv": ("System V semaphores", "use POSIX semaphores"),
    "sysv-queue": ("System V message queue", "use POSIX semaphores"),
    "sysv-memory": ("System V shared memory", "use POSIX"),
    "unix": ("which replicas would take from each other", "put it below $TMPDIR"),
    "link": ("is a deleted file with other hard links", "keep such files below $TMPDIR"),
    "ghost": ("bytes on the disk, more than CRIU stores", "close it"),
    "daemon": ("has left the server's process tree", "start it in the foreground"),
    "mptcp": (
        "Multipath TCP, which CRIU does not know",
        "turn it off; Go programs do with GODEBUG=multipathtcp=0",
    ),
    "epoll": (
        "watches a file that this process has closed (it was descriptor",
        "remove a file from the epoll before",
    ),
    "queue": ("is a POSIX message queue", "use a pipe, a socket or multiprocessing.Queue"),
    "netlink": ("has messages that were not read", "read them"),
    "unread": ("bytes that its peer does not read", "let the peer read them"),
    "multicast": ("has joined the multicast group 239.1.2.3", "leave it"),
    "multicast-6": ("has joined the multicast group ff15::123", "leave it"),
    "shell-in-a-terminal": ("is its controlling terminal, which process 1002 (", "end the terminal's shell"),
    "headless": ("has ended its main thread, and runs on in others", "let the main thread wait for them"),
    "landlock": ("has restricted itself with Landlock", "turn that off"),
    "keys": ("uses keys of the OS kernel (keyrings)", "keep them in files or in memory"),
    "stdout-of-1": ("as /proc/1/fd/1 is", "open /dev/stdout or /dev/stderr instead"),
    "pressure": ("waits for pressure (psi)", "turn that off"),
    "user-namespace": ("is in a user namespace of its own", "start it without that sandbox"),
    "pid-namespace": ("is in a PID namespace of its own", "start it without that sandbox"),
    "time-namespace": ("is in a time namespace of its own", "start it without that sandbox"),
    "namespace-20000": ("is in a mount namespace of its own", "start it without that sandbox"),
    "namespace-4000000": ("is in a UTS namespace of its own", "start it without that sandbox"),
    "namespace-8000000": ("is in an IPC namespace of its own", "start it without that sandbox"),
    "namespace-40000000": ("is in a network namespace of its own", "start it without that sandbox"),
    "namespace-2000000": ("is in a cgroup namespace of its own", "start it without that sandbox"),
}


# The thread of the hook keeps a process of Python from getting a user namespace.
WITHOUT_HOOK = ["--reseed", "none"]


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """The snapshot of a server that holds all of it: one for all tests, since a snapshot takes seconds."""
    place = tmp_path_factory.mktemp("held")
    rekindle = Rekindle(place / "home")
    held = ",".join(OBSTACLES)
    return rekindle.snapshot_workhorse(
        "horse", free_port(), f"hold={held}", f"path={place}/held", flags=WITHOUT_HOOK
    )


@pytest.mark.parametrize("held", OBSTACLES)
def test_what_cannot_be_dumped_is_named_with_its_remedy(refused: Done, held: str) -> None:
    assert refused.status == 32, refused.stderr
    what, remedy = OBSTACLES[held]
    found = [line for line in refused.stderr.splitlines() if what in line and remedy in line]
    assert found, refused.stderr


def test_what_children_have_inherited_is_named_once(refused: Done) -> None:
    [line] = [line for line in refused.stderr.splitlines() if "AF_VSOCK" in line]
    assert re.search(r"process 1002 \(.*\) and \d+ more, descriptor \d+ ", line), line


@pytest.mark.timeout(300)  # 40 things, of which many are processes
def test_who_follows_the_remedies_gets_a_snapshot(
    rekindle: Rekindle, port: int, tmp_path: Path, restore: Restore, nothing_left: NothingLeft
) -> None:
    held = ",".join(f"remedied-{each}" for each in [*OBSTACLES, "files"])
    done = rekindle.snapshot_workhorse("horse", port, f"hold={held}", f"path={tmp_path}/held")
    assert done.status == 0, done.stderr
    replica = restore("horse", free_port(), "--require", "process")
    assert replica.ask("/health") == "ready"
    replica.kill()
    nothing_left()


@pytest.mark.parametrize("held", ["vsock", "user-namespace"])
def test_one_is_enough(
    rekindle: Rekindle, port: int, tmp_path: Path, held: str, nothing_left: NothingLeft
) -> None:
    done = rekindle.snapshot_workhorse(
        "horse", port, f"hold={held}", f"path={tmp_path / 'held'}", flags=WITHOUT_HOOK
    )
    assert done.status == 32, done.stderr
    assert "the server holds 1 thing that CRIU cannot dump" in done.stderr
    assert OBSTACLES[held][0] in done.stderr
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


def test_what_the_check_does_not_know_is_left_to_criu_and_named_then(
    rekindle: Rekindle, port: int, nothing_left: NothingLeft
) -> None:
    done = rekindle.snapshot_workhorse("horse", port, "hold=mount-context")
    assert done.status == 33, done.stderr
    said = r"process 1002 \(.*\), descriptor \d+ \(anon_inode:\[fscontext\]\): is unknown to CRIU; close it"
    assert re.search(said, done.stderr), done.stderr
    assert "it still answered, and was ended, since this command had started it" in done.stderr
    nothing_left()


def test_a_traced_process_is_named(rekindle: Rekindle, port: int, nothing_left: NothingLeft) -> None:
    strace = ["strace", "--follow-forks", "--output", os.devnull]
    done = rekindle("snapshot", "horse", *workhorse_flags(port), "--", *strace, *workhorse(port))
    assert done.status == 32, done.stderr
    assert "is traced by a debugger; detach it" in done.stderr
    nothing_left()
    detached = rekindle.snapshot_workhorse("horse", port)
    assert detached.status == 0, detached.stderr


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


def test_a_watch_on_overlayfs_is_named_if_this_criu_cannot_dump_it(
    rekindle: Rekindle, port: int, overlay: Path, nothing_left: NothingLeft
) -> None:
    doctor = rekindle("doctor", "--check", "criu").stdout
    faulty = WATCH_ON_OVERLAYFS.what in doctor
    assert ("hack/get-criu --newer" in doctor) == faulty
    done = rekindle.snapshot_workhorse("horse", port, "hold=watch", f"path={overlay}")
    assert done.status == (32 if faulty else 0), done.stderr
    assert ("watches a file on overlayfs" in done.stderr) == faulty
    assert (f"or use CRIU {WATCH_ON_OVERLAYFS.right}" in done.stderr) == faulty
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
