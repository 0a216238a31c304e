# SPDX-License-Identifier: Apache-2.0
"""The look at what is left finds each kind of thing that can be left, and nothing of anybody else's."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import small_disk, wait_for
from tests.traces import SHM, TMP, Traces, adopting_orphans, children, descendants

pytestmark = pytest.mark.criu

# Leaves a process without a parent, in a session of its own, called as nothing of rekindle's is.
ORPHAN = """
import os, sys
if os.fork():
    os._exit(0)
os.setsid()
if os.fork():
    os._exit(0)
os.execvp("sleep", ["sleep", "60"])
"""


def orphan(*prefix: str) -> contextlib.AbstractContextManager[None]:
    return left(lambda: subprocess.run([*prefix, sys.executable, "-c", ORPHAN], check=True))


def orphaned_init() -> contextlib.AbstractContextManager[None]:
    """What a cell would be if it did not end with the command that made it."""

    def start() -> None:
        with subprocess.Popen(["unshare", "--pid", "--fork", "sleep", "60"]) as launcher:
            wait_for(lambda: "sleep 60" in descendants().values(), 10)
            launcher.kill()

    return left(start)


@contextlib.contextmanager
def left(start: Callable[[], object]) -> Iterator[None]:
    start()
    wait_for(lambda: "sleep 60" in descendants().values(), 10)
    (pid,) = [pid for pid, command in descendants().items() if command == "sleep 60"]
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: pid not in descendants(), 10)


@contextlib.contextmanager
def file_in(directory: Path) -> Iterator[None]:
    path = directory / "anything"
    path.touch()
    try:
        yield
    finally:
        path.unlink()


@contextlib.contextmanager
def network_without_processes(place: Path) -> Iterator[None]:
    place.touch()
    script = 'exec mount --bind /proc/self/ns/net "$1"'
    subprocess.run(["unshare", "--net", "sh", "-c", script, "sh", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


@contextlib.contextmanager
def spread(place: Path) -> Iterator[None]:
    """A mount made in a mount namespace that has ended, which forgot to keep its mounts to itself."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "tmpfs", str(place)]
    subprocess.run(["unshare", "--mount", "--propagation", "shared", *command], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


LEAKS: dict[str, tuple[str, Callable[[Path], contextlib.AbstractContextManager[None]]]] = {
    "orphan": ("processes", lambda _: orphan()),
    "orphan in a network": ("processes", lambda _: orphan("unshare", "--net")),
    "init of a PID namespace": ("processes", lambda _: orphaned_init()),
    "mount": ("mounts", lambda place: small_disk(place / "disk", "64k")),
    "mount that spread": ("mounts", lambda place: spread(place / "disk")),
    "network": ("mounts", lambda place: network_without_processes(place / "net")),
    "shared memory": ("shared memory", lambda _: file_in(SHM)),
    "temporary file": ("temporary files", lambda _: file_in(TMP)),
}


@pytest.mark.parametrize(("kind", "leak"), LEAKS.values(), ids=LEAKS)
def test_what_is_left_is_found(
    kind: str, leak: Callable[[Path], contextlib.AbstractContextManager[None]], tmp_path: Path
) -> None:
    with adopting_orphans():
        before = Traces.now()
        with leak(tmp_path), pytest.raises(AssertionError, match=rf"left behind: {{'{kind}'"):
            before.wait_until_nothing_is_left(0.2)
        before.wait_until_nothing_is_left(1)


def test_what_somebody_else_does_meanwhile_is_not_seen(own_machine: tuple[int, int]) -> None:
    mounts, network = own_machine
    elsewhere = ["nsenter", f"--mount=/proc/self/fd/{mounts}", f"--net=/proc/self/fd/{network}"]
    script = """
    folder=$(mktemp --directory /tmp/foreign.XXXXXX); memory=$(mktemp /dev/shm/foreign.XXXXXX)
    mount -t tmpfs tmpfs "$folder"
    echo there; read -r _ || :
    umount "$folder"; rmdir "$folder"; rm "$memory"
    """
    with subprocess.Popen(
        [*elsewhere, "sh", "-euc", script],
        pass_fds=own_machine,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as somebody:
        assert somebody.stdin
        assert somebody.stdout
        before = Traces.now()
        try:
            assert somebody.stdout.readline() == b"there\n"
            before.wait_until_nothing_is_left(0.2)
        finally:
            somebody.stdin.close()
        assert somebody.wait(10) == 0


def test_every_port_is_free_here() -> None:
    with socket.create_server(("127.0.0.1", 8000)), socket.create_server(("127.0.0.1", 18_200)):
        pass
    assert [name for _, name in socket.if_nameindex()] == ["lo"]


def test_an_orphan_is_adopted_and_reaped() -> None:
    with adopting_orphans():
        before = children().keys()
        with orphan():
            assert len(children().keys() - before) == 1
        assert children().keys() == before
