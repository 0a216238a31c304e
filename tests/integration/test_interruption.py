# SPDX-License-Identifier: Apache-2.0
"""A restore that is ended at any moment, on any rung: nothing is left, and whoever waits learns of it."""

import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import Rekindle, wait_for
from tests.integration.scenes import MULE, Running, Saved, Scene, save, scene
from tests.servers.registry import misbehaviour as wrong
from tests.servers.registry.simulator import Registry

pytestmark = pytest.mark.criu


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save(tmp_path_factory.mktemp("saved"))


@pytest.fixture(name="scene")
def _scene(saved: Saved, tmp_path: Path) -> Iterator[Scene]:
    with scene(saved, tmp_path) as made:
        yield made


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """A moment of a restore: it begins when the fault in this function makes its file."""

    at: str
    faults: Sequence[str] = ()
    flags: Sequence[str] = ()


FAILS = "rekindle.criu:restore=fails RestoreError"
MOMENTS = {
    "decide": Moment(at="restore.decide.facts:gather"),
    "work": Moment(at="rekindle.home:Home.work"),
    "unpack": Moment(at="oci.dump_layers:unpack"),
    "cell": Moment(at="rekindle.cell:Cell.enter"),
    "shared memory": Moment(at="restore.rungs.process:copy_sparse_tree"),
    "criu": Moment(at="rekindle.cell:Cell.run"),
    "oracle": Moment(at="rekindle.engine.client:Client.ask"),
    "inventory": Moment(at="oci.cache.image:load", faults=[FAILS]),
    "extract": Moment(at="oci.cache.extract:_read_all", faults=[FAILS]),
    "extracted": Moment(at="oci.cache.publish:finish", flags=["--rung", "cache"]),
}


def interrupt(scene: Scene, moment: Moment, *signums: int) -> Running:
    """A restore, once it has ended of the signals that it got at a moment."""
    there = scene.directory / "there"
    scene.faults(*moment.faults, f"{moment.at}=pauses {there} 60")
    running = scene.restore(*moment.flags)
    wait_for(lambda: there.exists() or running.process.poll() is not None, 30)
    assert there.exists(), running.said
    for signum in signums:
        running.send(signum)
    running.process.wait(30)  # the pause is longer
    return running


@pytest.mark.parametrize("name", MOMENTS)
def test_a_restore_that_is_asked_to_end_leaves_nothing(scene: Scene, name: str) -> None:
    running = interrupt(scene, MOMENTS[name], signal.SIGTERM, signal.SIGINT, signal.SIGTERM)
    assert running.process.returncode in {143, 130}, running.said
    assert running.report["error"]["code"] == "interrupted"
    assert "Traceback" not in running.said
    assert "mule" not in running.said, "no lower rung is taken then"
    scene.nothing_is_left()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
@pytest.mark.parametrize("name", ["decide", "criu", "extract"])
def test_its_status_tells_the_signal(scene: Scene, name: str, signum: int) -> None:
    running = interrupt(scene, MOMENTS[name], signum)
    assert running.process.returncode == 128 + signum, running.said
    assert running.report["error"]["message"] == f"ended by signal {int(signum)}"
    scene.nothing_is_left()


@pytest.mark.parametrize("name", MOMENTS)
def test_what_a_killed_restore_leaves_the_next_one_removes(scene: Scene, name: str) -> None:
    running = interrupt(scene, MOMENTS[name], signal.SIGKILL)
    assert running.process.returncode == -9
    scene.faults()
    running = scene.restore("--rung", "cache")
    running.until_ready("cache")
    wait_for(lambda: not list((scene.rekindle.home / "run").iterdir()), 10)
    assert running.end() == 0
    scene.nothing_is_left(kept=True)


def test_a_fetch_that_stalls_is_broken_off(scene: Scene) -> None:
    sender = Rekindle(scene.saved.place / "home", {"COSIGN_PASSWORD": ""})
    with Registry() as registry:
        image = f"{registry.host}/models/horse:1"
        assert sender("push", scene.saved.image, image).status == 0
        registry.misbehave(wrong.stalls(wrong.blob(scene.saved.layers["process"][-1]), after_bytes=1000))
        registry.requests.clear()
        running = scene.restore(image=image)
        wait_for(lambda: registry.downloads(scene.saved.layers["process"][-1]), 20)
        running.send(signal.SIGTERM)
        assert running.process.wait(10) == 143
    scene.nothing_is_left()


# While the clean-up of a rung that failed is under way.


@pytest.mark.parametrize(
    ("faults", "at"),
    [
        ([FAILS], "rekindle.cell:Cell.end"),
        ([FAILS], "rekindle.home:_remove_if_possible"),
        (["rekindle.criu:restore=hangs"], "rekindle.cell:Cell.end"),
    ],
)
def test_a_clean_up_is_not_broken_off(scene: Scene, faults: list[str], at: str) -> None:
    there = scene.directory / "there"
    scene.faults(*faults, f"{at}=once pauses {there} 1")
    running = scene.restore("--process-deadline", "3")
    wait_for(there.exists, 30)
    running.send(signal.SIGTERM)
    running.send(signal.SIGHUP)
    assert running.process.wait(10) in {143, 129}, running.said
    assert "mule" not in running.said
    scene.nothing_is_left()


def test_the_removal_of_a_cache_is_not_broken_off(scene: Scene) -> None:
    there = scene.directory / "there"
    scene.faults(f"oci.cache.extract:Extraction.undo=pauses {there} 1")
    scene.puts(*MULE, "dies-on-a-cache")
    running = scene.restore("--rung", "cache")
    wait_for(there.exists, 30)
    running.send(signal.SIGTERM)
    assert running.process.wait(10) == 143, running.said
    assert running.said.count("mule: starts") == 1
    scene.nothing_is_left()


# A server on a lower rung.


@pytest.mark.parametrize(
    ("rung", "signum"), [("cache", signal.SIGTERM), ("cold", signal.SIGINT), ("cold", signal.SIGHUP)]
)
def test_a_server_that_is_not_ready_yet_is_asked_to_end(scene: Scene, rung: str, signum: int) -> None:
    scene.puts(*MULE, "never-ready", "daemon")
    running = scene.restore("--rung", rung)
    running.until("mule: starts")
    running.send(signum)
    assert running.process.wait(20) == 128 + signum
    assert f"mule: signal {int(signum)}" in running.said
    assert running.report["error"]["code"] == "interrupted"
    scene.nothing_is_left()


@pytest.mark.parametrize("rung", ["cache", "cold"])
def test_the_report_does_not_wait_for_a_server_that_takes_long_to_end(scene: Scene, rung: str) -> None:
    scene.puts(*MULE, "never-ready", "slow-end=2")
    running = scene.restore("--rung", rung)
    running.until("mule: starts")
    running.send(signal.SIGTERM)
    wait_for(running.path.exists, 1.5)
    assert running.process.poll() is None
    assert running.report["error"] == {"code": "interrupted", "message": "ended by signal 15"}
    assert running.report["outcome"] == "failed"
    assert running.process.wait(20) == 143
    scene.nothing_is_left()


def test_the_report_does_not_wait_for_a_cell_that_takes_long_to_end(scene: Scene) -> None:
    there, ending = scene.directory / "there", scene.directory / "ending"
    scene.faults(
        f"rekindle.engine.client:Client.ask=pauses {there} 60", f"rekindle.cell:Cell.end=pauses {ending} 1"
    )
    running = scene.restore()
    wait_for(there.exists, 30)
    running.send(signal.SIGTERM)
    wait_for(running.path.exists, 2)
    assert running.process.poll() is None
    assert running.report["error"]["code"] == "interrupted"
    assert running.process.wait(20) == 143
    scene.nothing_is_left()


@pytest.mark.parametrize("rung", ["cache", "cold"])
def test_a_signal_to_a_server_that_serves_is_the_servers(scene: Scene, rung: str) -> None:
    scene.puts(*MULE, "daemon", "slow-end=1")
    running = scene.restore("--rung", rung)
    running.until_ready(rung)
    running.send(signal.SIGUSR1)
    running.until("mule: signal 10")
    running.send(signal.SIGTERM)
    assert running.process.wait(20) == 5
    assert running.report["outcome"] == rung, "it did what was asked for"
    scene.nothing_is_left(kept=rung == "cache")


def test_nohup_is_heeded(scene: Scene) -> None:
    scene.rekindle.prefix = ["nohup"]
    running = scene.restore("--rung", "cold")
    running.until_ready("cold")
    running.send(signal.SIGHUP)
    time.sleep(0.2)
    assert running.end() == 0
    scene.nothing_is_left()


@pytest.mark.parametrize("rung", ["process", "cache", "cold"])
def test_when_we_are_killed_the_server_ends(scene: Scene, rung: str) -> None:
    running = scene.restore("--rung", rung)
    running.until_ready({"process": "restored"}.get(rung, rung))
    running.process.kill()
    assert running.process.wait(10) == -9
    assert scene.rekindle("doctor", "--check", "root").status == 0
    scene.nothing_is_left(kept=rung == "cache")


@pytest.mark.parametrize("milliseconds", range(0, 600, 75))
def test_a_restore_that_ends_by_chance_at_any_moment(scene: Scene, milliseconds: int) -> None:
    """Of all rungs: the process fails as late as it can, and the server never gets ready."""
    scene.faults("rekindle.engine.http:HttpEngine.answer=fails OracleError")
    scene.puts(*MULE, "never-ready")
    running = scene.restore()
    running.until("rekindle: decide", 20)
    time.sleep(milliseconds / 1000)
    running.send(signal.SIGTERM)
    assert running.process.wait(20) == 143, running.said
    assert running.report["error"]["code"] == "interrupted"
    scene.nothing_is_left()
