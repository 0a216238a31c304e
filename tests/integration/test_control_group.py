# SPDX-License-Identifier: Apache-2.0
"""Signals to everything in a control group, as systemd (KillMode=control-group) and container runtimes send
them: the server ends as it would without us."""

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import wait_for
from tests.integration.scenes import MULE, Running, Saved, Scene, save, scene
from tests.traces import descendants

pytestmark = pytest.mark.criu
OUTCOMES = {"process": "restored", "cache": "cache", "cold": "cold"}
EVERY_RUNG = pytest.mark.parametrize("rung", OUTCOMES)
SERVER = [*MULE, "drains=1"]


@dataclass(frozen=True, slots=True)
class ControlGroup:
    """A control group, version 2, in which a test starts commands."""

    directory: Path

    @property
    def prefix(self) -> list[str]:
        return ["sh", "-c", f'echo $$ >{self.directory}/cgroup.procs; exec "$@"', "sh"]

    @property
    def pids(self) -> list[int]:
        return [int(line) for line in (self.directory / "cgroup.procs").read_text().split()]

    def send(self, signum: int, order: Callable[[list[int]], list[int]] = list) -> None:
        for pid in order(self.pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)


@pytest.fixture(scope="module")
def mounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("control-groups")
    subprocess.run(["mount", "-t", "cgroup2", "none", str(place)], check=True)
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def group(mounted: Path) -> Iterator[ControlGroup]:
    made = ControlGroup(mounted / f"rekindle-test-{os.getpid()}")
    made.directory.mkdir()
    yield made
    wait_for(lambda: not made.pids, 10)
    made.directory.rmdir()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save(tmp_path_factory.mktemp("saved"), server=SERVER)


@pytest.fixture(name="scene")
def _scene(saved: Saved, group: ControlGroup, tmp_path: Path) -> Iterator[Scene]:
    with scene(saved, tmp_path) as made:
        made.puts(*SERVER)
        made.rekindle.prefix = group.prefix
        yield made


def ready(scene: Scene, rung: str) -> Running:
    running = scene.restore("--rung", rung)
    running.until_ready(OUTCOMES[rung])
    return running


def descendant(command: str) -> int:
    """The PID of the process whose command line begins with, or has as its program, these words."""
    (pid,) = (
        pid
        for pid, words in descendants().items()
        if words.startswith(command) or words.split()[1].endswith(command)
    )
    return pid


ORDERS: dict[str, Callable[[list[int]], list[int]]] = {
    "in the order of their start": list,
    "the youngest first": lambda pids: pids[::-1],
}


@pytest.mark.parametrize("order", ORDERS)
@EVERY_RUNG
def test_sigterm_to_all_lets_the_server_drain(
    scene: Scene, group: ControlGroup, rung: str, order: str
) -> None:
    running = ready(scene, rung)
    with socket.create_connection(("127.0.0.1", running.port), timeout=10) as client:
        client.sendall(b"POST /answer HTTP/1.1\r\nConnection: close\r\nContent-Length: 5\r\n\r\n")
        group.send(signal.SIGTERM, ORDERS[order])
        running.until("mule: signal 15")
        client.sendall(b"hello")  # the rest of a request that was begun before
        assert b"hello" in b"".join(iter(lambda: client.recv(1000), b""))
    assert running.process.wait(20) == 0, running.said
    assert running.said.count("mule: signal") == 1, running.said
    assert "error" not in running.said
    scene.nothing_is_left(kept=rung == "cache")


@EVERY_RUNG
def test_a_second_signal_to_all_ends_the_server_at_once(scene: Scene, group: ControlGroup, rung: str) -> None:
    running = ready(scene, rung)
    group.send(signal.SIGTERM)
    running.until("mule: signal 15")
    time.sleep(0.2)
    group.send(signal.SIGINT)
    assert running.process.wait(20) == 9
    assert running.said.count("mule: signal") == 2


@EVERY_RUNG
def test_a_second_signal_to_us_alone_ends_the_server_at_once(
    scene: Scene, group: ControlGroup, rung: str
) -> None:
    """Whoever the first was sent to."""
    running = ready(scene, rung)
    group.send(signal.SIGTERM)
    running.until("mule: signal 15")
    time.sleep(0.2)
    running.send(signal.SIGTERM)
    assert running.process.wait(20) == 9
    assert running.said.count("mule: signal 15") == 2


@EVERY_RUNG
def test_two_signals_to_us_alone_are_two_for_the_server(scene: Scene, rung: str) -> None:
    running = ready(scene, rung)
    running.send(signal.SIGTERM)
    running.until("mule: signal 15")
    running.send(signal.SIGINT)
    assert running.process.wait(20) == 9
    assert running.said.count("mule: signal") == 2


@EVERY_RUNG
def test_other_signals_to_all_are_left_to_the_server(scene: Scene, group: ControlGroup, rung: str) -> None:
    running = ready(scene, rung)
    for _ in range(3):
        group.send(signal.SIGUSR1)
        time.sleep(0.2)
    running.until("mule: signal 10")
    assert running.said.count("mule: signal 10") == 3
    assert running.ask("/health") == "ready"
    group.send(signal.SIGINT)
    assert running.process.wait(20) == 0
    assert running.said.count("mule: signal") == 4


def test_a_server_signals_its_pid_1_and_hears_us_all_the_same(scene: Scene) -> None:
    """It is not the sender of what we get."""
    running = ready(scene, "process")
    inside = [pid for pid, command in descendants().items() if "mule.py" in command and "sh" not in command][
        -1
    ]
    enter = ["nsenter", "--target", str(inside), "--pid", "--mount"]
    subprocess.run([*enter, "kill", "-TERM", "1"], check=True)
    running.send(signal.SIGTERM)
    assert running.process.wait(20) == 0
    assert running.said.count("mule: signal 15") == 1


def test_the_end_of_the_shell_above_the_server_is_not_the_servers_end(scene: Scene) -> None:
    """Images made before the shell outlived such signals: here, it is killed."""
    running = ready(scene, "process")
    os.kill(descendant("/bin/sh -c "), signal.SIGKILL)
    time.sleep(0.2)
    assert running.ask("/health") == "ready"
    running.send(signal.SIGTERM)
    assert running.process.wait(20) == 0
    scene.nothing_is_left()


@EVERY_RUNG
def test_sigkill_to_all_leaves_nothing(scene: Scene, group: ControlGroup, rung: str) -> None:
    running = ready(scene, rung)
    group.send(signal.SIGKILL)
    assert running.process.wait(20) == -signal.SIGKILL
    wait_for(lambda: not group.pids, 10)
    scene.rekindle.prefix = []
    assert (
        scene.rekindle("doctor", "--check", "root").status == 0
    )  # the next command removes work directories
    scene.nothing_is_left(kept=rung == "cache")


def test_sigterm_to_all_before_it_is_ready_ends_it(scene: Scene, group: ControlGroup) -> None:
    """At any moment of a restore."""
    for delay in itertools.count():
        running = scene.restore()
        wait_for(lambda: group.pids, 10)
        time.sleep(delay * 0.06)
        is_ready = running.path.exists()
        group.send(signal.SIGTERM)
        status = running.process.wait(20)
        assert "Traceback" not in running.said
        if is_ready:
            assert status == 0
            break
        # The very first signals come before Python has started; the last ones just after it was ready.
        assert status in {-signal.SIGTERM, 128 + signal.SIGTERM, 0}, running.said
    scene.nothing_is_left()


def test_sigterm_to_all_breaks_a_snapshot_off(scene: Scene, group: ControlGroup) -> None:
    log, image = scene.directory / "log", f"oci:{scene.directory}/images:2"
    words = ["snapshot", image, "--ready-url", f"http://127.0.0.1:{scene.saved.port}/never", "--"]
    process = scene.rekindle.spawn(*words, *MULE, "never-ready", str(scene.saved.port), log=log)
    wait_for(lambda: "mule.py" in " ".join(descendants().values()) and len(group.pids) >= 5, 20)
    time.sleep(0.3)
    group.send(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM, log.read_text()
    assert "dmesg" not in log.read_text()
    wait_for(lambda: not group.pids, 10)
