# SPDX-License-Identifier: Apache-2.0
"""`snapshot --pid`: save a server that rekindle has not started, and that serves on whatever happens."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Done, Rekindle, Replica, free_port, listening, wait_for, workhorse, workhorse_flags
from tests.integration.test_operate import Load

pytestmark = pytest.mark.criu

Started = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TMPDIR that is older than any server, and so nothing of theirs."""
    place = tmp_path_factory.mktemp("foreign")
    time.sleep(2)
    return place


@pytest.fixture
def start(temporary: Path) -> Iterator[Started]:
    """Starts servers as anybody would."""
    running: list[subprocess.Popen[bytes]] = []

    def start(argv: Sequence[str], port: int, **options: Any) -> "subprocess.Popen[bytes]":
        environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
        with open(temporary / "server.log", "ab") as log:
            given = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "start_new_session": True}
            running.append(
                subprocess.Popen(
                    argv, **{"env": {**environment, "TMPDIR": str(temporary)}, **given, **options}
                )
            )
        wait_for(lambda: listening(port) or running[-1].poll() is not None, 20)
        assert running[-1].poll() is None
        return running[-1]

    yield start
    for each in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(each.pid, signal.SIGKILL)
        each.wait(10)


def snapshot(rekindle: Rekindle, pid: int, port: int, *flags: str) -> Done:
    return rekindle("snapshot", "live", "--pid", str(pid), *workhorse_flags(port), *flags, "--json")


def count(port: int) -> Any:
    return json.loads(Replica(None, port, Path(), {}).ask("/count", {}))  # type: ignore[arg-type]


def in_shm() -> set[str]:
    return set(os.listdir("/dev/shm"))


def test_a_server_is_saved_under_load_and_keeps_its_clients(
    rekindle: Rekindle, start: Started, restore: Callable[..., Replica]
) -> None:
    port = free_port()
    server = start(workhorse(port), port)
    assert [count(port) for _ in range(2)] == [1, 2]
    with Load(port) as load, socket.create_connection(("127.0.0.1", port)) as idle:
        time.sleep(0.3)
        done = snapshot(rekindle, server.pid, port)
        assert done.status == 0, done.stderr
        before = load.answers
        wait_for(lambda: load.answers > before + 12, 20)
        idle.sendall(b"GET /health HTTP/1.1\r\nHost: horse\r\nConnection: close\r\n\r\n")
        assert b"200 OK" in b"".join(iter(lambda: idle.recv(1 << 16), b""))
        assert f"tcp:127.0.0.1:{idle.getsockname()[1]}" in done.json["closed"]
    assert not load.failures
    assert done.json["oracle"]["match"]
    assert 0 < done.json["pause"]["seconds"] < 5
    assert count(port) == 3
    replicas = [restore("live", free_port(), "--require", "process") for _ in range(2)]
    for replica in replicas:
        assert [json.loads(replica.ask("/count", {})) for _ in range(2)] == [3, 4], "the state of then"
    assert count(port) == 4


def test_one_of_a_shell_that_writes_to_a_pipe(
    rekindle: Rekindle, start: Started, restore: Callable[..., Replica]
) -> None:
    """Neither the leader of its session nor the reader of the pipe is in the copy."""
    port = free_port()
    words = " ".join(workhorse(port))
    shell = start(["/bin/sh", "-c", f"{words} 2>&1 </dev/null | cat >&2; :"], port)
    found = horses(port)
    (server,) = [pid for pid in found if int(stat(pid)[1]) not in found]
    assert os.getsid(server) == shell.pid
    done = snapshot(rekindle, server, port)
    assert done.status == 0, done.stderr
    assert count(port) == 1
    assert json.loads(restore("live", free_port(), "--require", "process").ask("/count", {})) == 1


def horses(port: int) -> set[int]:
    """The PIDs of the processes of a server at a port."""
    start, found = os.fsencode("\0".join(workhorse(port))), set()
    for each in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (each / "cmdline").read_bytes().startswith(start):
                found.add(int(each.name))
    return found


def stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name: state, parent, …"""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def test_a_command_that_is_killed_leaves_the_server_as_it_was(
    rekindle: Rekindle, start: Started, tmp_path: Path
) -> None:
    port = free_port()
    server, shm = start(workhorse(port), port), in_shm()
    for number in range(6):  # before CRIU runs, while it dumps, while it waits, and when all is over
        log = tmp_path / f"log-{number}"
        flags = [*workhorse_flags(port), "--no-prove"]
        process = rekindle.spawn("snapshot", "live", "--pid", str(server.pid), *flags, log=log)
        wait_for(lambda: "rekindle: check" in log.read_text() or process.poll() is not None, 20)  # noqa: B023
        time.sleep(0.02 * number**1.5)
        process.kill()
        process.wait(10)
        assert count(port) == number + 1
    wait_for(lambda: not status(server.pid).get("TracerPid", "0").strip("0"), 20)
    assert snapshot(rekindle, server.pid, port, "--no-prove").status == 0
    assert count(port) == 7
    assert not {name for name in in_shm() - shm if name.startswith("link_remap")}


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def test_what_cannot_be_dumped_is_named_and_the_server_serves_on(rekindle: Rekindle, start: Started) -> None:
    port = free_port()
    server = start(workhorse(port, "hold=queue"), port)
    done = snapshot(rekindle, server.pid, port)
    assert done.status == 32, done.stderr
    assert "message queue" in done.stderr
    assert "it serves on" in done.stderr
    assert count(port) == 1


def test_what_cannot_work_is_refused_at_once(rekindle: Rekindle, start: Started) -> None:
    port = free_port()
    done = snapshot(rekindle, os.getpid(), port)
    assert (done.status, "one of its descendants" in done.stderr) == (10, True), done.stderr
    assert "rekindle run NAME" in done.stderr
    assert snapshot(rekindle, 1, port).status == 10
    assert snapshot(rekindle, 4_000_000, port).status == 2
    assert rekindle("snapshot", "live", "--pid", str(os.getpid()), "--", "true").status == 2
    elsewhere = start(["unshare", "--pid", "--fork", "--mount-proc", *workhorse(port)], port)
    (inner,) = Path(f"/proc/{elsewhere.pid}/task/{elsewhere.pid}/children").read_text().split()
    done = snapshot(rekindle, int(inner), port)
    assert done.status == 10
    assert "namespace" in done.stderr
    assert count(port) == 1


def test_a_secret_file_of_today_is_compared_with_that_of_the_server(
    rekindle: Rekindle, start: Started, restore: Callable[..., Replica], tmp_path: Path
) -> None:
    """Its key is in the server's memory, as ours is in that of the shell above others."""
    port, secret = free_port(), tmp_path / "pin"
    secret.write_text("4711")
    rekindle.env["DB_PASS_FILE"] = str(secret)
    environment = {**os.environ, "TMPDIR": str(tmp_path.parent), "DB_PASS_FILE": str(secret)}
    server = start(workhorse(port), port, env=environment)
    done = snapshot(rekindle, server.pid, port)
    assert done.status == 0, done.stderr
    files = rekindle("inspect", "live", "--json").json["record"]["loaded"]["files"]
    (identity,) = [each["identity"] for each in files if each["path"] == str(secret)]
    assert re.fullmatch("keyed:[0-9a-f]{64}", identity)
    replica = restore("live", free_port(), "--require", "process")
    assert str(secret) in [each["field"] for each in replica.report["reasons"]]
    secret.write_text("0815")
    done = rekindle("restore", "live", "--require", "process", "--publish", str(free_port()))
    assert done.status == 11, done.stderr
    assert f"{secret} was as it was read, is different" in done.stderr
