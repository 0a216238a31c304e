# SPDX-License-Identifier: Apache-2.0
"""Servers with a garbage collector, restored with their memory mapped, answer as if they had never stopped.

Their runtimes give memory back and take it again in ways of their own. tests/servers/garbage has one server
in three languages. Go is part of what CI has; Node.js and Java are used where they are installed.
"""

import contextlib
import json
import shutil
import subprocess
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.conftest import (
    GO_SERVER,
    SERVERS,
    Rekindle,
    Replica,
    free_port,
    listening,
    need,
    wait_for,
    workhorse_flags,
)

pytestmark = pytest.mark.criu

SOURCES = SERVERS / "garbage"
ROUNDS = 8


def go(_: Path) -> list[str]:
    need(GO_SERVER.exists(), "the server in Go")
    return [str(GO_SERVER)]


def node(_: Path) -> list[str]:
    program = shutil.which("node")
    if program is None:
        pytest.skip("Node.js is not installed")
    return [program, "--expose-gc", str(SOURCES / "garbage.js")]


def java(place: Path) -> list[str]:
    program, compiler = shutil.which("java"), shutil.which("javac")
    if program is None or compiler is None:
        pytest.skip("Java is not installed")
    subprocess.run([compiler, "-d", str(place), str(SOURCES / "Garbage.java")], check=True, timeout=100)
    return [
        program,
        "-XX:-UsePerfData",  # a file of statistics in /tmp that it maps and shares with other programs
        "-Djava.net.preferIPv4Stack=true",  # `listening` looks for no others
        "-XX:+UseG1GC",
        "-Xmx512m",
        *("-cp", str(place), "Garbage"),
    ]


@contextlib.contextmanager
def never_stopped(command: Sequence[str]) -> Iterator[int]:
    port = free_port()
    with subprocess.Popen([*command, str(port)]) as process:
        try:
            wait_for(lambda: listening(port), 60)
            yield port
        finally:
            process.kill()


@pytest.mark.parametrize("runtime", [go, node, java])
def test_a_garbage_collector_goes_on_as_it_would_have(
    runtime: Callable[[Path], list[str]],
    rekindle: Rekindle,
    restore: Callable[..., Replica],
    tmp_path: Path,
    port: int,
) -> None:
    command = runtime(tmp_path)
    done = rekindle("snapshot", "garbage", *workhorse_flags(port), "--", *command, str(port))
    assert done.status == 0, done.stderr
    replica = restore("garbage", free_port())
    assert replica.report["memory"]["mode"] == "mapped"
    with never_stopped(command) as other:
        for _ in range(ROUNDS):
            with urllib.request.urlopen(f"http://127.0.0.1:{other}/work", timeout=100) as response:
                expected = json.load(response)
            assert json.loads(replica.ask("/work", timeout=100)) == expected
            assert expected["bad"] == 0
