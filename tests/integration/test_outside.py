# SPDX-License-Identifier: Apache-2.0
"""What the system refuses is told as an error of the user's surroundings, and never as a bug of ours."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from oci import image as images
from oci import media_types
from oci.cache import pack
from oci.layout import Layout
from rekindle.config import Limits
from rekindle.errors import FormatError
from tests.conftest import Rekindle, small_disk
from tests.samples.cache import triton
from tests.samples.image import make_image
from tests.samples.record import FULL_RECORD
from tests.servers.registry.simulator import Registry

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount, or become somebody else")


@pytest.mark.parametrize("target", ["file", "file/below", "/proc/rekindle"])
def test_what_can_be_no_layout_is_a_usage_error(rekindle: Rekindle, tmp_path: Path, target: str) -> None:
    make_image(tmp_path / "from", layers=1, size=100)
    (tmp_path / "file").touch()
    done = rekindle("copy", f"oci:{tmp_path}/from:1", f"oci:{tmp_path / target}:1")
    assert done.status == 2, done.stderr
    assert "cannot be used as an OCI image layout" in done.stderr
    assert "Traceback" not in done.stderr


@needs_root
def test_a_layout_of_somebody_else_is_not_written_to(rekindle: Rekindle, tmp_path: Path) -> None:
    make_image(tmp_path / "from", layers=1, size=100)
    make_image(tmp_path / "theirs", layers=1, size=100)
    (tmp_path / "theirs").chmod(0o755)
    # Without the capabilities, root is anybody to files that do not let their owner write.
    (tmp_path / "theirs").chmod(0o555)
    rekindle.prefix = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    done = rekindle("copy", f"oci:{tmp_path}/from:1", f"oci:{tmp_path}/theirs:2")
    assert done.status == 2, done.stderr
    assert "it is not writable" in done.stderr
    assert "Traceback" not in done.stderr


@needs_root
def test_a_home_that_is_read_only_can_be_read_from(rekindle: Rekindle, tmp_path: Path) -> None:
    make_image(tmp_path / "from", layers=1, size=100)
    with small_disk(rekindle.home, "4m"):
        assert rekindle("copy", f"oci:{tmp_path}/from:1", "mine").status == 0
        subprocess.run(["mount", "-o", "remount,ro", str(rekindle.home)], check=True)
        done = rekindle("copy", "mine", f"oci:{tmp_path}/to:1")
        assert done.status == 0, done.stderr
        refused = rekindle("copy", f"oci:{tmp_path}/from:1", "other", "--json")
        assert (refused.status, refused.json["error"]["code"]) == (2, "usage"), refused.stderr
        assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("name", ["tmp", "project"])
def test_a_directory_for_something_else_becomes_no_home(
    rekindle: Rekindle, tmp_path: Path, name: str
) -> None:
    place = tmp_path / name
    place.mkdir()
    place.chmod(0o1777 if name == "tmp" else 0o755)
    if name == "project":
        (place / "README").touch()
    rekindle.home, before = place, (place.stat().st_mode, list(place.iterdir()))
    for words in (["doctor"], ["match", "image"], ["restore", "image"]):
        done = rekindle(*words, env={"TMPDIR": str(tmp_path / "tmp")})
        assert done.status in {2, 10}, done.stderr
        assert f"cannot use {place} as REKINDLE_HOME" in done.stderr
        assert (place.stat().st_mode, list(place.iterdir())) == before


@pytest.mark.parametrize("report", ["nowhere/r.json", ".", "file/r.json", "fifo"])
def test_a_report_that_cannot_be_written_is_refused_before_the_work(
    rekindle: Rekindle, tmp_path: Path, report: str
) -> None:
    make_image(tmp_path / "from", layers=1, size=100)
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")  # as /dev/null: not to be replaced
    words = ("copy", f"oci:{tmp_path}/from:1", f"oci:{tmp_path}/to:1", "--report", str(tmp_path / report))
    done = rekindle(*words, "--json")
    assert (done.status, done.json["error"]["code"]) == (2, "usage"), done.stderr
    assert not (tmp_path / "to").exists()
    assert (tmp_path / "fifo").is_fifo()


def test_a_report_lies_in_the_directory_one_is_in(rekindle: Rekindle, tmp_path: Path) -> None:
    make_image(tmp_path / "from", layers=1, size=100)
    rekindle.prefix = ["env", "-C", str(tmp_path)]
    done = rekindle("copy", "oci:from:1", "oci:to:1", "--report", "r.json")
    assert done.status == 0, done.stderr
    assert json.loads((tmp_path / "r.json").read_text())["outcome"] == "saved"


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "oci:layout:x"],
        ["match", "oci:layout:x"],
        ["copy", "oci:a:1", "oci:b:1"],
        ["restore", "oci:layout", "--plan"],
        ["restore", "x", "--", "true"],
        ["snapshot", "x", "--", "vllm", "serve", "m"],
        ["bench", "--", "vllm", "serve", "m"],
    ],
    ids=lambda words: words[0],
)
@needs_root
def test_a_working_directory_that_is_gone_is_told(
    rekindle: Rekindle, tmp_path: Path, words: list[str]
) -> None:
    rekindle.prefix = deleting_working_directory(tmp_path / "gone")
    done = rekindle(*words)
    # restore counts what the system refuses as a missing capability, so that it may take a lower rung.
    assert done.status == (10 if words[0] == "restore" else 2), done.stderr
    assert "the working directory does not exist any more" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_report_in_a_working_directory_that_is_gone_is_refused(rekindle: Rekindle, tmp_path: Path) -> None:
    make_image(tmp_path / "from", layers=1, size=100)
    rekindle.prefix = deleting_working_directory(tmp_path / "gone")
    done = rekindle("copy", f"oci:{tmp_path}/from:1", f"oci:{tmp_path}/to:1", "--report", "r.json")
    assert done.status == 2, done.stderr
    assert "cannot write --report r.json" in done.stderr
    assert not (tmp_path / "to").exists()


def test_without_relative_paths_a_working_directory_that_is_gone_does_not_matter(
    rekindle: Rekindle, tmp_path: Path
) -> None:
    make_image(tmp_path / "from", layers=1, size=100)
    rekindle.prefix = deleting_working_directory(tmp_path / "gone")
    done = rekindle("copy", f"oci:{tmp_path}/from:1", "mine")
    assert done.status == 0, done.stderr


def deleting_working_directory(path: Path) -> list[str]:
    """Return a prefix that runs a command in a directory that was deleted."""
    return ["sh", "-c", 'mkdir "$0" && cd "$0" && rmdir "$0" && exec "$@"', str(path)]


@pytest.mark.parametrize("words", [["doctor", "--json"], ["--help"]])
def test_a_reader_that_has_had_enough_is_no_bug(rekindle: Rekindle, words: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "rekindle", *words],
        env=rekindle.environment(),
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=60,
    )
    os.close(writing)
    assert done.stderr == ""
    assert done.returncode in {141, 10}


def test_options_may_stand_between_image_and_target(rekindle: Rekindle, tmp_path: Path) -> None:
    digest = make_image(tmp_path / "from", layers=1, size=100)
    with Registry() as registry:
        image = f"{registry.host}/a/r"
        assert rekindle("push", f"oci:{tmp_path}/from:1", f"{image}:1").status == 0
        done = rekindle("pull", f"{image}:1", "--jobs", "4", "mine:3", "--json")
    assert done.status == 0, done.stderr
    assert Layout(rekindle.home / "store").resolve("mine:3").digest == digest


def test_what_has_no_tag_takes_the_place_of_nothing(rekindle: Rekindle, tmp_path: Path) -> None:
    first = make_image(tmp_path / "from", layers=1, size=100)
    second = make_image(tmp_path / "other", layers=1, size=100)
    with Registry() as registry:
        image = f"{registry.host}/a/r"
        assert rekindle("push", f"oci:{tmp_path}/from:1", image).status == 0
        assert rekindle("push", f"oci:{tmp_path}/other:1", f"{image}:2").status == 0
        pulled = rekindle("pull", image)
        assert pulled.status == 0, pulled.stderr
        assert "replaces" not in pulled.stderr
        assert rekindle("pull", f"{image}@{second}").status == 2
        store = Layout(rekindle.home / "store")
        assert store.resolve("r:latest").digest == first
        assert rekindle("pull", f"{image}:2@{second}").status == 0
        assert store.resolve("r:2").digest == second
        replaced = rekindle("pull", f"{image}@{second}", "r:latest")
        assert f"replaces {first}" in replaced.stderr
        again = rekindle("pull", f"{image}@{second}", "r:latest")
        assert (again.status, "replaces" in again.stderr) == (0, False)


def test_a_registry_without_the_image_is_told_by_the_image(rekindle: Rekindle) -> None:
    with Registry() as registry:
        image = f"{registry.host}/a/r:nothing"
        done = rekindle("pull", image, "--json")
    assert done.status == 12
    assert done.json["error"]["message"] == f"there is no image {image}"


def test_an_authority_that_is_not_there_is_a_mistake_in_the_configuration(
    rekindle: Rekindle, tmp_path: Path
) -> None:
    (tmp_path / "config.toml").write_text(
        '[registry."127.0.0.1:1"]\nplain_http = false\nca_file = "/no.pem"\n'
    )
    done = rekindle("pull", "127.0.0.1:1/a/r:1", env={"REKINDLE_CONFIG": str(tmp_path / "config.toml")})
    assert done.status == 2, done.stderr
    assert "/no.pem" in done.stderr


@pytest.mark.parametrize(
    "url", ["http://user:hunter2@127.0.0.1:1", "http://user:hun/hunter2@host", "user:hunter2@h"]
)
def test_the_password_of_a_mirror_is_not_shown(rekindle: Rekindle, url: str) -> None:
    done = rekindle("pull", "127.0.0.1:1/a/r:1", "--mirror", url, "--json")
    assert done.status == 2, done.stderr
    assert "is not a mirror" in done.stderr
    assert "hunter2" not in done.stderr + done.stdout


def test_more_connections_than_make_sense_are_refused_in_the_configuration(
    rekindle: Rekindle, tmp_path: Path
) -> None:
    (tmp_path / "config.toml").write_text("[transfer]\njobs = 257\n")
    done = rekindle("pull", "127.0.0.1:1/a/r:1", env={"REKINDLE_CONFIG": str(tmp_path / "config.toml")})
    assert done.status == 2, done.stderr
    assert "256" in done.stderr


def test_a_kernel_cache_is_shown(rekindle: Rekindle, tmp_path: Path) -> None:
    root = triton(tmp_path / "t")
    assert rekindle("pack-cache", "kernels", "--dir", str(root.path)).status == 0
    done = rekindle("inspect", "kernels")
    assert done.status == 0, done.stderr
    assert "triton" in done.stdout
    assert str(root.path) in done.stdout
    document = rekindle("inspect", "kernels", "--json").json
    assert document["schema"] == "rekindle.inspect/1"
    (shown,) = document["cache"]["roots"]
    assert (shown["kind"], shown["recorded"]) == ("triton", str(root.path))
    assert shown["bytes"] > 0
    assert document["cache"]["targets"]

    store = Layout(rekindle.home / "store")
    with pytest.raises(FormatError) as raised:
        images.load(store, store.resolve("kernels:latest"))
    assert "rekindle extract" in raised.value.hint


def test_the_kernel_cache_of_a_snapshot_is_named(rekindle: Rekindle, tmp_path: Path) -> None:
    layout = Layout.create(tmp_path / "layout")
    layers = [layout.put(b"layer", media_types.DUMP_LAYER)] * 2
    packed = pack.pack([triton(tmp_path / "t")], layout, created=FULL_RECORD.created)
    for tag, kernels in (("with", packed), ("without", None)):
        layout.publish(layout, images.build(layout, FULL_RECORD, layers, kernels).index, tag)
    done = rekindle("inspect", f"oci:{layout.root}:with")
    assert "kernels: triton; " in done.stdout, done.stderr
    assert rekindle("inspect", f"oci:{layout.root}:with", "--json").json["cache"]["digest"] == packed.digest
    assert rekindle("inspect", f"oci:{layout.root}:without", "--json").json["cache"] is None

    with pytest.raises(FormatError, match="2 layers") as raised:
        images.load(layout, layout.resolve("with"), Limits(layers=1))
    assert "[limits]" in raised.value.hint


def test_an_image_of_others_is_neither(rekindle: Rekindle, tmp_path: Path) -> None:
    make_image(tmp_path / "from", layers=1, size=100)
    done = rekindle("inspect", f"oci:{tmp_path}/from:1")
    assert done.status == 20
    assert "is not a snapshot" in done.stderr
    assert "extract" not in done.stderr
