# SPDX-License-Identifier: Apache-2.0
"""Commands as people write them: the server in them is recognized, or it is named what hides it.

vLLM is the one that is not there (tests/servers/fake_vllm). Wrappers that few machines have are small
programs here, which do what the real ones do and refuse what these refuse.
"""

import json
import os
import shlex
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PREFIX, Rekindle, free_port, listening, wait_for
from tests.fakes.vllm import FakeVllm

pytestmark = pytest.mark.criu

WRAPPERS = {
    # numactl(8): options, then the command in its place.
    "numactl": 'while case "$1" in -*) true;; *) false;; esac; do '
    'case "$1" in --cpunodebind=*|--localalloc) shift;; -N|-m) shift 2;; *) exit 1;; esac; done; exec "$@"',
    "uv": 'test "$1" = run || exit 2; shift; '
    'while test "$1" = --no-sync || test "$1" = --; do shift; done; exec "$@"',
    # tini: a parent that passes signals on, and ends as its child does.
    "tini": 'test "$1" = -- && shift; trap \'kill -TERM $child\' TERM; "$@" & child=$!; '
    "while true; do wait $child; status=$?; kill -0 $child 2>/dev/null || exit $status; done",
}


class Stage:
    """A home, a vLLM that is not there with its model, and wrappers on PATH."""

    def __init__(self, rekindle: Rekindle, place: Path) -> None:
        self.rekindle, self.place, self.port = rekindle, place, free_port()
        self.vllm = FakeVllm(place / "vllm")
        (place / "bin").mkdir()
        for name, text in WRAPPERS.items():
            (place / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
            (place / "bin" / name).chmod(0o755)
        self.config(self.port)
        (place / "activate").touch()
        rekindle.env |= {
            **self.vllm.environment([]),
            "HOME": str(self.vllm.place),
            "REKINDLE_PREFIX": str(PREFIX),
            "PATH": f"{self.vllm.place}/bin:{place}/bin:{os.environ['PATH']}",
            "THE_PORT": str(self.port),
            "THE_MODEL": str(self.vllm.model),
            "POD_LEN": "64",
        }
        self.log, self.report = place / "log", place / "report"

    def config(self, port: int) -> None:
        """Write what `--config` reads: JSON is YAML, too."""
        known = {
            "model": str(self.vllm.model),
            "served-model-name": "tiny",
            "host": "127.0.0.1",
            "port": port,
        }
        (self.place / "serve.yaml").write_text(json.dumps(known))

    def words(self, command: str) -> list[str]:
        options = f"--served-model-name tiny --host 127.0.0.1 --port {self.port}"
        names = {"M": self.vllm.model, "O": options, "D": self.place, "P": self.port}
        return shlex.split(command.format(**names))

    def snapshot(self, command: str) -> Any:
        return self.rekindle("snapshot", "tiny", "--no-prove", "--", *self.words(command))

    def restored(self, command: str, **env: str) -> dict[str, Any]:
        """The report of a restore in place of a command, of which the server answered."""
        self.report.unlink(missing_ok=True)
        words = ["restore", "tiny", "--report", str(self.report), "--", *self.words(command)]
        process = self.rekindle.spawn(*words, log=self.log, env=env)
        try:
            wait_for(lambda: self.report.exists() or process.poll() is not None, 60)
            assert process.poll() is None, self.log.read_text()
            report: dict[str, Any] = json.loads(self.report.read_text())
            port = int(report["endpoint"].rpartition(":")[2])
            wait_for(lambda: listening(port), 10)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=10) as response:
                assert json.loads(response.read())["data"][0]["id"] == "tiny"
            return report
        finally:
            process.terminate()
            assert process.wait(30) in {0, 143}, self.log.read_text()

    def reasons(self, command: str, **env: str) -> set[tuple[str, bool]]:
        """What `match` says against the process for a command."""
        done = self.rekindle("match", "tiny", "--json", "--", *self.words(command), env=env)
        assert done.status in {0, 3}, done.stderr
        reasons = done.json["steps"][0]["reasons"]
        return {(each["code"], each["hard"]) for each in reasons if each["code"] != "not-proved"}


@pytest.fixture
def stage(rekindle: Rekindle, tmp_path: Path) -> Stage:
    return Stage(rekindle, tmp_path)


PLAIN = "vllm serve {M} {O}"
AS_PEOPLE_WRITE_IT = {
    "a shell": 'bash -c "vllm serve {M} --served-model-name tiny --host 127.0.0.1 --port $THE_PORT"',
    "a shell in a directory": "sh -c 'cd {D} && exec vllm serve $THE_MODEL {O}'",
    "env": "env HF_HUB_OFFLINE=1 vllm serve {M} {O}",
    "numactl": "numactl -N 0 --localalloc vllm serve {M} {O}",
    "uv": "uv run --no-sync -- vllm serve {M} {O}",
    "tini": "tini -- vllm serve {M} {O}",
    "a module": "python -m vllm.entrypoints.openai.api_server --model {M} {O}",
    "a configuration": "vllm serve --config {D}/serve.yaml",
    "underscores": "vllm serve {M} --served_model_name tiny --host=127.0.0.1 --port={P}",
    "an abbreviation": "vllm serve {M} --served-mod tiny --host 127.0.0.1 --po {P}",
    "real-life": "tini -- bash -c 'ulimit -n 900; exec taskset -c 0 nice -n 1 vllm serve {M} {O} 2>&1'",
    "a time limit": "timeout 1h setsid -w vllm serve {M} {O}",
    "fewer privileges": "setpriv --bounding-set=-sys_module --nnp vllm serve {M} {O}",
}


@pytest.mark.parametrize("way", AS_PEOPLE_WRITE_IT)
def test_the_server_is_recognized_saved_and_restored(stage: Stage, way: str) -> None:
    command = AS_PEOPLE_WRITE_IT[way]
    done = stage.snapshot(command)
    assert done.status == 0, done.stderr
    record = stage.rekindle("inspect", "tiny", "--json").json["record"]
    assert record["engine"]["name"] == "vllm", "and so without --ready-url and an oracle of the user's"
    assert record["endpoint"]["port"] == stage.port
    assert record["weights"]["model"] == str(stage.vllm.model)
    report = stage.restored(command)
    assert (report["outcome"], report["oracle"]["match"]) == ("restored", True), report["reasons"]


@pytest.mark.parametrize(
    "way", ["bash -c 'vllm serve {M} {O}'", "sh -c 'exec vllm serve $THE_MODEL --served-model-name tiny'"]
)
def test_a_shell_around_it_makes_no_difference_and_the_port_none(stage: Stage, way: str) -> None:
    assert stage.snapshot(PLAIN).status == 0
    assert stage.reasons(way) == set()
    assert stage.reasons("exec-nothing vllm serve") == {("command", True)}


@pytest.mark.parametrize(
    ("saved", "today", "env"),
    [
        ("sh -c 'exec vllm serve $THE_MODEL {O}'", "", {"THE_MODEL": "/another"}),
        ("sh -c 'exec vllm serve {M} {O} $MORE'", "", {"MORE": "--max-model-len 64"}),
        ("sh -c 'exec vllm serve {M} {O} --max-model-len $POD_LEN'", "", {"POD_LEN": "32"}),
        ("env HF_HUB_OFFLINE=1 vllm serve {M} {O}", "env HF_HUB_OFFLINE=0 vllm serve {M} {O}", {}),
        (PLAIN, "numactl -N 0 vllm serve {M} {O}", {}),
        (PLAIN, "sh -c 'exec vllm serve {M} {O} --max-model-len 64'", {}),
        (PLAIN, "bash -c 'source {D}/activate; vllm serve {M} {O}'", {}),
    ],
)
def test_what_a_shell_or_a_wrapper_would_do_otherwise_today_is_a_difference(
    stage: Stage, saved: str, today: str, env: dict[str, str]
) -> None:
    done = stage.snapshot(saved)
    assert done.status == 0, done.stderr
    assert stage.reasons(saved) == set()
    assert ("command", True) in stage.reasons(today or saved, **env)
    if not today:
        done = stage.rekindle("match", "tiny", "--json", env=env)
        assert "command" in [each["code"] for each in done.json["steps"][0]["reasons"]], "as recorded, too"


def test_a_variable_that_only_the_address_depends_on_makes_no_difference(stage: Stage) -> None:
    command = AS_PEOPLE_WRITE_IT["a shell"]
    assert stage.snapshot(command).status == 0
    port = str(free_port())
    assert ("command", True) not in stage.reasons(command, THE_PORT=port)
    report = stage.restored(command, THE_PORT=port)
    assert (report["outcome"], report["endpoint"]) == ("restored", f"127.0.0.1:{port}")


def test_another_port_in_a_configuration_is_taken(stage: Stage) -> None:
    """It is another file than that of the snapshot, so the process is not."""
    command = AS_PEOPLE_WRITE_IT["a configuration"]
    assert stage.snapshot(command).status == 0
    port = free_port()
    stage.config(port)
    report = stage.restored(command)
    assert report["outcome"] == "cold"
    assert report["endpoint"].endswith(f":{port}")
    assert ("named-file", True) in {(each["code"], each["hard"]) for each in report["reasons"]}


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("bash -c 'source {D}/activate; vllm serve {M} {O}'", "`source` runs before it"),
        ("sh -c 'vllm serve {M} {O} | tee {D}/out'", "a pipe"),
        ("sh -c 'vllm serve $(cat {D}/model) {O}'", "the expansion"),
        ("numactl --strange vllm serve {M} {O}", "--strange"),
        ("vllm serve {M} {O} --ssl_keyfile {D}/key", "--ssl-keyfile"),
        ("bash -c 'vllm serve {M} {O} --ssl_certfile={D}/cert'", "--ssl-certfile"),
        ("vllm serve --config {D}/missing.yaml", "missing.yaml"),
    ],
)
def test_what_hides_the_server_is_named_before_anything_is_started(
    stage: Stage, command: str, words: str
) -> None:
    done = stage.snapshot(command)
    assert done.status == 2, done.stderr
    assert words in done.stderr
    assert "hint:" in done.stderr
    assert "ready " not in done.stderr
