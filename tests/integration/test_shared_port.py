# SPDX-License-Identifier: Apache-2.0
"""Replicas behind one port: they may be stopped, killed and restored while clients ask."""

import http.client
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Rekindle, free_port, listening, wait_for

pytestmark = pytest.mark.criu

REPLICAS = 8
REQUESTS = 1000


@pytest.fixture(scope="module")
def at_home(tmp_path_factory: pytest.TempPathFactory) -> Rekindle:
    place = tmp_path_factory.mktemp("shared-port")
    rekindle = Rekindle(place / "home", {"TMPDIR": str(place)})
    done = rekindle.snapshot_workhorse("horse", free_port(), flags=["--no-prove"])
    assert done.status == 0, done.stderr
    return rekindle


@pytest.fixture
def rekindle(at_home: Rekindle) -> Iterator[Rekindle]:
    yield at_home
    if left := at_home("ps", "--quiet").stdout.split():
        assert at_home("stop", "--timeout", "5", *left).status == 0


def restore(rekindle: Rekindle, port: int, *flags: str) -> None:
    done = rekindle("restore", "horse", "--detach", "--shared-port", "--publish", str(port), *flags)
    assert done.status == 0, done.stderr


def listed(rekindle: Rekindle) -> dict[str, Any]:
    return {each["name"]: each for each in rekindle("ps", "--json").json["replicas"]}


@dataclass
class Requests:
    """Clients that ask so often in all, half of them over one connection each."""

    port: int
    left: int = REQUESTS
    answers: int = 0
    wrong: list[str] = field(default_factory=list)
    failures: list[tuple[float, float, str]] = field(default_factory=list)
    """From when to when, and what."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> "Requests":
        for number in range(16):
            self._threads.append(threading.Thread(target=self._ask, args=[number % 2 == 0]))
            self._threads[-1].start()
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.join(120)

    def _next(self) -> bool:
        with self._lock:
            self.left -= 1
            return self.left >= 0

    def _ask(self, stays: bool) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        while self._next():
            began = time.monotonic()
            try:
                connection.request("GET", "/stream?n=3")
                response = connection.getresponse()
                content = response.read()
                if response.status != 200 or content.count(b"data") != 3:
                    self.wrong.append(f"{response.status} {content!r}")
            except (OSError, http.client.HTTPException) as error:
                self.failures.append((began, time.monotonic(), repr(error)))
                connection.close()
            self.answers += 1
            if not stays:
                connection.close()
            time.sleep(0.01)
        connection.close()


def test_replicas_are_stopped_killed_and_restored_under_load(rekindle: Rekindle) -> None:
    port, kills = free_port(), list[float]()
    restore(rekindle, port, "--replicas", str(REPLICAS), "--name", "r")
    found = listed(rekindle)
    assert {each["endpoint"] for each in found.values()} == {next(iter(found.values()))["endpoint"]}
    with Requests(port) as load:

        def kill(pid: int, signum: int = signal.SIGKILL) -> None:
            before = load.answers
            wait_for(lambda: load.answers > before + 60, 60)
            kills.append(time.monotonic())
            os.kill(pid, signum)

        kill(found["r-1"]["serving"]["pid"])
        assert rekindle("stop", "r-2", "r-3").status == 0
        restore(rekindle, port, "--name", "r-1")
        kill(found["r-4"]["cell"]["pid"])
        restore(rekindle, port, "--name", "r-9")
        assert rekindle("stop", "r-5").status == 0
        kill(listed(rekindle)["r-9"]["serving"]["pid"])
        restore(rekindle, port, "--replicas", "2", "--name", "s")
        kill(balancer(rekindle, port))
        assert load.left > 0
    assert load.answers >= REQUESTS
    assert not load.wrong
    unexplained = [each for each in load.failures if not any(each[0] <= at <= each[1] for at in kills[:-1])]
    assert not unexplained, "only requests in flight at a killed one may fail"
    assert len(load.failures) <= 3 * 16 / 3, "and those of a third of the clients at most"
    assert set(listed(rekindle)) == {"r-1", "r-6", "r-7", "r-8", "s-1", "s-2"}
    assert rekindle("stop", *listed(rekindle)).status == 0
    wait_for(lambda: not listening(port), 10)


def balancer(rekindle: Rekindle, port: int) -> int:
    directory = next((rekindle.home / "ports").glob(f"*-{port}"))
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink() == directory:
                return int(process.name)
        except OSError:
            continue
    raise AssertionError("there is no balancer")


def test_clients_of_one_that_is_saved_are_served_by_the_others(rekindle: Rekindle) -> None:
    port = free_port()
    restore(rekindle, port, "--replicas", "2", "--name", "r")
    with Requests(port, left=300) as load:
        done = rekindle("snapshot", "later", "--replica", "r-1", "--no-prove", "--json")
        assert done.status == 0, done.stderr
        assert rekindle("hibernate", "r-1").status == 0
        assert rekindle("wake", "r-1").status == 0
    assert not load.wrong
    assert not load.failures
    assert {each["state"] for each in listed(rekindle).values()} == {"ready"}


def test_a_request_in_flight_is_answered_before_a_stop(rekindle: Rekindle) -> None:
    port = free_port()
    restore(rekindle, port, "--name", "one")
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/stream?n=30")
    response = connection.getresponse()
    restore(rekindle, port, "--name", "two")
    assert rekindle("stop", "one").status == 0
    assert response.read().count(b"data") == 30
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200, "over the same connection, by the other one"
    connection.close()


def test_what_cannot_be_shared_is_refused(rekindle: Rekindle) -> None:
    for flags in (["--require", "cache"], ["--on-demand", "--name", "web"]):
        assert rekindle("restore", "horse", "--shared-port", *flags).status == 2
