# SPDX-License-Identifier: Apache-2.0
import pytest

from restore.serve.exchange import Exchange

GET, HEAD = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n", b"HEAD / HTTP/1.1\r\nHost: h\r\n\r\n"
PLAIN = b"HTTP/1.1 200 OK\r\nserver: s\r\nContent-Length: 5\r\n\r\nhello"
EMPTY = b"HTTP/1.1 200 OK\r\ncontent-length:0\r\n\r\n"
CHUNKS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n3\r\n{0}\r\n0\r\n\r\n"
NONE = b"HTTP/1.1 204 No Content\r\n\r\n"
CONTINUES = b"HTTP/1.1 100 Continue\r\n\r\n"


@pytest.mark.parametrize("answer", [PLAIN, EMPTY, CHUNKS, NONE, CONTINUES + PLAIN, CONTINUES * 2 + CHUNKS])
@pytest.mark.parametrize("piece", [1, 7, 1 << 16])
def test_an_answer_is_open_until_its_last_byte(answer: bytes, piece: int) -> None:
    exchange = Exchange()
    assert not exchange.is_open
    for _ in range(3):
        exchange.from_client(GET)
        for at in range(0, len(answer), piece):
            assert exchange.is_open, answer[:at]
            exchange.from_server(answer[at : at + piece])
        assert not exchange.is_open


def test_the_answer_to_head_has_no_body() -> None:
    exchange = Exchange()
    exchange.from_client(HEAD)
    exchange.from_server(PLAIN[:-5])
    assert not exchange.is_open


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\nuntil the end",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 40_000,
    ],
)
def test_what_has_no_known_end_stays_open(answer: bytes) -> None:
    exchange = Exchange()
    exchange.from_client(GET)
    exchange.from_server(answer)
    assert exchange.is_open


def test_a_body_that_comes_in_pieces_is_one_request() -> None:
    exchange = Exchange()
    exchange.from_client(b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\n")
    exchange.from_client(b"HEAD ")
    exchange.from_server(PLAIN[:-1])
    assert exchange.is_open
