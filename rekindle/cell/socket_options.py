# SPDX-License-Identifier: Apache-2.0
"""Read the options that were set on the TCP and UDP sockets of a process and that CRIU 4.2.1 loses.

CRIU keeps buffer sizes, timeouts, SO_KEEPALIVE with its times, TCP_NODELAY, SO_REUSEADDR, SO_REUSEPORT,
SO_MARK and some more (`criu/sockets.c`, `criu/sk-inet.c`). What it loses was found by setting each option on
sockets of each kind, and comparing after a restore.
"""

import contextlib
import ctypes
import os
import socket
from collections.abc import Iterator

from rekindle.cell.settings import SocketSettings

PIDFD_GETFD = 438  # the same number on every architecture

# IP_: TOS TTL PKTINFO MTU_DISCOVER RECVERR RECVTTL RECVTOS TRANSPARENT ORIGDSTADDR MINTTL
# BIND_ADDRESS_NO_PORT LOCAL_PORT_RANGE
_IPV4 = {1, 2, 8, 10, 11, 12, 13, 19, 20, 21, 24, 51}
_IPV4_UDP = {33, 34}  # IP_MULTICAST_: TTL LOOP
# IPV6_: UNICAST_HOPS MTU_DISCOVER RECVERR RECVPKTINFO RECVHOPLIMIT DONTFRAG RECVTCLASS TCLASS AUTOFLOWLABEL
# MINHOPCOUNT TRANSPARENT FREEBIND
_IPV6 = {16, 23, 25, 49, 51, 62, 66, 67, 70, 73, 75, 78}
_IPV6_UDP = {18, 19}  # IPV6_MULTICAST_: HOPS LOOP
# SO_: TIMESTAMP TIMESTAMPNS TIMESTAMPING RXQ_OVFL SELECT_ERR_QUEUE BUSY_POLL MAX_PACING_RATE ZEROCOPY
# PREFER_BUSY_POLL TXREHASH RCVMARK
_ALL = {29, 35, 37, 40, 45, 46, 47, 60, 69, 74, 75}
# TCP_: SYNCNT LINGER2 DEFER_ACCEPT THIN_LINEAR USER_TIMEOUT NOTSENT_LOWAT SAVE_SYN INQ TX_DELAY
_TCP = {7, 8, 9, 16, 18, 25, 27, 36, 37}
# TCP_: MAXSEG WINDOW_CLAMP FASTOPEN FASTOPEN_NO_COOKIE, which connections cannot set
_TCP_LISTENING = {2, 10, 23, 34}
_UDP = {103, 104}  # UDP_: SEGMENT GRO
_SO_INCOMING_CPU = 49  # which the OS kernel sets on connections
_SOL_UDP = 17
_CONGESTION_BYTES = 16
_libc = ctypes.CDLL(None, use_errno=True)


def read_options(pid: int, known: set[int]) -> Iterator[SocketSettings]:
    """Yield the sockets of a process, given by its PID on the host, on which such options were set.

    `known` are the inodes of sockets that were read already, and those read now are added. Sockets that
    cannot be asked are left out.
    """
    with contextlib.ExitStack() as stack:
        process = os.pidfd_open(pid)
        stack.callback(os.close, process)
        for entry in sorted(os.scandir(f"/proc/{pid}/fd"), key=lambda each: int(each.name)):
            with contextlib.suppress(OSError):
                inode = entry.inode() if not entry.is_symlink() else entry.stat().st_ino
                if not os.readlink(entry.path).startswith("socket:") or inode in known:  # noqa: PTH115
                    continue
                known.add(inode)
                with socket.socket(fileno=duplicate(process, int(entry.name))) as sock:
                    options, congestion = _set_options(sock)
                if options or congestion:
                    yield SocketSettings(fd=int(entry.name), options=options, congestion=congestion)


def duplicate(process: int, fd: int) -> int:
    """Return a descriptor of ours for a file that another process, given by a pidfd, has open."""
    duplicate = int(_libc.syscall(PIDFD_GETFD, process, fd, 0))
    if duplicate == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return duplicate


def _set_options(sock: socket.socket) -> tuple[tuple[tuple[int, int, int], ...], str]:
    """Return the options that a new socket has not, as (level, name, value), and the congestion control."""
    if sock.family not in {socket.AF_INET, socket.AF_INET6}:
        return (), ""
    is_tcp = sock.proto == socket.IPPROTO_TCP
    if not is_tcp and sock.proto != socket.IPPROTO_UDP:
        return (), ""
    is_listening = bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    with socket.socket(sock.family, sock.type, sock.proto) as fresh:
        found = []
        for level, name in _options(sock, is_listening=is_listening):
            with contextlib.suppress(OSError):  # an older OS kernel does not have it
                value = sock.getsockopt(level, name)
                if value != fresh.getsockopt(level, name):
                    found.append((level, name, value))
        own, default = (_congestion(each) if is_tcp else "" for each in (sock, fresh))
    return tuple(found), own if own != default else ""


def _options(sock: socket.socket, *, is_listening: bool) -> Iterator[tuple[int, int]]:
    is_udp = sock.proto == socket.IPPROTO_UDP
    names = {
        socket.SOL_SOCKET: _ALL | ({_SO_INCOMING_CPU} if is_udp or is_listening else set()),
        socket.IPPROTO_IP: _IPV4 | (_IPV4_UDP if is_udp else set()),
    }
    if sock.family == socket.AF_INET6:
        names[socket.IPPROTO_IPV6] = _IPV6 | (_IPV6_UDP if is_udp else set())
    if is_udp:
        names[_SOL_UDP] = _UDP
    else:
        names[socket.IPPROTO_TCP] = _TCP | (_TCP_LISTENING if is_listening else set())
    return ((level, name) for level in names for name in sorted(names[level]))


def _congestion(sock: socket.socket) -> str:
    content = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, _CONGESTION_BYTES)
    return content.rstrip(b"\0").decode(errors="replace")
