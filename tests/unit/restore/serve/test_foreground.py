# SPDX-License-Identifier: Apache-2.0
"""A server in the foreground: its loop waits for events, and asks nothing that no event has announced."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator

import pytest

from rekindle.engine import Endpoint
from restore.serve.address import bind, listen
from restore.serve.foreground import Serving
from restore.signals import ENDING, Signals
from tests.conftest import wait_for

# The timer of pytest-timeout's usual way is one of the signals that are kept.
pytestmark = pytest.mark.timeout(method="thread")


class Server:
    """A replica that a test plays. It counts how often it is asked for its status."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        self.exit_status: int | None = None
        self.asked = 0
        self.heard: list[int] = []

    def end(self, status: int) -> None:
        self.exit_status = status
        os.write(self.writer, b"\n")

    def status(self) -> int | None:
        self.asked += 1
        return self.exit_status

    def signal(self, signum: int) -> None:
        self.heard.append(signum)

    def child(self) -> int:
        return 0

    def fileno(self) -> int:
        return self.reader

    def socket(self, family: socket.AddressFamily) -> socket.socket:
        return socket.socket(family, socket.SOCK_STREAM)


@pytest.fixture(autouse=True)
def _signals_are_as_they_were() -> Iterator[None]:
    """After a signal that asks us to end, further ones are ignored."""
    before = {signum: signal.getsignal(signum) for signum in (*ENDING, signal.SIGUSR1)}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    os.close(made.reader)
    os.close(made.writer)


@contextlib.contextmanager
def meanwhile(act: threading.Thread) -> Iterator[None]:
    act.start()
    try:
        yield
    finally:
        act.join(20)


def test_connections_do_not_make_it_ask_for_the_status(server: Server) -> None:
    here = Endpoint(host="127.0.0.1", port=0)
    with socket.create_server(("127.0.0.1", 0)) as target, Signals() as signals:
        published = bind(here)
        listen(published, here)
        address = published.getsockname()

        def talk() -> None:
            for _ in range(50):
                with socket.create_connection(address, 20) as client, target.accept()[0] as far:
                    client.sendall(b"?")
                    assert far.recv(1) == b"?"
                    far.sendall(b"!")
                    assert client.recv(1) == b"!"
            server.end(4)

        listens = Endpoint(host="127.0.0.1", port=target.getsockname()[1])
        with meanwhile(threading.Thread(target=talk)), Serving(server, signals) as serving:
            serving.publish(published, listens)
            assert serving.run() == 4
    assert server.asked <= 3


def test_a_server_that_has_ended_before_is_not_waited_for(server: Server) -> None:
    """The event was taken by somebody who asked before."""
    server.exit_status = 5
    with Signals() as signals, Serving(server, signals) as serving:
        assert serving.run() == 5


def test_signals_that_came_before_are_passed_on(server: Server) -> None:
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        server.exit_status = 0
        with Serving(server, signals) as serving:
            assert serving.run() == 0
        assert server.heard == [signal.SIGTERM]
        assert serving.signalled == signal.SIGTERM


def test_each_signal_is_passed_on_when_it_comes(server: Server) -> None:
    expected: list[int] = []

    def send() -> None:
        for signum in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            expected.append(signum)
            os.kill(os.getpid(), signum)
            wait_for(lambda: server.heard == expected, 10)
        server.end(0)

    with Signals() as signals, meanwhile(threading.Thread(target=send)):
        with Serving(server, signals) as serving:
            assert serving.run() == 0
        assert server.heard == expected


def test_a_condition_is_asked_at_once_and_after_each_event(server: Server) -> None:
    with Signals() as signals, Serving(server, signals) as serving:
        assert serving.run(until=lambda: True) is None
        answers = iter([False, True])
        reader, writer = os.pipe()
        with open(reader, "rb", buffering=0) as watched, open(writer, "wb", buffering=0) as other:
            serving.watch(reader, lambda: watched.read(1))
            other.write(b"\n")
            assert serving.run(until=lambda: next(answers)) is None
            serving.forget(reader)
