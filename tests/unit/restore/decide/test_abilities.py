# SPDX-License-Identifier: Apache-2.0
"""What a node can do is tried once, and again once that may have changed."""

import json
import os
import subprocess
import sys
import timeit
from pathlib import Path
from typing import Any, Self

import pytest

from rekindle.criu import Criu, search
from rekindle.errors import CapabilityError, RekindleError
from rekindle.home import Home
from restore.decide import abilities
from restore.decide.abilities import Abilities, probe

CRIU = Criu(path=Path("/criu"), version="4.2.1")


@pytest.fixture(autouse=True)
def of_this_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """What memory is free changes from one look to the next."""
    monkeypatch.setattr("rekindle.node.memory.available_bytes", lambda: 5 << 30)


class Node:
    """One on which cells can be made, and CRIU works, unless it is said otherwise."""

    def __init__(self) -> None:
        self.lack: RekindleError | None = None
        self.criu_lack: CapabilityError | None = None
        self.privileges = {"kernel": "6.8.0", "CapEff": "ff"}
        self.cells = 0

    def find(self, _: Home) -> Criu:
        if self.criu_lack is not None:
            raise self.criu_lack
        return CRIU


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Node:
    node = Node()

    class Cell:
        def __enter__(self) -> Self:
            node.cells += 1
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def enter(self, *_: Any) -> None:
            if node.lack is not None:
                raise node.lack

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(abilities, "Cell", Cell)
    monkeypatch.setattr(abilities, "privileges", lambda: dict(node.privileges))
    monkeypatch.setattr(search, "find", node.find)
    return node


def test_that_cells_work_is_remembered(node: Node, home: Home) -> None:
    for _ in range(3):
        assert probe(home) == Abilities(criu=CRIU, memory_bytes=5 << 30)
    assert node.cells == 1


@pytest.mark.parametrize(("name", "value"), [("kernel", "6.9.0"), ("CapEff", "0"), ("label", "confined")])
def test_it_is_tried_again_once_something_has_changed(node: Node, home: Home, name: str, value: str) -> None:
    probe(home)
    node.privileges[name] = value
    probe(home)
    probe(home)
    assert node.cells == 2


def test_that_cells_do_not_work_is_not_remembered(node: Node, home: Home) -> None:
    node.lack = CapabilityError("a cell cannot be made", cause="unshare: Operation not permitted")
    for _ in range(2):
        assert probe(home) == Abilities(problems={"privileges": "unshare: Operation not permitted"})
    assert node.cells == 2
    node.lack = None
    assert probe(home) == Abilities(criu=CRIU, memory_bytes=5 << 30)
    node.lack = CapabilityError("nobody asks")
    assert probe(home) == Abilities(criu=CRIU, memory_bytes=5 << 30)


def test_a_lack_without_a_cause_is_told(node: Node, home: Home) -> None:
    node.lack = CapabilityError("a cell cannot be made")
    assert probe(home).problems == {"privileges": "a cell cannot be made"}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b'{"kernel": "6.8.0"}'])
def test_what_was_remembered_and_cannot_be_read_is_tried_again(
    node: Node, home: Home, content: bytes
) -> None:
    (home.tools / "cells-that-work.json").write_bytes(content)
    assert probe(home) == Abilities(criu=CRIU, memory_bytes=5 << 30)
    assert node.cells == 1
    assert json.loads((home.tools / "cells-that-work.json").read_bytes()) == node.privileges


def test_where_nothing_can_be_remembered_it_is_tried_each_time(
    node: Node, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(abilities, "write_atomically", refuse)
    for number in (1, 2):
        assert probe(home) == Abilities(criu=CRIU, memory_bytes=5 << 30)
        assert node.cells == number


def test_who_is_not_root_tries_nothing(node: Node, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert probe(home) == Abilities(problems={"privileges": "running as user 1000, not as root"})
    assert node.cells == 0


def test_a_lack_of_criu_is_told_with_its_cause(node: Node, home: Home) -> None:
    node.criu_lack = CapabilityError("there is no CRIU on this machine")
    assert probe(home) == Abilities(problems={"criu": "there is no CRIU on this machine"})
    node.criu_lack = CapabilityError("CRIU 3.19 does not work", cause="Error (net.c:1)")
    assert probe(home) == Abilities(problems={"criu": "CRIU 3.19 does not work: Error (net.c:1)"})


# On this machine.

PROBE = """
import json, sys
from pathlib import Path
from restore.decide.abilities import probe
from rekindle.home import Home
able = probe(Home(Path(sys.argv[1])))
print(json.dumps([able.criu.version if able.criu else None, dict(able.problems)]))
"""


def probed(home: Path, *prefix: str) -> Any:
    done = subprocess.run(
        [*prefix, sys.executable, "-c", PROBE, str(home)], capture_output=True, timeout=60, check=True
    )
    return json.loads(done.stdout)


@pytest.mark.criu
def test_a_root_without_capabilities_can_do_little_and_that_is_not_remembered(tmp_path: Path) -> None:
    version, lacks = probed(tmp_path, "setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin")
    assert version is None
    assert list(lacks) == ["privileges"]
    assert "not permitted" in lacks["privileges"]
    version, lacks = probed(tmp_path)
    assert version
    assert lacks == {}
    assert list(probed(tmp_path, "setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin")[1]) == [
        "privileges"
    ]


@pytest.mark.criu
def test_the_second_look_takes_next_to_no_time(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    assert probe(home).criu is not None
    assert min(timeit.repeat(lambda: probe(home), number=1, repeat=5)) < 0.02
