# SPDX-License-Identifier: Apache-2.0
"""Sockets that no table of /proc/net lists are told apart by their protocols."""

import os
import socket
import struct
from pathlib import Path

import pytest

from snapshot.socket_obstacles import _of_protocol


def link(sock: socket.socket) -> Path:
    return Path(f"/proc/{os.getpid()}/fd/{sock.fileno()}")


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6, socket.AF_UNIX])
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_socket_without_a_connection_is_no_obstacle(family: int, kind: int) -> None:
    with socket.socket(family, kind) as sock:
        assert _of_protocol(link(sock)) is None


def test_a_reset_connection_is_no_obstacle() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
        with accepted:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
            inode = str(os.fstat(accepted.fileno()).st_ino)
            assert inode not in Path("/proc/net/tcp").read_text(), "it is listed after all"
            assert _of_protocol(link(accepted)) is None


def test_a_socket_that_was_closed_meanwhile_is_no_obstacle() -> None:
    with socket.socket() as sock:
        path = link(sock)
    assert _of_protocol(path) is None


def test_a_protocol_unknown_to_criu_is_named() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_MPTCP) as sock:
        finding = _of_protocol(link(sock))
    assert finding
    assert "GODEBUG=multipathtcp=0" in finding[1]
