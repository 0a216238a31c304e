# SPDX-License-Identifier: Apache-2.0
"""Servers that listen on several ports, as HTTP, gRPC and metrics have one each."""

import contextlib
import json
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SERVERS, Rekindle, free_port, wait_for, workhorse_flags

pytestmark = pytest.mark.criu


class Scene:
    """An image of a server at 127.0.0.1 that has another port there and one at every IPv6 address."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.main, self.other, self.ipv6 = free_port(), free_port(), free_port()
        self.rekindle = Rekindle(place / "home", {"TMPDIR": str(place)})
        also = f"also=127.0.0.1:{self.other},[::]:{self.ipv6}"
        self.command = [sys.executable, str(SERVERS / "workhorse.py"), str(self.main), also]
        words = ["snapshot", "horse", "--no-prove", *workhorse_flags(self.main), "--", *self.command]
        done = self.rekindle(*words)
        assert done.status == 0, done.stderr
        self.log = place / "log"

    @contextlib.contextmanager
    def restored(self, *flags: str, rung: str = "process") -> Iterator[dict[str, Any]]:
        """Restores the server; yields the report. What was said is in the log."""
        report = self.place / "report.json"
        report.unlink(missing_ok=True)
        self.log.unlink(missing_ok=True)
        words = ["restore", "horse", "--rung", rung, "--require", "process", "--report", str(report), *flags]
        if rung == "cold":
            words.remove("--require")
            words.remove("process")
        process = self.rekindle.spawn(*words, log=self.log)
        try:
            wait_for(lambda: report.exists() or process.poll() is not None, 60)
            assert process.poll() is None, self.log.read_text()
            yield json.loads(report.read_text())
        finally:
            process.kill()
            process.wait(30)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("ports"))


def answers(port: int, host: str = "127.0.0.1") -> bool:
    try:
        with urllib.request.urlopen(f"http://{host}:{port}/health", timeout=20) as answer:
            return bytes(answer.read()) == b"ready"
    except urllib.error.URLError:
        return False


def test_every_port_is_published_where_it_listened(scene: Scene) -> None:
    record = scene.rekindle("inspect", "horse", "--json").json["record"]
    ports = sorted([scene.other, scene.ipv6])
    assert [each["port"] for each in record["listeners"]] == [scene.main, *ports]
    with scene.restored() as report:
        assert all(answers(port) for port in (scene.main, scene.other))
        assert answers(scene.ipv6, "[::1]")
        assert report["endpoint"] == f"127.0.0.1:{scene.main}"
        assert all(each["server"] == each["published"] for each in report["addresses"])
    said = scene.log.read_text()
    assert f"127.0.0.1:{scene.other}" in said
    assert "not published" not in said


def test_what_is_not_published_is_told(scene: Scene) -> None:
    chosen = free_port()
    with scene.restored("--publish", str(chosen)) as report:
        assert answers(chosen), "one port is for the main one, as ever"
        assert not answers(scene.other)
        left = {each["server"] for each in report["addresses"] if each["published"] is None}
    assert left == {f"127.0.0.1:{scene.other}", f"[::]:{scene.ipv6}"}
    assert all(server in scene.log.read_text() for server in left)


def test_each_port_may_be_published_at_another(scene: Scene) -> None:
    first, second = free_port(), free_port()
    flags = ["--publish", f"{first}:{scene.main}", "--publish", f"127.0.0.1:{second}:{scene.ipv6}"]
    with scene.restored(*flags, "--publish", str(scene.other)) as report:
        assert answers(first)
        assert answers(second)
        assert answers(scene.other), "among several, a port alone is the server's of that number"
        assert report["endpoint"] == f"127.0.0.1:{first}"


def test_a_further_port_that_is_taken_keeps_the_server_from_nothing_else(scene: Scene) -> None:
    with socket.create_server(("127.0.0.1", scene.other)), scene.restored():
        assert answers(scene.main)
    assert f"127.0.0.1:{scene.other} is not published: Address already in use" in scene.log.read_text()
    with socket.create_server(("127.0.0.1", scene.other)):
        words = ["--publish", str(scene.main), "--publish", str(scene.other)]
        assert scene.rekindle("restore", "horse", *words).status == 13, "it was asked for"


def test_a_port_on_which_the_server_does_not_listen_is_refused(scene: Scene) -> None:
    done = scene.rekindle("restore", "horse", "--publish", f"{free_port()}:1")
    assert done.status == 2
    assert f"it listens on {scene.main}, " in done.stderr


def test_a_lower_rung_publishes_the_ports_of_the_command(scene: Scene) -> None:
    first, second = free_port(), free_port()
    flags = ["--publish", f"{first}:{scene.main}", "--publish", f"{second}:{scene.other}"]
    with scene.restored(*flags, rung="cold"):
        assert all(answers(port) for port in (first, second, scene.main, scene.other))


def test_a_server_that_runs_has_its_ports_once_it_is_ready(scene: Scene) -> None:
    ready = scene.place / "ready"
    scene.log.unlink(missing_ok=True)
    words = ["run", "stall", *workhorse_flags(scene.main), "--ready-file", str(ready), "--", *scene.command]
    process = scene.rekindle.spawn(*words, log=scene.log)
    try:
        wait_for(lambda: ready.exists() or process.poll() is not None, 60)
        assert all(answers(port) for port in (scene.main, scene.other))
        (line,) = [each for each in scene.log.read_text().splitlines() if "also on" in each]
        assert f"127.0.0.1:{scene.other}" in line
    finally:
        process.terminate()
        process.wait(30)
