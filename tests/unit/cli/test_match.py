# SPDX-License-Identifier: Apache-2.0
"""`rekindle match` and `rekindle restore --plan` from outside: what they print, their status, no traces."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from oci import dump_layers, image
from oci.cache import pack
from oci.descriptor import Descriptor
from oci.layout import Layout
from rekindle import dump_tree
from rekindle.engine.caches import CacheKind, CacheRoot
from rekindle.node.fingerprint import Fingerprint
from rekindle.node.mapped import describe
from rekindle.record import Record, RecordedCriu
from tests.conftest import Done, Rekindle
from tests.samples.cache import CREATED, write
from tests.samples.record import RECORD, holding

SKIP = "--dangerously-skip-verification"
COMMAND = ["server", "--port", "8000"]
Say = Callable[..., Done]


def of_this_node(place: Path, **changes: Any) -> Record:
    """The record of a small dump that was made here."""
    dump = place / "dump"
    write(dump / "criu/pages-1.img", os.urandom(20_000))
    (dump / "shm").mkdir(exist_ok=True)
    library = describe(str(write(place / "lib/libx.so", b"a library")))
    assert library is not None
    node = structs.replace(Fingerprint.probe(), **changes.pop("node", {}))
    files = dump_tree.scan(dump)
    criu = RecordedCriu(version=changes.pop("criu_version", "3.0"))
    fields = {"node": node, "mapped_files": [library], "criu": criu, **changes}
    return holding(structs.replace(RECORD, **fields), files)


def publish(place: Path, record: Record, kernels: Callable[[Layout], Descriptor] | None = None) -> str:
    """An image of it, whose layers nobody can read."""
    layout = Layout.create(place / "layout")
    stored = dump_layers.pack(place / "dump", record.dump.files, layout, workers=1)
    built = image.build(layout, record, stored, kernels(layout) if kernels else None)
    layout.publish(layout, built.index, "1")
    for path in (layout.root / "blobs/sha256").iterdir():
        if path.name in {layer.digest.hex for layer in stored}:
            path.unlink()
    return f"oci:{layout.root}:1"


def kernels_of(place: Path) -> Callable[[Layout], Descriptor]:
    """The cache of a server that was run on no GPU."""
    write(place / "made/fxgraph/ab/fabc/graph", b"graph")

    def kernels(layout: Layout) -> Descriptor:
        root = CacheRoot(
            kind=CacheKind.INDUCTOR, path=place / "made", recorded=str(place / "caches/torchinductor_x")
        )
        return pack.pack([root], layout, created=CREATED)

    return kernels


def codes(document: Any) -> dict[str, list[tuple[str, bool]]]:
    return {
        step["rung"]: [(reason["code"], reason["hard"]) for reason in step["reasons"]]
        for step in document["steps"]
    }


@pytest.fixture(params=["match", "restore --plan"])
def say(request: pytest.FixtureRequest, rekindle: Rekindle) -> Say:
    def run(reference: str, *words: str, **options: Any) -> Done:
        return rekindle(*request.param.split(), reference, *words, **options)

    return run


NEWER_KERNEL: dict[str, Any] = {"node": {"kernel": "99.0.0"}}


@pytest.mark.criu
def test_a_snapshot_of_this_node_fits(say: Say, tmp_path: Path) -> None:
    reference = publish(tmp_path, of_this_node(tmp_path))
    done = say(reference, SKIP)
    assert done.status == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("process ")]
    assert "→" in line
    assert "fetches 0 bytes" in line
    document = say(reference, SKIP, "--json").json
    assert (document["asked"], document["rung"], document["device_map"]) == ("process", "process", {})
    assert codes(document) == {"process": [], "cache": [("no-cache", True)], "cold": []}
    assert document["here"] == document["recorded"]


def test_a_snapshot_of_another_node_does_not(say: Say, tmp_path: Path) -> None:
    reference = publish(tmp_path, of_this_node(tmp_path, **NEWER_KERNEL))
    done = say(reference, SKIP)
    assert done.status == 3, done.stderr
    assert f"kernel-older: kernel was 99.0.0, is {os.uname().release} — update" in done.stdout
    assert "no-cache: the image holds no kernel cache — make the snapshot" in done.stdout
    done = say(reference, SKIP, "--json")
    assert done.status == 3
    document = done.json
    assert (document["schema"], document["rung"]) == ("rekindle.plan/1", "cold")
    assert set(document) == {
        *("schema", "image", "asked", "rung", "device_map", "steps", "recorded", "here"),
    }
    assert document["image"]["reference"] == reference
    assert document["image"]["digest"].startswith("sha256:")
    assert ("kernel-older", True) in codes(document)["process"]
    assert codes(document)["cache"] == [("no-cache", True)]
    assert document["recorded"]["kernel"] == "99.0.0"
    for step in document["steps"]:
        assert set(step) == {
            *("rung", "possible", "fetch_bytes", "expected_seconds", "deadline_seconds", "reasons"),
        }
        for reason in step["reasons"]:
            assert set(reason) == {
                *("rung", "code", "field", "recorded", "here", "hard", "advice", "by_policy"),
            }
            assert reason["rung"] == step["rung"]


def test_the_kernel_cache_is_looked_at(say: Say, tmp_path: Path) -> None:
    record = of_this_node(tmp_path, **NEWER_KERNEL)
    reference = publish(tmp_path, record, kernels_of(tmp_path))
    document = say(reference, SKIP, "--json").json
    assert (document["rung"], codes(document)["cache"]) == ("cache", [])
    assert not (tmp_path / "caches").exists()


def test_a_policy_makes_a_difference(say: Say, tmp_path: Path) -> None:
    record = of_this_node(tmp_path, **NEWER_KERNEL)
    reference = publish(tmp_path, record, kernels_of(tmp_path))
    policy = tmp_path / "policy.toml"
    policy.write_text('[match]\nsoft = ["kernel-older"]\n')
    done = say(reference, SKIP, "--policy", str(policy), "--json")
    reasons = done.json["steps"][0]["reasons"]
    assert ("kernel-older", False, True) in [(r["code"], r["hard"], r["by_policy"]) for r in reasons]
    text = say(reference, SKIP, "--policy", str(policy)).stdout
    assert "(harmless) kernel-older: kernel was 99.0.0" in text
    assert "[by policy]" in text
    policy.write_text('[match]\nsoft = ["colour"]\n')
    done = say(reference, SKIP, "--policy", str(policy))
    assert (done.status, done.stdout) == (2, "")
    assert "'colour'" in done.stderr


def test_the_command_that_is_given_counts(say: Say, tmp_path: Path) -> None:
    reference = publish(tmp_path, of_this_node(tmp_path))
    here = say(reference, SKIP, "--json", "--", "server", "--port", "9000").json
    assert "command" not in [code for code, _ in codes(here)["process"]]
    here = say(reference, SKIP, "--json", "--", "server", "--api-key", "hunter2hunter2")
    assert ("command", True) in codes(here.json)["process"]
    assert "hunter2" not in here.stdout + here.stderr


def test_nothing_is_done(say: Say, rekindle: Rekindle, tmp_path: Path) -> None:
    reference = publish(tmp_path, of_this_node(tmp_path), kernels_of(tmp_path))
    blobs = tmp_path / "layout/blobs/sha256"
    before = {path: path.stat().st_mtime_ns for path in blobs.iterdir()}
    done = say(reference, SKIP)
    assert done.status in {0, 3}
    assert {path: path.stat().st_mtime_ns for path in blobs.iterdir()} == before
    assert not (tmp_path / "caches").exists()
    for directory in ("dumps", "run", "logs", "store/blobs/sha256"):
        there = rekindle.home / directory
        assert not there.exists() or not list(there.iterdir()), directory


def test_whom_to_trust_has_to_be_said_first(say: Say, tmp_path: Path) -> None:
    reference = publish(tmp_path, of_this_node(tmp_path))
    done = say(reference, "--json")
    assert (done.status, done.stdout) == (22, "")
    assert "nothing says whom to trust" in done.stderr


def test_an_image_that_is_not_there(say: Say, tmp_path: Path) -> None:
    assert say("nothing", SKIP).status == 12
    assert say(f"oci:{tmp_path}:1", SKIP).status == 2


def test_text_of_a_record_makes_no_line_of_its_own(say: Say, tmp_path: Path) -> None:
    spoiled = {"kernel": "99.0\n→ process", "cpu_vendor": "\x1b[2J", "libc": "\rglibc"}
    reference = publish(tmp_path, of_this_node(tmp_path, node=spoiled))
    done = say(reference, SKIP)
    assert done.status == 3
    assert not [line for line in done.stdout.splitlines() if line.startswith("→")]
    assert all(character.isprintable() or character == "\n" for character in done.stdout)


def test_who_stops_reading_sees_no_traceback(say: Say, rekindle: Rekindle, tmp_path: Path) -> None:
    reference = publish(tmp_path, of_this_node(tmp_path))
    reader, writer = os.pipe()
    os.close(reader)
    with open(tmp_path / "log", "wb") as log, os.fdopen(writer, "wb") as nobody:
        process = rekindle.spawn("match", reference, SKIP, log=Path(log.name), stdout=nobody)
        assert process.wait(60) in {128 + 13, 3}  # 3 where the process does not fit, as without root
    assert "Traceback" not in (tmp_path / "log").read_text()


# What only one of the two does.


def test_match_shows_this_node_beside_the_recorded_one(rekindle: Rekindle, tmp_path: Path) -> None:
    reference = publish(tmp_path, of_this_node(tmp_path, node={"cpu_vendor": "NobodysProcessors"}))
    lines = rekindle("match", reference, SKIP).stdout.splitlines()
    rows = {
        line.split()[0]: line.split()[1:]
        for line in lines[: lines.index(next(line for line in lines if line.startswith("image")))]
    }
    assert rows["recorded"] == ["here"]
    assert rows["cpu_vendor"][:2] == ["≠", "NobodysProcessors"]
    assert rows["kernel"][:2] == ["=", os.uname().release]
    assert "cpu_features" not in rows, "there are hundreds"


@pytest.mark.parametrize(
    ("rung", "with_cache", "status"),
    [("cache", True, 0), ("cache", False, 3), ("cold", False, 0), ("cold", True, 0), ("process", True, 3)],
)
def test_a_plan_is_for_the_rung_that_is_asked_for(
    rekindle: Rekindle, tmp_path: Path, rung: str, with_cache: bool, status: int
) -> None:
    record = of_this_node(tmp_path, **NEWER_KERNEL)
    reference = publish(tmp_path, record, kernels_of(tmp_path) if with_cache else None)
    done = rekindle("restore", reference, SKIP, "--plan", "--rung", rung, "--json")
    assert done.status == status, done.stderr
    rungs = ["process", "cache", "cold"]
    assert [step["rung"] for step in done.json["steps"]] == rungs[rungs.index(rung) :]
    assert done.json["asked"] == rung


def test_a_deadline_that_is_asked_for_is_in_the_plan(rekindle: Rekindle, tmp_path: Path) -> None:
    reference = publish(tmp_path, of_this_node(tmp_path), kernels_of(tmp_path))
    words = ["--process-deadline", "3", "--cache-deadline", "4.5"]
    document = rekindle("restore", reference, SKIP, "--plan", "--json", *words).json
    assert [step["deadline_seconds"] for step in document["steps"]] == [3.0, 4.5, None]
    for word in ("0", "-1", "inf", "nan", "soon"):
        assert rekindle("restore", reference, SKIP, "--plan", "--process-deadline", word).status == 2
