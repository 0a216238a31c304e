# SPDX-License-Identifier: Apache-2.0
"""A neutral process becomes a program as if that had been started, for the program and for its children."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from rekindle.cell import neutral
from tests.conftest import SERVERS, wait_for

SCRIPT = SERVERS / "surroundings.py"


@pytest.fixture(name="place")
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in place of that in a cell."""
    monkeypatch.setattr(neutral, "DIRECTORY", Path("/neutral"))
    return tmp_path


class Neutral:
    """A neutral process, as a context."""

    def __init__(self, root: Path, environment: Mapping[str, str], files: list[str]) -> None:
        neutral.install(root, files, str(SCRIPT))
        self.root, pipe = root, subprocess.PIPE
        argv = [sys.executable, str(root / "neutral/process.py")]
        self.process = subprocess.Popen(
            argv, env=dict(environment), cwd="/", stdout=pipe, stderr=pipe, stdin=0
        )
        wait_for(lambda: neutral.facts(root) is not None or self.process.poll() is not None, 60)
        assert self.process.poll() is None, self.process.communicate()

    @property
    def facts(self) -> dict[str, Any]:
        return dict(neutral.facts(self.root) or {})

    def becomes(self, *words: str, environment: Mapping[str, str], directory: Path) -> None:
        neutral.send(self.root, [str(SCRIPT), *words], environment, directory)


@pytest.fixture(name="ended")
def _ended() -> Iterator[list[Neutral]]:
    made: list[Neutral] = []
    yield made
    for each in made:
        each.process.kill()
        each.process.communicate()


def plain(
    *words: str, environment: Mapping[str, str], directory: Path
) -> "subprocess.CompletedProcess[bytes]":
    argv = [sys.executable, str(SCRIPT), *words]
    return subprocess.run(argv, env=environment, cwd=directory, capture_output=True, stdin=0, check=False)


@pytest.mark.parametrize("how", ["0", "7", "raise"])
def test_the_program_sees_what_it_would_see(
    place: Path, ended: list[Neutral], how: str, tmp_path: Path
) -> None:
    before = {"PATH": os.environ["PATH"], "OLD": "x", "CHANGED": "1", "PYTHONHASHSEED": "0"}
    today = {"PATH": os.environ["PATH"], "NEW": "ü", "CHANGED": "2", "PYTHONHASHSEED": "0"}
    started = Neutral(place, before, [])
    ended.append(started)
    (tmp_path / "here").mkdir()
    results = {}
    for name in ("plain", "neutral"):
        file = tmp_path / "result"
        if name == "plain":
            done = plain(str(file), how, environment=today, directory=tmp_path / "here")
            status, output, errors = done.returncode, done.stdout, done.stderr
        else:
            started.becomes(str(file), how, environment=today, directory=tmp_path / "here")
            output, errors = started.process.communicate(timeout=60)
            status = started.process.returncode
        last = errors.decode().strip().splitlines()[-1]
        results[name] = (json.loads(file.read_text()), status, output, last)
        file.unlink()
    found, expected = results["neutral"], results["plain"]
    for name in ("program", "child"):
        for key, value in expected[0][name].items():
            assert (key, found[0][name][key]) == (key, value)
    assert found == expected
    child = found[0]["child"]
    assert (child["status"], child["atexit"], child["is_ours"], child["threads"]) == (3, True, True, 1)
    assert child["environment"]["SET_BY_THE_PROGRAM"] == "1"
    assert child["inner"]["is_ours"] is True


def test_a_signal_ends_it_as_it_would_end_the_program(
    place: Path, ended: list[Neutral], tmp_path: Path
) -> None:
    started = Neutral(place, os.environ, [])
    ended.append(started)
    started.becomes(str(tmp_path / "result"), "wait", environment=os.environ, directory=tmp_path)
    wait_for(lambda: (tmp_path / "result").exists(), 60)
    started.process.send_signal(signal.SIGTERM)
    assert started.process.wait(10) == -signal.SIGTERM
    assert started.process.stdout is not None
    started.process.stdout.read()  # ends: nothing else holds the program's output


def test_it_imports_what_the_server_has_opened_and_tells_what_was_read(
    place: Path, ended: list[Neutral], tmp_path: Path
) -> None:
    library = tmp_path / "library"
    library.mkdir()
    (library / "reads_a_variable.py").write_text("import os\nFOUND = os.environ.get('READ_AT_IMPORT')\n")
    (library / "fails.py").write_text("raise RuntimeError('no')\n")
    (library / "never.py").write_text("import os\nFOUND = os.environ['NEVER_READ']\n")
    files = [str(library / name) for name in ("reads_a_variable.py", "fails.py")]
    started = Neutral(place, {**os.environ, "PYTHONPATH": str(library)}, files)
    ended.append(started)
    assert "READ_AT_IMPORT" in started.facts["variables"]
    assert "NEVER_READ" not in started.facts["variables"]
    assert started.facts["failed"] == {"fails": "RuntimeError: no"}
