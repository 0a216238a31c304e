# SPDX-License-Identifier: Apache-2.0
"""Connections that lead out of a server are refused, or closed in its image with `--outside close`."""

import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import SERVERS, Done, Rekindle, Replica, free_port, wait_for, workhorse_flags
from tests.servers.daemon import outside_daemon

pytestmark = pytest.mark.criu

Restore = Callable[..., Replica]


def snapshot(rekindle: Rekindle, port: int, *server: str, flags: tuple[str, ...] = ()) -> Done:
    command = [sys.executable, str(SERVERS / "caller.py"), str(port), *server]
    return rekindle("snapshot", "caller", *workhorse_flags(port), *flags, "--json", "--", *command)


def test_a_connection_to_a_daemon_is_closed_and_made_again(
    rekindle: Rekindle, port: int, tmp_path: Path, restore: Restore
) -> None:
    place, deaf_place = tmp_path / "daemon.sock", tmp_path / "deaf.sock"
    log_place = tmp_path / "log.sock"
    server = (f"unix:{place}", "waits", f"also=unix:{deaf_place}", f"log={log_place}")
    with (
        socket.socket(socket.AF_UNIX) as listener,
        socket.socket(socket.AF_UNIX) as deaf,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log,
    ):
        log.bind(str(log_place))
        for sock, path in ((listener, place), (deaf, deaf_place)):
            sock.bind(str(path))
            sock.listen()
        with outside_daemon(listener, "first"):
            refused = snapshot(rekindle, port, *server)
            assert refused.status == 32, refused.stderr
            assert refused.stderr.count("snapshot with --outside close") == 4
            for path in (place, log_place):
                assert f"is connected to {path}" in refused.stderr
            done = snapshot(rekindle, port, *server, flags=("--outside", "close"))
            assert done.status == 0, done.stderr
            assert done.json["closed"] == ["unix:", *[f"unix:{place}"] * 2, f"unix:{log_place}"]
            assert f"unix:{place}" in done.stderr
            record = rekindle("inspect", "caller", "--json").json["record"]
            assert record["process"]["closed"] == done.json["closed"]
        with outside_daemon(listener, "second"):
            replicas = [restore("caller", free_port(), "--require", "process") for _ in range(2)]
            for replica in replicas:
                found = json.loads(replica.ask("/call"))
                assert found["calls"] in (["EOF", "second"], ["BrokenPipeError", "second"])
                assert (found["ends"], found["also"]) == (["EOF"], "EOF")
                assert found["logged"] == ["OSError", "1"]
                assert json.loads(replica.ask("/call"))["calls"] == ["second"]
                assert found["inside"] == ["!", "!"], "what is inside stays connected"


def test_a_connection_to_another_process_of_the_host_is_closed(
    rekindle: Rekindle, port: int, restore: Restore
) -> None:
    """On the host's network, also the address of this host leads out of the server."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        place = f"tcp:127.0.0.1:{listener.getsockname()[1]}"
        with outside_daemon(listener, "first"):
            refused = snapshot(rekindle, port, place, flags=("--network", "host"))
            assert refused.status == 32, refused.stderr
            assert "snapshot with --outside close" in refused.stderr
            done = snapshot(rekindle, port, place, flags=("--network", "host", "--outside", "close"))
            assert done.status == 0, done.stderr
            assert done.json["closed"] == [place]
        with outside_daemon(listener, "second"):
            report = rekindle.home / "report.json"
            log = rekindle.home / "log"
            process = rekindle.spawn(
                *("restore", "caller", "--require", "process", "--report", str(report)), log=log
            )
            try:
                replica = Replica(process, port, log, {})
                wait_for(lambda: report.exists() or process.poll() is not None, 60)
                found = json.loads(replica.ask("/call"))
                assert found["calls"] in (["EOF", "second"], ["BrokenPipeError", "second"])
                assert found["inside"] == ["!", "!"], "what is inside stays connected"
            finally:
                replica.kill()
