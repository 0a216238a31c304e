# SPDX-License-Identifier: Apache-2.0
"""A service of a real systemd, which sends its signals to the whole control group (KillMode=control-group).

It runs as PID 1 of namespaces of its own, in a control group of its own, and knows no unit but ours.
"""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import wait_for
from tests.integration.scenes import MULE, Saved, Scene, save, scene

SYSTEMD = Path("/usr/lib/systemd/systemd")
pytestmark = [
    pytest.mark.criu,
    pytest.mark.skipif(not SYSTEMD.exists(), reason="this test needs systemd"),
]
SERVER = [*MULE, "drains=1"]
OUTCOMES = {"process": "restored", "cold": "cold"}
SERVICE = """
[Unit]
DefaultDependencies=no
[Service]
Type=notify
ExecStart={command}
ExecStopPost=/bin/sh -c 'echo $SERVICE_RESULT $EXIT_CODE $EXIT_STATUS >{result}'
StandardOutput=append:{log}
StandardError=inherit
KillMode=control-group
TimeoutStopSec=20
TimeoutStartSec=60
"""
BOOT = """
mount -t cgroup2 none /sys/fs/cgroup
mount -t tmpfs tmpfs /run
export container=test SYSTEMD_UNIT_PATH=$1
exec {systemd} --system --unit=empty.target --log-target=null --show-status=no
"""


@dataclass(slots=True)
class Systemd:
    """A systemd and its service `rekindle`, whose files are in `place`."""

    place: Path
    pid: int

    def __call__(self, *words: str) -> int:
        done = subprocess.run(
            ["nsenter", f"--target={self.pid}", "--all", "systemctl", *words],
            capture_output=True,
            check=False,
            timeout=60,
        )
        return done.returncode

    @property
    def log(self) -> str:
        return (self.place / "log").read_text()

    @property
    def result(self) -> str:
        """How the service ended: systemd's result, and the code and status of its main process."""
        wait_for((self.place / "result").exists, 10)
        return (self.place / "result").read_text().strip()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save(tmp_path_factory.mktemp("saved"), server=SERVER)


@pytest.fixture(name="scene")
def _scene(saved: Saved, tmp_path: Path) -> Iterator[Scene]:
    with scene(saved, tmp_path) as made:
        made.puts(*SERVER)
        yield made


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Path]:
    """A control group of version 2."""
    mounted = tmp_path / "control-groups"
    mounted.mkdir()
    subprocess.run(["mount", "-t", "cgroup2", "none", str(mounted)], check=True)
    made = mounted / f"rekindle-systemd-{os.getpid()}"
    made.mkdir()
    yield made
    wait_for(lambda: not any(path.read_text() for path in made.rglob("cgroup.procs")), 10)
    for directory in sorted((path for path in made.rglob("*") if path.is_dir()), reverse=True):
        directory.rmdir()
    made.rmdir()
    subprocess.run(["umount", str(mounted)], check=True)


@pytest.fixture
def systemd(scene: Scene, group: Path, tmp_path: Path) -> Iterator[Systemd]:
    units, boot = tmp_path / "units", tmp_path / "boot"
    units.mkdir()
    (units / "empty.target").write_text("[Unit]\nDefaultDependencies=no\n")
    boot.write_text(BOOT.format(systemd=SYSTEMD))
    join = f'echo $$ >{group}/cgroup.procs; exec "$@"'
    namespaces = ["--mount", "--pid", "--fork", "--mount-proc", "--cgroup", "--uts", "--ipc", "--kill-child"]
    command = ["unshare", *namespaces, "--propagation=private", "sh", "-eu", str(boot), str(units)]
    with subprocess.Popen(["sh", "-c", join, "sh", *command], stdin=subprocess.DEVNULL) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        try:
            wait_for(lambda: children.read_text(), 10)
            made = Systemd(tmp_path, int(children.read_text()))
            wait_for(lambda: made("is-active", "empty.target") == 0, 20)
            yield made
        finally:
            process.send_signal(signal.SIGKILL)


def start(systemd: Systemd, scene: Scene, rung: str) -> int:
    """Starts a restore as a service; returns systemctl's status, when the service says that it is ready."""
    report = systemd.place / "report.json"
    words = ["restore", scene.saved.image, *scene.saved.key.verify, "--rung", rung, "--report", str(report)]
    environment = [f"{name}={value}" for name, value in scene.rekindle.environment().items()]
    command = ["/usr/bin/env", *environment, sys.executable, "-m", "rekindle", *words]
    script = systemd.place / "start"
    script.write_text(f"#!/bin/sh\nexec {shlex.join(command)}\n")
    script.chmod(0o755)
    service = SERVICE.format(command=script, result=systemd.place / "result", log=systemd.place / "log")
    (systemd.place / "units/rekindle.service").write_text(service)
    systemd("daemon-reload")
    return systemd("start", "rekindle")


@pytest.mark.parametrize("rung", OUTCOMES)
def test_systemctl_stop_lets_the_server_drain(systemd: Systemd, scene: Scene, rung: str) -> None:
    assert start(systemd, scene, rung) == 0, systemd.log
    assert f"ready ({OUTCOMES[rung]})" in systemd.log
    assert systemd("stop", "rekindle") == 0
    assert systemd.result == "success exited 0", systemd.log
    assert systemd.log.count("mule: signal 15") == 1
    assert "error" not in systemd.log
    assert not list((scene.rekindle.home / "run").iterdir())


def test_the_end_of_the_server_is_the_end_of_the_service(systemd: Systemd, scene: Scene) -> None:
    assert start(systemd, scene, "process") == 0, systemd.log
    program = "import sys, urllib.request as u; u.urlopen(sys.argv[1], b'{}', 30)"
    subprocess.run(
        [sys.executable, "-c", program, f"http://127.0.0.1:{scene.saved.port}/end"],
        check=False,
        stderr=subprocess.DEVNULL,
        timeout=60,
    )
    assert systemd.result == "success exited 0", systemd.log
    assert systemd("is-active", "rekindle") != 0


def test_systemctl_kill_of_everything_leaves_nothing(systemd: Systemd, scene: Scene) -> None:
    assert start(systemd, scene, "process") == 0, systemd.log
    assert systemd("kill", "--signal=KILL", "rekindle") == 0
    assert systemd.result == "signal killed KILL", systemd.log
