# SPDX-License-Identifier: Apache-2.0
"""Compare what a process takes from this node when it is restored with what is free.

Everything here may change at any moment. What is only read from a record is compared elsewhere.
"""

import socket
from collections.abc import Iterator

from oci.image import Image
from rekindle.cell import Network
from rekindle.engine import Endpoint
from rekindle.home import Home
from rekindle.node import huge_pages, tasks
from rekindle.record import Record
from restore import dumps
from restore.decide.difference import Difference

_OWN_TASKS = 5  # the cell's launcher and init, CRIU and its helpers


def compare(image: Image, home: Home, *, unpacked: bool) -> Iterator[Difference]:
    """Yield what the process would not get here. `unpacked`: its dump is ready on this node."""
    record = image.record
    if not unpacked:
        yield from _disk(image, home)
    yield from _tasks(record)
    if record.process.huge_pages:
        yield from _huge_pages(record)
    if any(":" in each.host for each in record.listeners) and not _has_ipv6():
        yield Difference("ipv6", "network", "IPv6", "IPv6 is turned off")
    if record.process.network is Network.HOST:
        yield from _ports(record)


def _disk(image: Image, home: Home) -> Iterator[Difference]:
    needed, there = dumps.room(home, image)
    if needed > there:
        yield Difference(
            "disk", "unpacked dump", f"{needed:,} bytes", f"{there:,} bytes free in {home.dumps}"
        )


def _tasks(record: Record) -> Iterator[Difference]:
    there = tasks.available()
    if there is not None and there < record.process.tasks + _OWN_TASKS:
        needed = f"{record.process.tasks} threads"
        yield Difference("tasks", "processes and threads", needed, f"{there} allowed by pids.max")


def _huge_pages(record: Record) -> Iterator[Difference]:
    there = huge_pages.available()
    for each in record.process.huge_pages:
        if there.get(each.page_bytes, 0) < each.pages:
            name = f"huge pages of {each.page_bytes >> 10:,} KiB"
            yield Difference("huge-pages", name, str(each.pages), str(there.get(each.page_bytes, 0)))


def _has_ipv6() -> bool:
    try:
        socket.socket(socket.AF_INET6, socket.SOCK_STREAM).close()
    except OSError:
        return False
    return True


def _ports(record: Record) -> Iterator[Difference]:
    """Yield the addresses on the host's network that another process has."""
    for each in record.listeners or (record.endpoint,):
        if problem := _taken(each):
            yield Difference("port", "address", str(each), problem)


def _taken(endpoint: Endpoint) -> str:
    """Return why a restored server could not bind an address, or ""."""
    family = socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family is socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((endpoint.host, endpoint.port))
    except OSError as error:
        return error.strerror or str(error)
    return ""
