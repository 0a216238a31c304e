# SPDX-License-Identifier: Apache-2.0
"""Addresses that are open before the server is ready."""

import contextlib
import socket
from collections.abc import Iterator

import pytest

from rekindle.engine import Endpoint
from restore.decide.publications import Publication
from restore.serve.address import Addresses
from tests.conftest import free_port


@pytest.fixture
def at() -> Endpoint:
    return Endpoint(host="127.0.0.1", port=free_port())


@pytest.fixture
def addresses(at: Endpoint) -> Iterator[Addresses]:
    with Addresses([Publication(at=at)]) as made:
        yield made


def connect(at: Endpoint) -> socket.socket:
    return socket.create_connection((at.host, at.port), timeout=5)


def test_a_port_is_closed_until_it_is_opened(addresses: Addresses, at: Endpoint) -> None:
    with pytest.raises(ConnectionRefusedError):
        connect(at)
    addresses.listen_early()
    with connect(at):
        pass


def test_who_connects_early_is_accepted_later(addresses: Addresses, at: Endpoint) -> None:
    addresses.listen_early()
    with connect(at) as client:
        client.sendall(b"question")
        [(sock, target)] = addresses.listen(at)
        assert target == at
        server, _ = sock.accept()
        with server:
            assert server.recv(100) == b"question"
            server.sendall(b"answer")
        assert client.recv(100) == b"answer"


@pytest.mark.parametrize("closes", [Addresses.release, lambda each: each.release_own(None)])
def test_who_waits_in_vain_sees_an_end_and_no_error(
    addresses: Addresses, at: Endpoint, closes: object
) -> None:
    addresses.listen_early()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(at)) for _ in range(50)]
        for client in clients[::2]:
            client.sendall(b"GET / HTTP/1.1\r\n\r\n" * 1000)
        assert callable(closes)
        closes(addresses)
        assert {client.recv(100) for client in clients} == {b""}
    with pytest.raises(ConnectionRefusedError):
        connect(at)


def test_what_leads_elsewhere_stays_open(at: Endpoint) -> None:
    other = Endpoint(host="127.0.0.1", port=free_port())
    with Addresses([Publication(at=at)]) as addresses:
        addresses.listen_early()
        with connect(at):
            assert addresses.release_own(other) == [other]
            with connect(at):
                [(sock, _)] = addresses.listen(other)
                sock.accept()[0].close()
