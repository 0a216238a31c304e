# SPDX-License-Identifier: Apache-2.0
"""What a server reads at its start is recorded, and read ahead wherever a server is started."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from oci import image as images
from rekindle.node.start_reads import StartRead, decode, encode
from tests.conftest import SERVERS
from tests.integration.scenes import MULE, Saved, Scene, save, scene
from tests.samples.page_cache import PAGE, nearly, on_disk, resident

pytestmark = pytest.mark.criu
_PAGES = 1024


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save(tmp_path_factory.mktemp("saved"))


@pytest.fixture(name="scene")
def _scene(saved: Saved, tmp_path: Path) -> Iterator[Scene]:
    with scene(saved, tmp_path) as made:
        made.puts(*MULE, "late=2")  # reading ends when the server is ready
        yield made


@pytest.fixture(name="weights")
def _weights(tmp_path: Path) -> Path:
    """A file in the record's list that nothing but the read-ahead reads."""
    return on_disk(tmp_path / "weights", _PAGES)


def doctored(scene: Scene, weights: Path) -> str:
    return scene.doctored(reads=encode([StartRead(str(weights), ((0, PAGE * 512),))]))


def test_the_record_names_in_order_what_a_start_reads(saved: Saved) -> None:
    record = images.load(saved.layout, saved.layout.resolve("1")).record
    found = [read.path for read in decode(record.reads)]
    scripts = [str(SERVERS / name) for name in ("paddock.py", "workhorse.py")]
    assert [path for path in found if path in scripts] == scripts
    assert found.index(os.path.realpath("/lib64/ld-linux-x86-64.so.2")) < found.index(scripts[0])
    assert any(Path(path).name.startswith("libc.so") for path in found)
    assert not [path for path in found if path.startswith(("/proc/", "/dev/", str(saved.place / "home")))]
    parts = {read.path: read.parts for read in decode(record.reads) if read.parts}
    assert all(at + length <= os.path.getsize(path) for path, each in parts.items() for at, length in each)


@pytest.mark.parametrize("rung", ["cache", "cold"])
def test_it_is_read_where_a_server_is_started(scene: Scene, weights: Path, rung: str) -> None:
    running = scene.restore("--rung", rung, image=doctored(scene, weights))
    running.until_ready(rung)
    use = running.report["read_ahead"]
    assert (use["files"], use["bytes"], use["complete"]) == (1, PAGE * 512, True)
    assert nearly(weights, range(512))
    assert running.end() == 0


def test_it_is_read_where_the_process_does_not_fit(scene: Scene, weights: Path) -> None:
    image = scene.doctored(
        reads=encode([StartRead(str(weights))]), node__page_bytes=4096 * 16, node__cpu_model="another"
    )
    running = scene.restore(image=image)
    running.until_ready("cache")
    assert ("process", "page-size") in running.reasons
    assert nearly(weights, range(_PAGES))
    running.end()


def test_it_is_read_after_the_process_has_failed(scene: Scene, weights: Path) -> None:
    image = doctored(scene, weights)
    scene.faults("rekindle.criu:restore=fails RestoreError")
    running = scene.restore(image=image)
    running.until_ready("cache")
    assert running.report["read_ahead"]["files"] == 1
    running.end()


def test_nothing_is_read_for_a_process(scene: Scene, weights: Path) -> None:
    running = scene.restore(image=doctored(scene, weights))
    running.until_ready("restored")
    assert running.report["read_ahead"] is None
    assert resident(weights) == []
    running.process.terminate()
    running.process.wait(30)


def test_nothing_is_read_if_it_is_not_wanted(scene: Scene, weights: Path) -> None:
    running = scene.restore("--rung", "cache", "--no-prefetch", image=doctored(scene, weights))
    running.until_ready("cache")
    assert running.report["read_ahead"] is None
    assert resident(weights) == []
    assert running.end() == 0


@pytest.mark.parametrize("reads", ["", None])
def test_a_record_that_names_nothing_starts_the_server(scene: Scene, reads: str | None) -> None:
    changes = {"reads": reads} if reads is not None else {"start_seconds": 1.0}
    running = scene.restore("--rung", "cache", image=scene.doctored(**changes))
    running.until_ready("cache")
    assert (running.report["read_ahead"] is None) == (reads == "")
    assert running.end() == 0


def test_a_record_that_means_nothing_is_refused(scene: Scene) -> None:
    running = scene.ended("--rung", "cold", image=scene.doctored(reads="0 relative"))
    assert running.process.returncode == 20
    assert running.report["error"]["code"] == "format"


def test_extract_reads_ahead_if_it_is_asked_to(scene: Scene, weights: Path, tmp_path: Path) -> None:
    image = doctored(scene, weights)
    words = ("extract", image, *scene.saved.key.verify, "--to", str(tmp_path / "to"))
    assert scene.rekindle(*words).status == 0
    assert resident(weights) == []
    done = scene.rekindle(*words, "--prefetch", "--report", str(tmp_path / "report"))
    assert done.status == 0, done.stderr
    assert nearly(weights, range(512))
    assert json.loads((tmp_path / "report").read_text())["read_ahead"]["bytes"] == PAGE * 512
    assert "read 1 files ahead, 2,097,152 bytes" in done.stderr


def test_extract_says_if_it_does_not_know_what_to_read(scene: Scene, tmp_path: Path) -> None:
    image = scene.doctored(reads="")
    words = ("extract", image, *scene.saved.key.verify, "--to", str(tmp_path / "to"), "--prefetch")
    done = scene.rekindle(*words)
    assert done.status == 0, done.stderr
    assert "nothing is read ahead" in done.stderr
