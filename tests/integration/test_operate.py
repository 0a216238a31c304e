# SPDX-License-Identifier: Apache-2.0
"""Servers in the background: `restore --detach`, `ps`, `logs`, `stop`, `wait` and `exec`."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from rekindle.files import locked
from tests.conftest import SERVERS, Rekindle, Replica, free_port, listening, wait_for, workhorse

pytestmark = pytest.mark.criu

HORSE_STATUS = 7
"""The exit status of a workhorse that was asked to end."""


@pytest.fixture(scope="module")
def at_home(tmp_path_factory: pytest.TempPathFactory) -> Rekindle:
    """A home with a snapshot of a workhorse."""
    place = tmp_path_factory.mktemp("operate")
    rekindle = Rekindle(place / "home", {"TMPDIR": str(place)})
    done = rekindle.snapshot_workhorse("horse", free_port(), flags=["--no-prove"])
    assert done.status == 0, done.stderr
    return rekindle


@pytest.fixture
def rekindle(at_home: Rekindle) -> Iterator[Rekindle]:
    yield at_home
    if left := at_home("ps", "--quiet").stdout.split():
        assert at_home("stop", "--timeout", "1", *left).status == 0


def listed(rekindle: Rekindle, *flags: str) -> dict[str, Any]:
    return {each["name"]: each for each in rekindle("ps", "--json", *flags).json["replicas"]}


def ask(port: int, path: str, body: object = None) -> Any:
    return json.loads(Replica(None, port, Path(), {}).ask(path, body))  # type: ignore[arg-type]


def free_ports(count: int) -> int:
    """The first of so many free ports in a row."""
    first = free_port()
    while any(listening(port) for port in range(first, first + count)):
        first = free_port()
    return first


def test_a_detached_server_runs_until_it_is_stopped(rekindle: Rekindle) -> None:
    port = free_port()
    done = rekindle("restore", "horse", "--detach", "--name", "web", "--publish", str(port))
    assert (done.status, done.stdout) == (0, "web\n"), done.stderr
    assert "ready (restored)" in done.stderr

    assert ask(port, "/count", {}) == 1
    web = listed(rekindle)["web"]
    assert (web["state"], web["rung"], web["image"]) == ("ready", "process", "horse")
    assert web["endpoint"].endswith(f":{port}")
    assert web["digest"].startswith("sha256:")
    assert 0 < web["memory"]["own_bytes"] < 100e6
    assert web["memory"]["shared_bytes"] > 0
    table = [line.split() for line in rekindle("ps").stdout.splitlines()]
    assert table[0][:4] == ["NAME", "IMAGE", "RUNG", "ENDPOINT"]
    assert table[1][:4] == ["web", "horse", "process", web["endpoint"]]

    inside = rekindle("exec", "web", "--", "sh", "-c", "echo $(ls /proc | grep -c '^100.$'); exit 5")
    assert inside.status == 5, inside.stderr
    assert int(inside.stdout) >= 4, "it sees the server's processes"
    assert rekindle("exec", "web", "--", "/no/such").status == 127

    again = rekindle("restore", "horse", "--name", "web")
    assert again.status == 2
    assert "rekindle stop web" in again.stderr

    assert rekindle("stop", "web").status == 0
    assert not listening(port)
    assert not listed(rekindle)
    assert listed(rekindle, "--all")["web"]["exit_status"] == HORSE_STATUS
    assert rekindle("wait", "web").status == HORSE_STATUS
    assert rekindle("exec", "web", "--", "true").status == 12


def test_replicas_are_published_at_ports_in_a_row(rekindle: Rekindle) -> None:
    first = free_ports(3)
    done = rekindle(
        "restore", "horse", "--detach", "--replicas", "3", "--name", "r", "--publish", str(first), "--json"
    )
    assert done.status == 0, done.stderr
    reports = done.json["replicas"]
    assert [report["replica"] for report in reports] == ["r-1", "r-2", "r-3"]
    assert len({report["pid"] for report in reports}) == 3
    for number in range(3):
        for count in range(number + 1):
            assert ask(first + number, "/count", {}) == count + 1, "what one writes, no other sees"
    assert set(listed(rekindle)) == {"r-1", "r-2", "r-3"}
    assert rekindle("stop", "r-1", "r-2", "r-3").status == 0
    assert not listed(rekindle)


def test_a_killed_one_is_listed_no_more_and_its_name_is_free(rekindle: Rekindle) -> None:
    port = str(free_port())
    assert rekindle("restore", "horse", "--detach", "--name", "web", "--publish", port).status == 0
    web = listed(rekindle)["web"]
    waiting = rekindle.spawn("wait", "web", log=rekindle.home / "wait.log")
    os.kill(web["serving"]["pid"], signal.SIGKILL)
    assert waiting.wait(10) == 137
    assert not listed(rekindle)
    killed = listed(rekindle, "--all")["web"]
    assert (killed["state"], killed["exit_status"]) == ("killed", 137)
    wait_for(lambda: not Path(f"/proc/{web['cell']['pid']}").exists(), 10)
    assert rekindle("restore", "horse", "--detach", "--name", "web", "--publish", port).status == 0
    assert listed(rekindle)["web"]["serving"]["pid"] != web["serving"]["pid"]


def test_a_foreground_server_is_listed(rekindle: Rekindle, restore: Callable[..., Replica]) -> None:
    replica = restore("horse", free_port(), "--name", "front")
    assert replica.report["replica"] == "front"
    assert listed(rekindle)["front"]["serving"]["pid"] == replica.process.pid
    assert "not started with --detach" in rekindle("logs", "front").stderr
    assert rekindle("stop", "front").status == 0
    assert replica.process.wait(10) == HORSE_STATUS


def test_a_log_is_followed_until_the_end(rekindle: Rekindle, tmp_path: Path) -> None:
    port = free_port()
    mule = [sys.executable, str(SERVERS / "mule.py"), str(port)]
    flags = ["--rung", "cold", "--name", "mule", "--ready-url", f"http://127.0.0.1:{port}/health"]
    done = rekindle("restore", "horse", "--detach", *flags, "--", *mule)
    assert done.status == 0, done.stderr
    assert listed(rekindle)["mule"]["rung"] == "cold"
    assert rekindle("exec", "mule", "--", "true").status == 10
    log = tmp_path / "log"
    follows = rekindle.spawn("logs", "-f", "mule", log=log)
    ask(port, "/say", {})
    wait_for(lambda: b"to stdout" in log.read_bytes(), 10)
    assert follows.poll() is None
    assert rekindle("stop", "mule").status == 0
    assert follows.wait(10) == 0
    assert b"mule: signal 15" in log.read_bytes()


@pytest.mark.parametrize("rung", ["process", "cold"])
def test_a_server_that_does_not_end_is_killed(rekindle: Rekindle, rung: str) -> None:
    port = free_port()
    slow = [sys.executable, str(SERVERS / "mule.py"), "slow-end=60", str(port)]
    words = ["restore", "horse", "--detach", "--name", "slow"]
    if rung == "cold":
        words += ["--rung", "cold", "--ready-url", f"http://127.0.0.1:{port}/health", "--", *slow]
    else:
        words += ["--publish", str(port)]
    assert rekindle(*words).status == 0
    if rung == "process":  # a stopped process hears no SIGTERM
        assert rekindle("exec", "slow", "--", "sh", "-c", "kill -STOP 1001 1002").status == 0
    began = time.monotonic()
    assert rekindle("stop", "--timeout", "0.5", "slow").status == 0
    assert time.monotonic() - began < 5
    ended = listed(rekindle, "--all")["slow"]
    assert (ended["state"], ended["exit_status"]) == ("ended", 137)
    assert not listening(port)


def test_what_fails_before_it_is_ready_fails_as_in_the_foreground(rekindle: Rekindle) -> None:
    done = rekindle("restore", "nothing", "--detach", "--json")
    assert done.status == 12
    assert done.json["error"]["code"] == "not-found"
    assert "rekindle: error" in done.stderr
    assert rekindle("restore", "horse", "--replicas", "2").status == 2
    assert rekindle("stop", "nobody").status == 12
    assert not listed(rekindle)


def test_a_signal_before_it_is_ready_ends_it(rekindle: Rekindle, tmp_path: Path) -> None:
    port = free_port()
    never = [sys.executable, str(SERVERS / "mule.py"), "never-ready", str(port)]
    flags = ["--rung", "cold", "--name", "never", "--ready-url", f"http://127.0.0.1:{port}/health"]
    process = rekindle.spawn("restore", "horse", "--detach", *flags, "--", *never, log=tmp_path / "log")
    wait_for(lambda: listening(port), 20)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM
    assert not listening(port)
    assert not listed(rekindle)


def test_nobody_who_reads_our_output_waits_for_the_server(rekindle: Rekindle) -> None:
    program = [sys.executable, "-m", "rekindle", "restore", "horse", "--detach"]
    words = ["sh", "-c", '"$@" 3>&1 2>&1 | cat', "sh", *program, "--publish", str(free_port())]
    done = subprocess.run(
        words, env=rekindle.environment(), capture_output=True, text=True, timeout=30, check=False
    )
    assert done.stdout.splitlines()[-1] == "horse-1"


def connected(port: int, seconds: float = 20) -> socket.socket:
    """A connection, as soon as one is accepted."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=30)
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.005)


def answered(client: socket.socket) -> bytes:
    client.sendall(b"GET /health HTTP/1.1\r\nHost: horse\r\nConnection: close\r\n\r\n")
    return b"".join(iter(lambda: client.recv(1 << 16), b""))


@pytest.mark.parametrize("early", [True, False])
def test_who_connects_before_it_is_ready_waits_if_the_port_is_open(
    rekindle: Rekindle, tmp_path: Path, early: bool
) -> None:
    port, report = free_port(), tmp_path / "report"
    flags = ["--publish", str(port), "--report", str(report), *(["--listen-early"] if early else [])]
    process = rekindle.spawn("restore", "horse", "--paranoid", *flags, log=tmp_path / "log")
    with connected(port) as first:
        was_early = "rekindle: oracle" not in (tmp_path / "log").read_text()
        assert was_early is early
        with connected(port) as second:
            assert b"200 OK" in answered(first)
            assert b"200 OK" in answered(second)
    process.terminate()
    assert process.wait(20) == HORSE_STATUS


def test_who_waits_in_vain_sees_the_end_and_the_lower_rung_opens_the_port(
    rekindle: Rekindle, tmp_path: Path
) -> None:
    """Another process unpacks the dump, for longer than the process may take."""
    image = rekindle("inspect", "horse", "--json").json
    port, digest = image["record"]["endpoint"]["port"], image["process_image"]["digest"]
    with locked(rekindle.home / "dumps" / f"{digest.removeprefix('sha256:')}.lock"):
        words = ["restore", "horse", "--process-deadline", "1.5", "--listen-early"]
        process = rekindle.spawn(*words, log=tmp_path / "log")
        with connected(port) as first:
            assert answered(first) == b""
    wait_for(lambda: "ready (cold)" in (tmp_path / "log").read_text(), 20)
    assert "process failed: process was not done" in (tmp_path / "log").read_text()
    with connected(port) as second:
        assert b"200 OK" in answered(second)
    process.terminate()
    assert process.wait(20)


@dataclass
class Load:
    """Clients that ask all the time, half of them over one connection each."""

    port: int
    answers: int = 0
    slowest: float = 0.0
    failures: list[str] = field(default_factory=list)
    _ends: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> "Load":
        for number in range(6):
            self._threads.append(threading.Thread(target=self._ask, args=[number % 2 == 0]))
            self._threads[-1].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        for thread in self._threads:
            thread.join(30)

    def _ask(self, stays: bool) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        while not self._ends.is_set():
            began = time.monotonic()
            try:
                connection.request("GET", "/stream?n=4")
                response = connection.getresponse()
                content = response.read()
                if response.status != 200 or content.count(b"data") != 4:
                    self.failures.append(f"{response.status} {content!r}")
            except OSError as error:
                self.failures.append(repr(error))
                connection.close()
            self.answers += 1
            self.slowest = max(self.slowest, time.monotonic() - began)
            if not stays:
                connection.close()
        connection.close()


def test_a_server_is_saved_under_load_and_no_request_fails(rekindle: Rekindle, tmp_path: Path) -> None:
    port, second = free_port(), free_port()
    assert rekindle("restore", "horse", "--detach", "--name", "web", "--publish", str(port)).status == 0
    assert [ask(port, "/count", {}) for _ in range(3)] == [1, 2, 3]
    with Load(port) as load, socket.create_connection(("127.0.0.1", port)) as idle:
        time.sleep(0.3)
        done = rekindle("snapshot", "later", "--replica", "web", "--no-prove", "--json")
        assert done.status == 0, done.stderr
        before = load.answers
        wait_for(lambda: load.answers > before + 12, 10)
        assert b"200 OK" in answered(idle)
    assert not load.failures
    report = done.json
    assert report["oracle"]["match"]
    assert report["pause"]["in_flight"] == 0, "each answer takes 0.2 s"
    assert report["pause"]["still_seconds"] < report["pause"]["seconds"] < 3
    assert load.slowest < 5
    assert ask(port, "/count", {}) == 4
    assert rekindle("restore", "later", "--detach", "--name", "two", "--publish", str(second)).status == 0
    assert ask(second, "/count", {}) == 4, "it has the state of then"


def test_a_request_that_takes_longer_goes_on_after_the_snapshot(rekindle: Rekindle) -> None:
    port = free_port()
    assert rekindle("restore", "horse", "--detach", "--name", "web", "--publish", str(port)).status == 0
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(b"GET /stream?n=300 HTTP/1.1\r\nHost: horse\r\nConnection: close\r\n\r\n")
        flags = ["--replica", "web", "--no-prove", "--json", "--drain", "0.2"]
        done = rekindle("snapshot", "later", *flags)
        assert done.status == 0, done.stderr
        assert done.json["pause"]["in_flight"] == 1
        assert b"".join(iter(lambda: client.recv(1 << 16), b"")).count(b"data") == 300


def test_a_command_that_is_killed_leaves_the_server_as_it_was(rekindle: Rekindle, tmp_path: Path) -> None:
    port = free_port()
    assert rekindle("restore", "horse", "--detach", "--name", "web", "--publish", str(port)).status == 0
    for number in range(5):  # before CRIU runs, while it dumps, while it waits, and when all is over
        log = tmp_path / f"log-{number}"
        process = rekindle.spawn("snapshot", "later", "--replica", "web", "--no-prove", log=log)
        wait_for(lambda: "rekindle: drain" in log.read_text() or process.poll() is not None, 20)  # noqa: B023
        time.sleep(0.02 * number**1.5)
        process.kill()
        process.wait(10)
        assert ask(port, "/count", {}) == number + 1
    assert rekindle("snapshot", "later", "--replica", "web", "--no-prove").status == 0
    assert ask(port, "/count", {}) == 6
    assert rekindle("stop", "web").status == 0
    assert listed(rekindle, "--all")["web"]["exit_status"] == HORSE_STATUS


def run_flags(port: int) -> list[str]:
    return [
        "--ready-url",
        f"http://127.0.0.1:{port}/health",
        "--oracle-request",
        str(SERVERS / "oracle.json"),
    ]


def test_a_server_that_is_run_can_be_saved_under_load(rekindle: Rekindle) -> None:
    inside, port, second = 8000, free_port(), free_port()
    command = workhorse(inside)
    done = rekindle("run", "web", "--detach", "--publish", str(port), *run_flags(inside), "--", *command)
    assert (done.status, done.stdout) == (0, "web\n"), done.stderr
    assert listed(rekindle)["web"]["cell"] is not None
    assert ask(port, "/count", {}) == 1
    with Load(port) as load:
        time.sleep(0.3)
        done = rekindle("snapshot", "live", "--replica", "web", "--json")
        assert done.status == 0, done.stderr
        before = load.answers
        wait_for(lambda: load.answers > before + 12, 10)
    assert not load.failures
    assert 0 < done.json["pause"]["seconds"] < 5
    assert ask(port, "/count", {}) == 2
    flags = ["--name", "two", "--publish", str(second), "--require", "process"]
    done = rekindle("restore", "live", "--detach", *flags, "--", *command)
    assert done.status == 0, done.stderr
    assert ask(second, "/count", {}) == 2, "it has the state of then"
    assert rekindle("stop", "web", "two").status == 0
    assert {each["exit_status"] for each in listed(rekindle, "--all").values()} >= {HORSE_STATUS}


ECHO = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        told = f"{self.client_address[0]} {self.headers.get('X-Forwarded-For')}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(told)))
        self.end_headers()
        self.wfile.write(told)
http.server.ThreadingHTTPServer(("0.0.0.0", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_server_learns_who_its_clients_are(rekindle: Rekindle) -> None:
    port = free_port()
    for flags, told in (
        ([], b"127.0.0.1 None"),
        (["--client-address", "forwarded-for"], b"127.0.0.1 127.0.0.2"),
    ):
        ready = ["--ready-url", "http://127.0.0.1:8000/"]
        command = [sys.executable, "-c", ECHO, "8000"]
        done = rekindle(
            "run", "echo", "--detach", "--publish", f"0.0.0.0:{port}", *ready, *flags, "--", *command
        )
        assert done.status == 0, done.stderr
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=20, source_address=("127.0.0.2", 0))
        for _ in range(2):
            client.request("GET", "/")
            assert client.getresponse().read() == told
        client.close()
        assert rekindle("stop", "echo").status == 0
    flags = ["--name", "web", "--publish", str(port), "--client-address", "proxy-v1"]
    assert rekindle("restore", "horse", "--detach", *flags).status == 0
    with socket.create_connection(("127.0.0.1", port)) as plain:
        # This server does not know the PROXY protocol, and takes the header for a request.
        assert b"Bad request syntax" in b"".join(iter(lambda: plain.recv(1 << 16), b""))


def test_a_server_that_is_run_in_the_foreground(rekindle: Rekindle, tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    mule = [sys.executable, str(SERVERS / "mule.py"), str(port)]
    process = rekindle.spawn("run", "mule", *run_flags(port), "--", *mule, log=log)
    wait_for(lambda: b"rekindle: ready on" in log.read_bytes() or process.poll() is not None, 20)
    assert listed(rekindle)["mule"]["state"] == "ready"
    ask(port, "/say", {})
    ask(port, "/end", {})
    assert process.wait(20) == 0
    assert {b"to stdout", b"to stderr"} <= set(log.read_bytes().splitlines())
    assert not listed(rekindle)


def test_a_server_that_ends_before_it_is_ready_is_told(rekindle: Rekindle) -> None:
    port = free_port()
    dies = [sys.executable, str(SERVERS / "mule.py"), "dies=9", str(port)]
    for flags in ([], ["--detach"]):
        done = rekindle("run", "mule", *flags, *run_flags(port), "--", *dies)
        assert done.status == 30
        assert "exited with status 9" in done.stderr
        assert not listed(rekindle)


def test_a_replica_hibernates_and_wakes_with_its_state(rekindle: Rekindle) -> None:
    port = free_port()
    assert rekindle("restore", "horse", "--detach", "--name", "web", "--publish", str(port)).status == 0
    for round_ in range(2):
        assert ask(port, "/count", {}) == round_ + 1
        web = listed(rekindle)["web"]
        done = rekindle("hibernate", "web", "--json")
        assert done.status == 0, done.stderr
        assert done.json["image"]["reference"] == "hibernated/web"
        assert not listening(port)
        assert not Path(f"/proc/{web['cell']['pid']}").exists()
        assert listed(rekindle)["web"]["state"] == "hibernated"
        assert rekindle("hibernate", "web").status == 12
        assert rekindle("restore", "horse", "--name", "web").status == 2, "the name is taken"
        done = rekindle("wake", "web", "--json")
        assert done.status == 0, done.stderr
        assert done.json["outcome"] == "restored"
        assert done.json["trust"]["verified"], "by this machine's key"
    assert ask(port, "/count", {}) == 3
    assert rekindle("stop", "web").status == 0
    assert rekindle("wake", "web").status == 12


def test_what_a_hibernation_replaces_is_removed(rekindle: Rekindle) -> None:
    port = free_port()
    assert rekindle("restore", "horse", "--detach", "--name", "web", "--publish", str(port)).status == 0
    kept = []
    for _ in range(3):
        assert rekindle("hibernate", "web").status == 0
        assert rekindle("wake", "web").status == 0
        blobs = rekindle.home / "store" / "blobs" / "sha256"
        kept.append((len(os.listdir(rekindle.home / "dumps")), len(os.listdir(blobs))))
    assert kept[1] == kept[2]
    assert rekindle("stop", "web").status == 0


def test_a_wake_that_fails_can_be_repeated(rekindle: Rekindle) -> None:
    port = free_port()
    flags = ["--name", "web", "--publish", str(port), "--detach"]
    assert rekindle("restore", "horse", *flags).status == 0
    assert ask(port, "/count", {}) == 1
    assert rekindle("hibernate", "web").status == 0
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", port))
        taken.listen()
        assert rekindle("wake", "web").status == 13
    assert listed(rekindle)["web"]["state"] == "hibernated"
    assert rekindle("wake", "web").status == 0
    assert ask(port, "/count", {}) == 2
    assert rekindle("hibernate", "web").status == 0
    assert rekindle("stop", "web").status == 0, "it is forgotten"
    assert listed(rekindle, "--all")["web"]["state"] == "ended"


def test_a_server_on_demand_is_there_only_while_it_is_asked(rekindle: Rekindle, tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    flags = ["--name", "web", "--publish", str(port), "--on-demand", "--idle", "1"]
    process = rekindle.spawn("restore", "horse", *flags, log=log)
    wait_for(lambda: listening(port) or process.poll() is not None, 20)
    assert not listed(rekindle), "nobody has asked for it"
    for round_ in range(2):
        assert ask(port, "/count", {}) == round_ + 1, "it has the state of before"
        assert listed(rekindle)["web"]["state"] == "ready"
        wait_for(lambda: listed(rekindle)["web"]["state"] == "hibernated", 30)
        assert listening(port)
    assert rekindle("stop", "web").status == 0
    assert process.wait(20) == 0
    assert not listening(port)


def test_no_request_is_lost_between_waking_and_hibernating(rekindle: Rekindle, tmp_path: Path) -> None:
    port = free_port()
    flags = ["--name", "web", "--publish", str(port), "--on-demand", "--idle", "0.2"]
    process = rekindle.spawn("restore", "horse", *flags, log=tmp_path / "log")
    wait_for(lambda: listening(port) or process.poll() is not None, 20)
    for number in range(9):  # while it is away, wakes, is idle, hibernates
        assert ask(port, "/count", {}) == number + 1
        time.sleep(0.13 * number)
    process.terminate()
    process.wait(30)
    assert "web hibernates" in (tmp_path / "log").read_text()


def test_a_signal_ends_a_server_on_demand(rekindle: Rekindle, tmp_path: Path) -> None:
    port = free_port()
    flags = ["--name", "web", "--publish", str(port), "--on-demand"]
    process = rekindle.spawn("restore", "horse", *flags, log=tmp_path / "log")
    wait_for(lambda: listening(port) or process.poll() is not None, 20)
    assert ask(port, "/count", {}) == 1
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    assert not listening(port)
    assert not listed(rekindle)


def test_a_killed_server_on_demand_is_found_again(rekindle: Rekindle, tmp_path: Path) -> None:
    """It is started again, as by a service manager, while its server runs, and while that hibernates."""
    port, log = free_port(), tmp_path / "log"
    flags = ["--name", "web", "--publish", str(port), "--on-demand", "--idle", "1"]
    with socket.create_server(("127.0.0.1", port)) as listener:
        words = ["restore", "horse", *flags, "--listen-fds", str(listener.fileno())]
        fds = [listener.fileno()]
        process = rekindle.spawn(*words, log=log, pass_fds=fds)
        for round_, state in enumerate(["ready", "hibernated", "ready"]):
            assert ask(port, "/count", {}) == round_ + 1, "it has the state of before"
            wait_for(lambda state=state: listed(rekindle)["web"]["state"] == state, 30)  # type: ignore[misc]
            process.kill()
            process.wait(10)
            process = rekindle.spawn(*words, log=log, pass_fds=fds)
        assert ask(port, "/count", {}) == 4
        wait_for(lambda: log.read_text().count("is open") == 4, 20)
        time.sleep(0.5)  # until it has found the server
        assert rekindle("stop", "web").status == 0
        process.wait(30)
        assert not listed(rekindle)


def test_requests_and_kills_between_hibernating_and_waking() -> None:
    """A short run of hack/soak-hibernate."""
    words = ["--cycles", "5", "--seconds", "90", "--kills", "0.5", "--seed", "5"]
    done = subprocess.run(
        [sys.executable, "-m", "hack.soak_hibernate", *words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["cycles"] > 1
    assert found["answered"] > 10
