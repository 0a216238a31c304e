# SPDX-License-Identifier: Apache-2.0
"""Replicas share a port: the real balancer, and replicas that the test plays."""

import contextlib
import functools
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rekindle.engine import Endpoint
from rekindle.errors import PortError
from restore.serve.address import bind
from restore.serve.shared_port import SharedPlace, SharedPort
from tests.conftest import free_port, wait_for

SECONDS = 20.0


class Played:
    """A replica that does nothing with its connections."""

    def __init__(self, directory: Path, at: Endpoint, *, is_early: bool = False) -> None:
        self.port = SharedPort(directory, at, functools.partial(bind, at), is_early=is_early)
        self.has: list[tuple[socket.socket, SharedPlace]] = []

    def take(self, seconds: float = SECONDS) -> tuple[socket.socket, SharedPlace]:
        """Return the next connection that it gets."""
        deadline = time.monotonic() + seconds
        while select.select([self.port], [], [], max(0.0, deadline - time.monotonic()))[0]:
            if found := self.port.take():
                found[0].settimeout(SECONDS)
                self.has.append(found)
                return found
        raise TimeoutError

    def gets_nothing(self) -> bool:
        try:
            self.take(0.3)
        except TimeoutError:
            return True
        return False

    def die(self) -> None:
        """Vanish, as by SIGKILL: nothing is shut down, and the balancer is told nothing."""
        for sock, _ in self.has:
            sock.close()
        self.port.close()


Make = Callable[..., Played]


@pytest.fixture
def at() -> Endpoint:
    return Endpoint(host="127.0.0.1", port=free_port())


@pytest.fixture
def replica(tmp_path: Path, at: Endpoint) -> Iterator[Make]:
    made: list[Played] = []

    def make(*, is_early: bool = False) -> Played:
        made.append(Played(tmp_path / "ports", at, is_early=is_early))
        return made[-1]

    yield make
    for each in made:
        each.die()
    wait_for(lambda: not balancers(tmp_path / "ports"), 10)
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def balancers(directory: Path) -> list[int]:
    """The PIDs of the balancers below a directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cwd").readlink().is_relative_to(directory):
                found.append(int(process.name))
    return found


def connect(at: Endpoint) -> socket.socket:
    return socket.create_connection((at.host, at.port), timeout=SECONDS)


def test_a_connection_goes_to_the_replica_with_the_fewest(replica: Make, at: Endpoint) -> None:
    one, two = replica(), replica()
    one.port.ready()
    with connect(at) as first, connect(at) as second:
        kept, _ = one.take()
        ended, place = one.take()
        two.port.ready()
        assert two.gets_nothing()
        with connect(at), connect(at):
            assert two.take()
            assert two.take()
            ended.close()
            place.done()
            assert second.recv(9) == b""
            assert two.gets_nothing()
            with connect(at) as third:
                one.take()[0].sendall(b"third")
                assert third.recv(9) == b"third"
        kept.sendall(b"kept")
        assert first.recv(9) == b"kept"


def test_the_port_opens_with_the_first_that_is_ready(replica: Make, at: Endpoint) -> None:
    one = replica()
    with pytest.raises(ConnectionRefusedError):
        connect(at)
    one.port.ready()
    wait_for(lambda: is_open(at), 10)
    one.die()
    wait_for(lambda: not is_open(at), 10)


def test_who_comes_early_waits_if_that_was_asked_for(replica: Make, at: Endpoint) -> None:
    one = replica(is_early=True)
    wait_for(lambda: is_open(at), 10)
    with connect(at) as client:
        assert one.gets_nothing()
        one.port.ready()
        while one.take()[0].getpeername() != client.getsockname():
            pass


@pytest.mark.parametrize("state", ["untouched", "idle", "asked"])
def test_what_a_killed_one_was_not_asked_goes_to_another(replica: Make, at: Endpoint, state: str) -> None:
    one, two = replica(), replica()
    one.port.ready()
    with connect(at) as client:
        sock, place = one.take()
        if state != "untouched":
            client.sendall(b"first")
            place.asked()
            assert sock.recv(9) == b"first"
        if state == "idle":
            place.idle()
            client.sendall(b"second")
        two.port.ready()
        one.die()
        if state == "asked":
            assert client.recv(9) == b""
            assert two.gets_nothing()
            return
        sock, _ = two.take()
        client.sendall(b"third")
        wanted = b"secondthird" if state == "idle" else b"third"
        content = b""
        while len(content) < len(wanted):
            content += sock.recv(20)
        assert content == wanted


def test_what_is_given_back_goes_to_another_or_waits_for_one(replica: Make, at: Endpoint) -> None:
    one, two = replica(), replica()
    one.port.ready()
    with connect(at) as client:
        sock, place = one.take()
        one.port.hold()
        sock.close()
        place.give_back()
        assert one.gets_nothing()
        assert two.gets_nothing()
        two.port.ready()
        two.take()[0].sendall(b"here")
        assert client.recv(9) == b"here"


def test_a_killed_balancer_is_replaced_and_the_port_stays_open(
    replica: Make, at: Endpoint, tmp_path: Path
) -> None:
    one, two = replica(), replica()
    one.port.ready()
    two.port.ready()
    with connect(at) as before:
        took_first = first_that_gets_one(one, two)
        (first,) = balancers(tmp_path / "ports")
        for each in (one, two):
            each.gets_nothing()  # but the listening socket
        os.kill(first, signal.SIGKILL)
        with connect(at) as meanwhile:  # while there is no balancer
            for each in (one, two):
                assert select.select([each.port], [], [], SECONDS)[0]
                with pytest.raises(ConnectionError):
                    each.take()  # it hears of the end
                each.port.rejoin()
            wait_for(lambda: len(balancers(tmp_path / "ports")) == 1, 10)
            first_that_gets_one(one, two).has[-1][0].sendall(b"after")
            assert meanwhile.recv(9) == b"after"
        took_first.has[0][0].sendall(b"before")
        assert before.recv(9) == b"before"


def test_an_address_that_another_has_is_a_port_error(replica: Make, at: Endpoint) -> None:
    with socket.create_server((at.host, at.port)), pytest.raises(PortError):
        replica()


def first_that_gets_one(*replicas: Played) -> Played:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        for each in replicas:
            with contextlib.suppress(TimeoutError):
                each.take(0.05)
                return each
    raise TimeoutError


def is_open(at: Endpoint) -> bool:
    with contextlib.suppress(ConnectionRefusedError), connect(at):
        return True
    return False
