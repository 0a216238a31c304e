# SPDX-License-Identifier: Apache-2.0
"""Whoever started us learns that the server is ready; and nobody who cannot listen stops it."""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rekindle.errors import UsageError
from restore.serve import notify


@pytest.fixture(params=["path", "abstract"])
def manager(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[socket.socket]:
    """Who listens at $NOTIFY_SOCKET, as sd_notify(3) describes both forms of it."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@rekindle-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(name.replace("@", "\0", 1))
        sock.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield sock


def test_systemd_is_told(manager: socket.socket) -> None:
    notify.systemd("STOPPING=1")
    assert manager.recv(100) == b"STOPPING=1"


def test_it_is_told_once_that_a_server_is_ready(manager: socket.socket, tmp_path: Path) -> None:
    with notify.ready_file(tmp_path / "ready"):
        notify.ready(tmp_path / "ready")
    assert b"READY=1" in manager.recv(100).splitlines()
    manager.setblocking(False)
    with pytest.raises(BlockingIOError):
        manager.recv(100)


@pytest.mark.parametrize(
    "address", ["", "relative", "@nobody-is-here", "/nowhere/notify", "/", "vsock:2:1234", "/" + "x" * 200]
)
def test_where_nobody_listens_nothing_happens(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    notify.ready(None)
    monkeypatch.delenv("NOTIFY_SOCKET")
    notify.ready(None)


def test_who_does_not_read_does_not_hold_the_server_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "_SEND_SECONDS", 0.05)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as filler, contextlib.suppress(BlockingIOError):
            filler.setblocking(False)
            while True:
                filler.sendto(bytes(1000), str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        began = time.monotonic()
        notify.ready(None)
        assert time.monotonic() - began < 2


# The ready file.


def test_a_file_is_there_while_the_server_is_ready(tmp_path: Path) -> None:
    path = tmp_path / "ready"
    with notify.ready_file(path):
        assert not path.exists()
        notify.ready(path)
        assert path.exists()
    assert not path.exists()


def test_one_that_was_left_behind_is_removed_first(tmp_path: Path) -> None:
    path = tmp_path / "ready"
    path.write_bytes(b"of a server that was killed")
    with notify.ready_file(path):
        assert not path.exists()


def test_it_is_removed_whatever_happens(tmp_path: Path) -> None:
    path = tmp_path / "ready"
    with contextlib.suppress(KeyboardInterrupt), notify.ready_file(path):
        notify.ready(path)
        raise KeyboardInterrupt
    assert not path.exists()


def test_somebody_else_may_remove_it_or_its_directory(tmp_path: Path) -> None:
    path = tmp_path / "run/ready"
    path.parent.mkdir()
    with notify.ready_file(path):
        notify.ready(path)
        path.unlink()
    with notify.ready_file(path):
        path.parent.rmdir()
        notify.ready(path)


def test_without_a_file_there_is_none(tmp_path: Path) -> None:
    with notify.ready_file(None):
        notify.ready(None)
    assert not list(tmp_path.iterdir())


def test_a_place_where_no_file_can_be_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "directory").mkdir()
    for path in ("nowhere/ready", "file/ready", "directory", "x" * 300):
        with pytest.raises(UsageError, match="--ready-file"), notify.ready_file(tmp_path / path):
            pytest.fail("it is not to come this far")
    assert (tmp_path / "directory").is_dir()
