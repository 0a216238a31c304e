# SPDX-License-Identifier: Apache-2.0
"""The API key of today, and no other, opens a restored vLLM, whatever the image holds.

vLLM is the one that is not there (tests/servers/fake_vllm). Its real middleware is in test_gate.py, and the
whole of it in test_vllm_key.py.
"""

import http.client
import json
import os
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PREFIX, Rekindle, free_port, listening, wait_for
from tests.fakes.vllm import FakeVllm

pytestmark = pytest.mark.criu
ONE, TWO = "Zq8-vixen-41-Lark", "Wp3-otter-77-Finch"
KEEP = ["--allow-secret", "api-key", "--allow-secret", "VLLM_API_KEY"]


class Started:
    """A `rekindle restore` in the foreground."""

    def __init__(self, process: "subprocess.Popen[bytes]", report: Path, log: Path, port: int) -> None:
        self.process, self.path, self.log, self.port = process, report, log, port

    @property
    def report(self) -> dict[str, Any]:
        return dict(json.loads(self.path.read_text()))

    @property
    def codes(self) -> list[str]:
        return [each["code"] for each in self.report["reasons"] if each["hard"]]

    def status(self, key: str | None = None, path: str = "/v1/models") -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request("GET", path, headers={} if key is None else {"Authorization": f"Bearer {key}"})
        status = connection.getresponse().status
        connection.close()
        return status


class Stage:
    """A home, an image in it, and the restores of a test."""

    def __init__(self, rekindle: Rekindle, place: Path) -> None:
        self.rekindle, self.place, self.port = rekindle, place, free_port()
        self.vllm = FakeVllm(place / "vllm")
        rekindle.env |= {
            **self.vllm.environment([]),
            "HOME": str(self.vllm.place),
            "REKINDLE_PREFIX": str(PREFIX),
        }
        rekindle.env["PATH"] = f"{self.vllm.place}/bin:{os.environ['PATH']}"
        self._running: list[Started] = []

    @property
    def command(self) -> list[str]:
        return self.vllm.command(self.port)

    def snapshot(self, *words: str, flags: tuple[str, ...] = (), env: dict[str, str] | None = None) -> None:
        command = [*self.command, *words]
        done = self.rekindle("snapshot", "tiny", *flags, "--", *command, env=env)
        assert done.status == 0, done.stderr

    def restore(
        self,
        *words: str,
        command: list[str] | None = None,
        env: dict[str, str] | None = None,
        flags: tuple[str, ...] = (),
    ) -> Started:
        number = len(self._running)
        report, log = self.place / f"report-{number}", self.place / f"log-{number}"
        whole = [*(self.command if command is None else command), *words]
        given = ["--", *whole] if whole else []
        process = self.rekindle.spawn(
            "restore", "tiny", "--report", str(report), *flags, *given, log=log, env=env
        )
        started = Started(process, report, log, self.port)
        self._running.append(started)
        wait_for(lambda: report.exists() or process.poll() is not None, 60)
        assert process.poll() is None, log.read_text()
        wait_for(lambda: listening(self.port), 10)
        return started

    def close(self) -> None:
        for each in self._running:
            each.process.terminate()
        for each in self._running:
            each.process.wait(30)


@pytest.fixture
def stage(rekindle: Rekindle, tmp_path: Path) -> Iterator[Stage]:
    made = Stage(rekindle, tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("way", ["variable", "option", "env", "shell", "abbreviated"])
def test_a_key_that_no_image_holds_opens_the_restored_process(stage: Stage, way: str) -> None:
    stage.snapshot()
    plain, command, env = stage.command, stage.command, None
    flags: tuple[str, ...] = ("--require", "process")
    match way:
        case "variable":
            env = {"VLLM_API_KEY": ONE}
        case "option":
            command = [*plain, "--api-key", ONE]
        case "abbreviated":
            command = [*plain, f"--api_k={ONE}"]
        case "env":
            command = ["env", f"VLLM_API_KEY={ONE}", *plain]
        case "shell":
            command = ["sh", "-c", f"exec {shlex.join(plain)} --api-key $KEY"]
            env = {"KEY": ONE}
            flags = (*flags, "--accept-environment", "KEY")  # whether the server reads it, too, is unknown
    started = stage.restore(command=command, env=env, flags=flags)
    assert started.report["outcome"] == "restored", started.log.read_text()
    assert [started.status(key) for key in (None, TWO, ONE)] == [401, 401, 200]
    assert started.status(None, "/health") == 200
    assert started.status(None, "/no/such/path") == 404
    assert ONE not in started.log.read_text() + started.path.read_text()


def test_without_a_key_nothing_is_asked(stage: Stage) -> None:
    stage.snapshot()
    started = stage.restore()
    assert started.report["outcome"] == "restored"
    assert [started.status(None), started.status(ONE)] == [200, 200]
    assert "h11" not in Path(f"/proc/{started.process.pid}/maps").read_text()


def test_a_key_in_a_config_file_is_enforced(stage: Stage) -> None:
    config = stage.place / "c.yaml"
    config.write_text(json.dumps({"max-model-len": 512}))
    stage.snapshot("--config", str(config))
    config.write_text(json.dumps({"max-model-len": 512, "api_key": [ONE]}))
    started = stage.restore("--config", str(config))
    assert [started.status(key) for key in (None, TWO, ONE)] == [401, 401, 200]


def test_several_keys_open_it(stage: Stage) -> None:
    stage.snapshot()
    started = stage.restore("--api-key", ONE, TWO)
    assert started.report["outcome"] == "restored"
    assert [started.status(key) for key in (None, ONE, TWO, f"{ONE} {TWO}")] == [401, 200, 200, 401]


@pytest.mark.parametrize("way", ["variable", "option"])
def test_a_snapshot_that_holds_the_key_of_today_is_restored(stage: Stage, way: str) -> None:
    words, env = ((), {"VLLM_API_KEY": ONE}) if way == "variable" else (("--api-key", ONE), None)
    stage.snapshot(*words, flags=tuple(KEEP), env=env)
    started = stage.restore(*words, env=env)
    assert started.report["outcome"] == "restored", started.log.read_text()
    assert [started.status(key) for key in (None, TWO, ONE)] == [401, 401, 200]


@pytest.mark.parametrize("today", [[TWO], [ONE, TWO], []])
def test_after_a_rotation_only_the_keys_of_today_open_it(stage: Stage, today: list[str]) -> None:
    """The server in the image accepts the first key, so no process with that is restored."""
    stage.snapshot("--api-key", ONE, flags=tuple(KEEP))
    started = stage.restore(*(["--api-key", *today] if today else []))
    assert started.report["outcome"] in {"cache", "cold"}, started.log.read_text()
    assert {"oracle-mismatch", "mismatch", "api-key"} & set(started.codes)
    statuses = {key: started.status(key) for key in (None, ONE, TWO)}
    assert statuses == {key: 200 if not today or key in today else 401 for key in (None, ONE, TWO)}


def test_a_server_on_the_hosts_network_cannot_be_gated(stage: Stage) -> None:
    stage.snapshot(flags=("--network", "host"))
    started = stage.restore("--api-key", ONE)
    assert started.report["outcome"] in {"cache", "cold"}
    assert "api-key" in started.codes
    assert [started.status(key) for key in (None, ONE)] == [401, 200]


def test_nobody_reaches_the_server_but_through_the_gate(stage: Stage) -> None:
    stage.snapshot()
    started = stage.restore("--api-key", ONE)
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listeners = {fields[1] for fields in lines if fields[3] == "0A"}
    assert len([each for each in listeners if each.endswith(f":{stage.port:04X}")]) == 1
    assert started.status() == 401


@pytest.mark.parametrize("way", ["variable", "option"])
def test_a_server_that_hibernates_needs_its_key_again_and_holds_none(stage: Stage, way: str) -> None:
    stage.snapshot()
    env = {"VLLM_API_KEY": ONE} if way == "variable" else None
    words = ["--api-key", ONE] if way == "option" else []
    home = stage.rekindle.home

    def run(*command: str, key: str | None = None) -> int:
        done = stage.rekindle(*command, env=None if key is None else {"VLLM_API_KEY": key})
        assert ONE not in done.stdout + done.stderr
        return done.status

    done = stage.rekindle(
        "restore", "tiny", "--detach", "--name", "web", "--", *stage.command, *words, env=env
    )
    assert done.status == 0, done.stderr
    web = Started(subprocess.Popen(["true"]), home, home, stage.port)
    web.process.wait()
    try:
        assert [web.status(key) for key in (None, TWO, ONE)] == [401, 401, 200]
        assert run("hibernate", "web") == 0
        holders = [path for path in home.rglob("*") if path.is_file() and ONE.encode() in path.read_bytes()]
        assert holders == []
        assert run("wake", "web") == 2
        assert run("wake", "web", key=TWO) == 0
        assert [web.status(key) for key in (None, ONE, TWO)] == [401, 401, 200]
    finally:
        run("stop", "web")
