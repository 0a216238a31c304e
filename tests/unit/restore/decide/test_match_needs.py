# SPDX-License-Identifier: Apache-2.0
"""What a process takes from a node: each thing that is not there forbids the process, by name."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from oci import image as images
from oci import media_types
from oci.image import Image
from oci.layout import Layout
from rekindle.cell import Network
from rekindle.engine import Endpoint
from rekindle.home import Home
from rekindle.node import huge_pages, tasks
from rekindle.node.huge_pages import HugePages
from rekindle.record import Record
from restore import dumps
from restore.decide import match_needs
from restore.decide.rules import reason_for
from tests.samples.record import RECORD


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def of(record: Record, place: Path) -> Image:
    layout = Layout.create(place / "layout")
    return images.build(layout, record, [layout.put(b"layer", media_types.DUMP_LAYER)])


def codes(record: Record, home: Home) -> list[str]:
    found = [reason_for(each) for each in match_needs.compare(of(record, home.root), home, unpacked=False)]
    assert all(reason.hard and reason.advice for reason in found)
    return [reason.code for reason in found]


def with_process(**changes: Any) -> Record:
    return structs.replace(RECORD, process=structs.replace(RECORD.process, **changes))


def test_a_node_that_has_all_is_fine(home: Home) -> None:
    assert codes(RECORD, home) == []


@pytest.mark.parametrize(("there", "expected"), [({}, True), ({2 << 20: 2}, True), ({2 << 20: 3}, False)])
def test_huge_pages(
    home: Home, monkeypatch: pytest.MonkeyPatch, there: dict[int, int], expected: bool
) -> None:
    monkeypatch.setattr(huge_pages, "available", lambda: there)
    record = with_process(huge_pages=(HugePages(page_bytes=2 << 20, pages=3),))
    assert ("huge-pages" in codes(record, home)) is expected


def test_tasks(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    for there, expected in [(None, []), (RECORD.process.tasks, ["tasks"]), (10_000, [])]:
        monkeypatch.setattr(tasks, "available", lambda there=there: there)
        assert codes(RECORD, home) == expected


def test_a_full_disk_counts_what_can_be_removed(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dumps, "_room_bytes", lambda *_: 1000)
    monkeypatch.setattr(dumps, "free_bytes", lambda _: 0)
    assert codes(RECORD, home) == ["disk"]
    old = home.dumps / ("0" * 64)
    old.mkdir(mode=0o700)
    (old / "ready.json").write_text('{"boot": "", "bytes": 1000000000, "seal": ""}')
    assert codes(RECORD, home) == []


def test_ipv6(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    record = structs.replace(RECORD, listeners=(RECORD.endpoint, Endpoint(host="::", port=8001)))
    assert codes(record, home) == []

    def refuse(family: int, *_: object) -> None:
        assert family == socket.AF_INET6
        raise OSError(97, os.strerror(97))

    monkeypatch.setattr(socket, "socket", refuse)
    assert codes(record, home) == ["ipv6"]


def test_a_port_of_the_host(home: Home) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = Endpoint(host="127.0.0.1", port=other.getsockname()[1])
        record = structs.replace(with_process(network=Network.HOST), listeners=(taken,))
        assert codes(record, home) == ["port"]
        assert codes(structs.replace(RECORD, listeners=(taken,)), home) == [], "a cell has its own"
    assert codes(record, home) == []
