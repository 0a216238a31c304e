# SPDX-License-Identifier: Apache-2.0
"""A server that is started from a neutral process is as one that was started plainly."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from oci import image as images
from oci.layout import Layout
from tests.conftest import SERVERS, KeyPair, Rekindle, free_port, wait_for, workhorse_flags
from tests.integration.scenes import Running, Saved, Scene, scene

pytestmark = pytest.mark.criu
LOWER = 3


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A snapshot of a mule that is a script, as console scripts are, and so has a neutral process."""
    place = tmp_path_factory.mktemp("saved")
    port, key, script = free_port(), KeyPair(place / "key"), place / "mule"
    source = (SERVERS / "mule.py").read_text()
    script.write_text(f"#!{sys.executable}\nimport decimal, sqlite3\n{source}")
    script.chmod(0o755)
    (place / "stable").mkdir()
    environment = {"TMPDIR": str(place), "COSIGN_PASSWORD": ""}
    rekindle = Rekindle(place / "home", environment)
    assert rekindle("generate-key-pair", "--output-key-prefix", str(key.prefix)).status == 0
    image = f"oci:{place}/images:1"
    command = [str(script), str(port)]
    done = rekindle(
        "snapshot", image, "--neutral", "--no-prove", *workhorse_flags(port), *key.sign, "--", *command
    )
    assert done.status == 0, done.stderr
    assert "no neutral process" not in done.stderr
    assert rekindle("restore", image, "--plan", *key.verify).status == 0
    return Saved(place=place, image=image, port=port, key=key, command=command, kernels=place / "caches/none")


@pytest.fixture(name="scene")
def _scene(saved: Saved, tmp_path: Path) -> Iterator[Scene]:
    with scene(saved, tmp_path) as made:
        yield made


def facts_of(running: Running) -> dict[str, Any]:
    return dict(json.loads(running.ask("/facts")))


def ready(scene: Scene, *flags: str, command: Sequence[str] = (), **options: Any) -> Running:
    command = command or scene.saved.command
    running = scene.restore("--rung", "neutral", *flags, command=command, **options)
    running.until_ready("neutral")
    return running


def test_the_image_has_a_neutral_process_that_imported_what_the_server_did(saved: Saved) -> None:
    layout = Layout(saved.place / "images")
    image = images.load(layout, layout.resolve("1"))
    found = images.load_neutral(image).record
    assert found.neutral is not None
    assert found.neutral.script == saved.command[0]
    mapped = [Path(file.path).name for file in found.mapped_files]
    assert any(name.startswith("_sqlite3.") for name in mapped)
    assert found.process.gpus == ()


def test_the_server_sees_what_it_would_see(scene: Scene, saved: Saved) -> None:
    environment = {"NEW": "ü", "TRITON_CACHE_DIR": "/nowhere"}
    running = ready(scene, env=environment)
    neutral = facts_of(running)
    assert running.report["oracle"]["match"] is True
    assert running.report["outcome"] == "neutral"
    assert running.end() == 0
    cold = scene.restore("--rung", "cold", command=saved.command, env=environment)
    cold.until_ready("cold")
    plain = facts_of(cold)
    assert cold.end() == 0
    for facts in (neutral, plain):
        facts.pop("pid")
    assert neutral == plain
    assert neutral["environment"]["NEW"] == "ü"
    scene.nothing_is_left()


def test_it_is_taken_where_the_process_does_not_fit(scene: Scene) -> None:
    running = scene.restore(image=scene.doctored(node__page_bytes=65536), command=scene.saved.command)
    running.until_ready("neutral")
    assert ("process", "page-size") in running.reasons
    assert running.end() == LOWER
    scene.nothing_is_left()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_reach_the_server(scene: Scene, signum: int) -> None:
    running = ready(scene)
    running.send(signum)
    assert running.process.wait(30) == 5
    assert f"mule: signal {signum}" in running.said
    scene.nothing_is_left()


def test_its_output_is_ours(scene: Scene) -> None:
    running = ready(scene)
    running.ask("/say", {})
    running.until("to stdout")
    running.until("to stderr")
    running.end()


def test_a_variable_that_modules_read_must_be_the_same(scene: Scene) -> None:
    running = scene.restore("--rung", "neutral", command=scene.saved.command, env={"PYTHONOPTIMIZE": "1"})
    running.until_ready("cold")
    assert ("neutral", "neutral-variable") in running.reasons
    running.end()


def test_another_program_is_not_taken(scene: Scene, tmp_path: Path) -> None:
    other = tmp_path / "mule"
    other.write_bytes(Path(scene.saved.command[0]).read_bytes())
    other.chmod(0o755)
    running = scene.restore("--rung", "neutral", command=[str(other), str(scene.saved.port)])
    running.until_ready("cold")
    assert ("neutral", "neutral-command") in running.reasons
    running.end()


def test_other_arguments_are_taken(scene: Scene) -> None:
    port = free_port()
    command = [scene.saved.command[0], "drains=0.1", str(port)]
    ready_url = ("--ready-url", f"http://127.0.0.1:{port}/health")
    running = scene.restore("--rung", "neutral", *ready_url, command=command, port=port)
    running.until_ready("neutral")
    running.send(signal.SIGTERM)
    assert running.process.wait(30) == 0


def test_a_server_that_ends_too_early_is_started_by_the_next_rung(scene: Scene) -> None:
    command = [scene.saved.command[0], "dies=9", str(scene.saved.port)]
    ready_url = ("--ready-url", f"http://127.0.0.1:{scene.saved.port}/health")
    running = scene.ended("--rung", "neutral", *ready_url, command=command)
    assert running.process.returncode == 9
    assert ("neutral", "workload") in running.reasons


def test_the_plan_shows_it(scene: Scene, saved: Saved) -> None:
    done = scene.rekindle("restore", saved.image, *saved.key.verify, "--plan", "--json", "--", *saved.command)
    steps = {step["rung"]: step for step in done.json["steps"]}
    assert list(steps) == ["process", "neutral", "cache", "cold"]
    assert steps["neutral"]["possible"] is True


def test_the_oom_killer_or_a_kill_is_told_as_ever(scene: Scene) -> None:
    running = ready(scene)
    pid = facts_of(running)["pid"]
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    mine = [line.split()[0] for line in listed.splitlines() if "rekindle-neutral/process.py" in line]
    assert mine
    assert pid > 0
    os.kill(int(mine[0]), signal.SIGKILL)
    wait_for(lambda: running.process.poll() is not None, 30)
    assert running.process.returncode == 128 + signal.SIGKILL
