# SPDX-License-Identifier: Apache-2.0
"""While requests are held back, the server has no idle connections, and their clients notice nothing."""

import selectors
import socket
from collections.abc import Iterator

import pytest

from rekindle.engine import Endpoint
from restore.client_address import ClientAddress
from restore.serve.address import bind, listen
from restore.serve.forward import Forwarder

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Host:
    def socket(self, family: socket.AddressFamily) -> socket.socket:
        return socket.socket(family, socket.SOCK_STREAM)


class Scene:
    """A forwarder whose loop turns only where the test wants it to, a server and clients that it plays."""

    def __init__(self, kind: ClientAddress | None = None) -> None:
        self.server = socket.create_server(("127.0.0.1", 0))
        self.server.settimeout(0.2)
        target = Endpoint(host="127.0.0.1", port=self.server.getsockname()[1])
        self.selector = selectors.DefaultSelector()
        self.forwarder = Forwarder(self.selector, Host(), kind)
        published = bind(Endpoint(host="127.0.0.1", port=0))
        listen(published, target)
        self.at = published.getsockname()
        self.forwarder.accept_from(published, target)

    def turn(self) -> None:
        while ready := self.selector.select(0.1):
            for key, mask in ready:
                key.data(mask)

    def connect(self) -> tuple[socket.socket, socket.socket]:
        client = socket.create_connection(self.at, timeout=0.2)
        self.turn()
        return client, self.accept()

    def accept(self) -> socket.socket:
        sock, _ = self.server.accept()
        sock.settimeout(0.2)
        return sock

    def ask(self, client: socket.socket, server: socket.socket, answer: bytes = ANSWER) -> None:
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        self.turn()
        assert server.recv(99) == b"GET / HTTP/1.1\r\n\r\n"
        server.sendall(answer)
        self.turn()
        assert client.recv(99) == answer


@pytest.fixture
def scene() -> Iterator[Scene]:
    made = Scene()
    yield made
    made.forwarder.close()
    made.selector.close()
    made.server.close()


def test_an_idle_connection_is_closed_at_the_server_and_made_again(scene: Scene) -> None:
    client, server = scene.connect()
    scene.ask(client, server)
    scene.forwarder.hold()
    assert server.recv(9) == b""
    client.sendall(b"GET / HTTP/1.1\r\n\r\n")  # at just that moment
    scene.turn()
    with pytest.raises(TimeoutError):
        scene.accept()
    scene.forwarder.be_still()
    scene.forwarder.resume()
    scene.turn()
    again = scene.accept()
    assert again.recv(99) == b"GET / HTTP/1.1\r\n\r\n"
    again.sendall(ANSWER)
    scene.turn()
    assert client.recv(99) == ANSWER
    scene.ask(client, again)
    for sock in (client, server, again):
        sock.close()


def test_one_on_which_nothing_was_asked_is_closed_too(scene: Scene) -> None:
    client, server = scene.connect()
    scene.forwarder.hold()
    assert server.recv(9) == b""
    scene.forwarder.resume()
    again = scene.accept()
    scene.ask(client, again)
    client.close()
    scene.turn()
    assert again.recv(9) == b""
    for sock in (server, again):
        sock.close()


@pytest.mark.parametrize(
    "content",
    [b"HTTP/1.1 101 Switching\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", b"220 hello"],
)
def test_what_is_not_idle_stays_connected(scene: Scene, content: bytes) -> None:
    """A websocket, half an answer, a server that speaks first."""
    client, server = scene.connect()
    if content.startswith(b"HTTP"):
        scene.ask(client, server, content)
    else:
        server.sendall(content)
        scene.turn()
        assert client.recv(99) == content
    scene.forwarder.hold()
    with pytest.raises(TimeoutError):
        server.recv(9)
    scene.forwarder.resume()
    client.sendall(b"more")
    scene.turn()
    assert server.recv(9) == b"more"
    for sock in (client, server):
        sock.close()


def test_who_leaves_meanwhile_is_forgotten(scene: Scene) -> None:
    client, server = scene.connect()
    scene.ask(client, server)
    watched = len(scene.selector.get_map()) - 2
    scene.forwarder.hold()
    client.close()
    scene.forwarder.resume()
    scene.turn()
    again = scene.accept()
    assert again.recv(9) == b""
    again.close()
    scene.turn()
    assert len(scene.selector.get_map()) == watched
    server.close()


def test_the_new_connection_has_the_address_of_the_client() -> None:
    scene = Scene(ClientAddress.PROXY_V1)
    client, server = scene.connect()
    line = server.recv(99)
    assert line.startswith(b"PROXY TCP4 127.0.0.1")
    scene.forwarder.hold()
    scene.forwarder.resume()
    scene.turn()
    again = scene.accept()
    assert again.recv(99) == line
    for sock in (client, server, again):
        sock.close()
    scene.forwarder.close()
    scene.selector.close()
    scene.server.close()
