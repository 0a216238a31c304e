# SPDX-License-Identifier: Apache-2.0
"""CRIU is asked once what the OS kernel can do, and told at every restore."""

import json
import os
from pathlib import Path

import pytest

from rekindle.cell import Cell, Command, Network
from rekindle.cell.init import CRIU_FACTS
from rekindle.criu import Criu, kernel_facts, search
from rekindle.home import Home

pytestmark = [
    pytest.mark.criu,
    pytest.mark.skipif(Path(CRIU_FACTS).exists(), reason="CRIU keeps its facts itself here"),
]


@pytest.fixture(name="home")
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("REKINDLE_HOME", str(tmp_path / "home"))
    return Home.from_environment()


@pytest.fixture(name="tool")
def _tool(home: Home) -> Criu:
    """Finding a CRIU tries it, and so learns its facts."""
    return search.find(home)


def programs_of(tool: Criu, facts: bytes | None, tmp_path: Path) -> int:
    """The highest PID of a cell after CRIU was started there: how many processes it took."""
    log = tmp_path / "log"
    command = Command(
        argv=[str(tool.path), "check", "--feature=uffd"],
        env={"PATH": os.environ["PATH"]},
        cwd=Path("/"),
        files={0: Path(os.devnull), 1: log, 2: log},
        criu_facts=facts,
    )
    with Cell() as cell:
        cell.enter(Network.PRIVATE)
        assert cell.run(command, timeout=30) == 0, log.read_text()
        return cell.spawn(Command(argv=["true"], env={}, cwd=Path("/")))


def test_criu_tries_nothing_that_it_is_told(home: Home, tool: Criu, tmp_path: Path) -> None:
    facts = kernel_facts.known(home, tool.path)
    assert facts is not None
    told, untold = programs_of(tool, facts, tmp_path), programs_of(tool, None, tmp_path)
    assert told < untold - 5


def test_facts_of_another_criu_boot_or_privileges_do_not_count(home: Home, tool: Criu) -> None:
    path = home.tools / "criu-facts.json"
    content = json.loads(path.read_bytes())
    for name in content["of"]:
        path.write_text(json.dumps({**content, "of": {**content["of"], name: "other"}}))
        assert kernel_facts.known(home, tool.path) is None
    for text in ("", "{}", "[]", '{"of": 1}', json.dumps({**content, "facts": "xyz"})):
        path.write_text(text)
        assert kernel_facts.known(home, tool.path) is None
    kernel_facts.learn(home, tool.path)
    assert kernel_facts.known(home, tool.path) is not None


def test_what_criu_needs_may_not_be_covered(home: Home, tool: Criu, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("/run/dumps")
    assert kernel_facts.known(home, tool.path, tmp_path) is not None
    for needed in (Path("/run/dumps"), Path("/var/../run/x"), link):
        assert kernel_facts.known(home, tool.path, needed) is None


def test_a_criu_that_does_not_read_them_is_not_told(home: Home, tool: Criu, tmp_path: Path) -> None:
    """It would leave the directory covered, for the server, too."""
    mute = tmp_path / "mute"
    mute.write_text(f"#!/bin/sh\n[ -e {CRIU_FACTS} ] || echo facts >{CRIU_FACTS}\n")
    mute.chmod(0o755)
    kernel_facts.learn(home, mute)
    assert kernel_facts.known(home, mute) is None
