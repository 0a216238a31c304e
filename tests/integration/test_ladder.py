# SPDX-License-Identifier: Apache-2.0
"""Down the ladder, with real CRIU: whatever goes wrong above, a server serves, and nothing of it is left."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from tests.conftest import Rekindle, free_port, small_disk
from tests.fakes import nodes
from tests.integration.scenes import MULE, Saved, Scene, rewrite_record, save, scene
from tests.servers.registry import misbehaviour as wrong
from tests.servers.registry.access import Auth
from tests.servers.registry.simulator import Registry

pytestmark = pytest.mark.criu
LOWER = 3
TRUST, INTEGRITY, FORMAT = 22, 21, 20


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save(tmp_path_factory.mktemp("saved"))


@pytest.fixture(name="scene")
def _scene(saved: Saved, tmp_path: Path) -> Iterator[Scene]:
    with scene(saved, tmp_path) as made:
        yield made


def serves_on_the_cache(scene: Scene, *flags: str, **options: Any) -> dict[str, Any]:
    """A restore comes to the cache rung, serves there, and ends with status 3; its report."""
    running = scene.restore(*flags, **options)
    running.until_ready("cache")
    facts = json.loads(running.ask("/facts"))
    assert facts["environment"]["TRITON_CACHE_DIR"] == str(scene.saved.kernels)
    assert facts["cache"] == 2
    assert "mule: starts on 2 files" in running.said
    assert running.end() == LOWER, running.said
    report = running.report
    assert report["cache"]["verdict"] == "hit", report["cache"]
    assert report["oracle"]["match"] is True
    assert report["error"] is None
    scene.nothing_is_left(kept=True)
    return report


def test_the_process_is_the_first_choice(scene: Scene) -> None:
    running = scene.restore()
    running.until_ready("restored")
    assert running.reasons == []
    assert running.ask("/count", {}) == "1"
    running.process.terminate()
    assert running.process.wait(30) == 7
    scene.nothing_is_left()


def test_who_asks_for_the_cache_gets_it(scene: Scene) -> None:
    running = scene.restore("--rung", "cache")
    running.until_ready("cache")
    assert running.reasons == []
    assert running.end() == 0
    scene.nothing_is_left(kept=True)


def test_who_asks_for_a_cold_start_gets_it(scene: Scene) -> None:
    running = scene.restore("--rung", "cold")
    running.until_ready("cold")
    assert running.end() == 0
    scene.nothing_is_left()


# The process fails, in every phase.

FAULTS = {
    "weights": ("rekindle.home:Home.work=refused /somewhere", "capability", "process"),
    "work": ("rekindle.home:Home.work=fails SpaceError", "space", "process"),
    "lock": ("restore.dumps:ready=fails BusyError", "busy", "process"),
    "unpack": ("restore.dumps:_unpack=fails SpaceError", "space", "unpack"),
    "unpack, by a bug": ("restore.dumps:_unpack=breaks", "bug", "unpack"),
    "cell": ("rekindle.cell:Cell.enter=fails CapabilityError", "capability", "cell"),
    "cell, by a bug": ("restore.rungs.process:copy_sparse_tree=breaks", "bug", "cell"),
    "shared memory": ("restore.rungs.process:copy_sparse_tree=fails SpaceError", "space", "cell"),
    "restore": ("rekindle.criu:restore=fails RestoreError", "restore-failed", "restore"),
    "oracle": ("rekindle.engine.http:HttpEngine.answer=once fails OracleError", "oracle-mismatch", "oracle"),
    "no answer": (
        "rekindle.engine.client:Client.ask=once fails NotReadyError",
        "not-ready",
        "oracle",
    ),
    "publish": ("restore.serve.address:listen=once fails PortError", "restore-failed", "publish"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_process_that_fails_in_any_phase_is_followed_by_the_cache(scene: Scene, name: str) -> None:
    fault, code, phase = FAULTS[name]
    scene.faults(fault)
    report = serves_on_the_cache(scene)
    (reason,) = [reason for reason in report["reasons"] if reason["hard"]]
    assert (reason["rung"], reason["code"], reason["field"]) == ("process", code, phase)
    assert "made to" in reason["here"] or "/somewhere" in reason["here"]
    log = (scene.directory / "log-0").read_text()
    assert ("Traceback" in log) == (code == "bug")


@pytest.mark.parametrize(
    "fault", ["restore.dumps:ready=hangs", "restore.dumps:_unpack=hangs", "rekindle.cell:Cell.run=hangs"]
)
def test_a_process_that_takes_too_long_is_given_up(scene: Scene, fault: str) -> None:
    scene.faults(fault)
    report = serves_on_the_cache(scene, "--process-deadline", "2")
    (reason,) = report["reasons"]
    assert (reason["rung"], reason["code"]) == ("process", "deadline")
    assert 2 < report["seconds"] < 6


CRIU = """#!/bin/sh
case "$*" in
"restore "*/run/restore-*) {what};;
esac
exec {real} "$@"
"""


def fake_criu(scene: Scene, what: str) -> None:
    known = json.loads((scene.rekindle.home / "tools" / "criu-that-work.json").read_text())
    criu = scene.directory / "criu"
    criu.write_text(CRIU.format(what=what, real=next(iter(known)).split()[0]))
    criu.chmod(0o755)
    scene.rekindle.env["REKINDLE_CRIU"] = str(criu)


def test_a_criu_that_fails(scene: Scene) -> None:
    fake_criu(scene, "exit 1")
    report = serves_on_the_cache(scene)
    (reason,) = report["reasons"]
    assert (reason["code"], reason["field"]) == ("restore-failed", "restore")


def test_a_criu_that_fails_its_trial_is_not_tried_at_every_start(scene: Scene) -> None:
    criu, tried = scene.directory / "criu", scene.directory / "tried"
    criu.write_text(f"#!/bin/sh\ncase $1 in dump) echo >>{tried}; exit 1;; esac\n")
    criu.chmod(0o755)
    scene.rekindle.env["REKINDLE_CRIU"] = str(criu)
    for _ in range(2):
        report = serves_on_the_cache(scene)
        (reason,) = [reason for reason in report["reasons"] if reason["hard"]]
        assert reason["code"] == "criu"
        assert tried.read_text() == "\n"
    assert "rekindle doctor" in reason["here"]
    assert scene.rekindle("doctor", "--check", "criu").status == 10
    assert tried.read_text() == "\n" * 2
    criu.write_text(f"{criu.read_text()}# another one\n")
    serves_on_the_cache(scene)
    assert tried.read_text() == "\n" * 3


def test_a_criu_that_hangs_is_killed_in_time(scene: Scene) -> None:
    fake_criu(scene, "trap '' TERM INT; sleep 1000")
    report = serves_on_the_cache(scene, "--process-deadline", "3")
    (reason,) = report["reasons"]
    assert (reason["code"], reason["field"]) == ("deadline", "restore")
    assert report["seconds"] < 7


@pytest.mark.parametrize(("room", "code"), [("8m", "disk"), ("200m,nr_inodes=70", "space")])
def test_a_disk_without_room(scene: Scene, room: str, code: str) -> None:
    """Too few bytes are seen when deciding, too few inodes are not."""
    with small_disk(scene.directory / "disk", room):
        scene.rekindle.home = scene.directory / "disk"
        running = scene.restore()
        running.until_ready("cache")
        assert running.reasons == [("process", code)]
        assert running.end() == LOWER
        assert not list((scene.rekindle.home / "run").iterdir())
        assert not [path for path in (scene.rekindle.home / "dumps").iterdir() if path.is_dir()]
    scene.nothing_is_left(kept=True)


def test_an_answer_that_is_another(scene: Scene) -> None:
    image = scene.doctored(oracle__answer={"status": 200, "values": [43, ""]})
    running = scene.restore(image=image)
    running.until_ready("cache")
    assert running.reasons == [("process", "oracle-mismatch")]
    assert running.report["oracle"]["match"] is False, "the mule gives yet another"
    assert running.end() == LOWER
    scene.nothing_is_left(kept=True)


@pytest.fixture
def registry(saved: Saved) -> Iterator[Registry]:
    """It has the image as models/horse:1, which `image_in` names."""
    rekindle = Rekindle(saved.place / "home", {"COSIGN_PASSWORD": ""})
    with Registry() as registry:
        assert rekindle("push", saved.image, f"{registry.host}/models/horse:1").status == 0
        registry.requests.clear()
        yield registry


def image_in(registry: Registry) -> str:
    return f"{registry.host}/models/horse:1"


BAD_REGISTRIES: dict[str, Callable[[wrong.On], wrong.Misbehaviour]] = {
    "is not there any more": lambda on: wrong.status(404, on=on),
    "refuses": lambda on: wrong.status(403, on=on),
    "fails": lambda on: wrong.status(500, on=on),
    "breaks off": lambda on: wrong.resets(on, after_bytes=1000),
}


@pytest.mark.parametrize("how", BAD_REGISTRIES)
def test_a_registry_that_does_not_give_the_process(scene: Scene, registry: Registry, how: str) -> None:
    for digest in scene.saved.layers["process"]:
        registry.misbehave(BAD_REGISTRIES[how](wrong.blob(digest)))
    image = image_in(registry)
    report = serves_on_the_cache(scene, image=image)
    (reason,) = report["reasons"]
    assert (reason["rung"], reason["field"]) == ("process", "unpack")
    assert reason["code"] in {"registry", "credentials", "not-found"}, reason


def test_a_registry_that_stalls_costs_no_more_than_the_deadline(scene: Scene, registry: Registry) -> None:
    for digest in scene.saved.layers["process"]:
        registry.misbehave(wrong.stalls(wrong.blob(digest), after_bytes=1000))
    report = serves_on_the_cache(scene, "--process-deadline", "3", image=image_in(registry))
    (reason,) = report["reasons"]
    assert (reason["code"], reason["field"]) == ("deadline", "unpack")
    assert report["seconds"] < 7


def test_what_was_fetched_before_the_process_was_given_up_is_not_fetched_again(
    scene: Scene, registry: Registry
) -> None:
    stalling, *others = scene.saved.layers["process"]
    registry.misbehave(wrong.stalls(wrong.blob(stalling), after_bytes=1000))
    image = image_in(registry)
    serves_on_the_cache(scene, "--process-deadline", "3", image=image)
    registry.behave()
    registry.requests.clear()
    running = scene.restore(image=image)
    running.until_ready("restored")
    assert registry.downloads(stalling)
    assert not [digest for digest in others if registry.downloads(digest)]
    running.process.terminate()
    assert running.process.wait(30) == 7


def test_a_process_that_is_too_slow_to_fetch_is_given_up_once(scene: Scene, registry: Registry) -> None:
    """The second start knows how slow the registry is."""
    largest, size = max(scene.saved.layer_bytes.items(), key=lambda each: each[1])
    registry.misbehave(wrong.slow(wrong.blob(largest), bytes_per_second=size / 60))
    image = image_in(registry)
    report = serves_on_the_cache(scene, "--process-deadline", "4", image=image)
    assert [each["code"] for each in report["reasons"]] == ["deadline"]
    registry.requests.clear()
    report = serves_on_the_cache(scene, "--process-deadline", "4", image=image)
    assert [each["code"] for each in report["reasons"]] == ["slow"]
    assert not registry.downloads(largest)
    assert report["seconds"] < 3


def test_a_process_that_is_too_slow_to_unpack_is_given_up_once(scene: Scene, tmp_path: Path) -> None:
    """The second start knows how slow the disk is, and does not even begin."""
    begun = tmp_path / "begun"
    scene.faults(f"restore.dumps:_unpack=pauses {begun} 60")
    report = serves_on_the_cache(scene, "--process-deadline", "4")
    assert [each["code"] for each in report["reasons"]] == ["deadline"]
    begun.unlink()
    report = serves_on_the_cache(scene, "--process-deadline", "4")
    assert [each["code"] for each in report["reasons"]] == ["slow"]
    assert not begun.exists()
    scene.faults()
    running = scene.restore("--process-deadline", "60")
    running.until_ready("restored")
    assert running.reasons == []
    scene.rekindle.prefix = []


def test_without_its_layers_in_a_registry_there_is_a_cold_start(scene: Scene, registry: Registry) -> None:
    for digest in scene.saved.layers["process"] + scene.saved.layers["cache"]:
        registry.misbehave(wrong.status(404, on=wrong.blob(digest)))
    running = scene.restore(image=image_in(registry))
    running.until_ready("cold")
    assert [rung for rung, _ in running.reasons] == ["process", "cache"]
    assert running.end() == LOWER
    scene.nothing_is_left()


# The cache fails.


def test_a_server_that_dies_on_the_cache_is_started_cold_without_it(scene: Scene) -> None:
    scene.faults("rekindle.criu:restore=fails RestoreError")
    scene.puts(*MULE, "dies-on-a-cache")
    running = scene.restore()
    running.until_ready("cold")
    assert running.reasons == [("process", "restore-failed"), ("cache", "workload")]
    assert "status 9 before it was ready" in running.said
    assert not scene.saved.kernels.exists()
    assert not scene.saved.kernels.parent.exists(), "its directories were not there before"
    assert running.report["cache"] is None
    assert running.end() == LOWER
    scene.nothing_is_left()


def test_what_was_in_the_place_of_the_cache_stays(scene: Scene) -> None:
    scene.saved.kernels.mkdir(parents=True)
    (scene.saved.kernels / "mine").write_text("kept")
    scene.puts(*MULE, "dies-on-a-cache")
    running = scene.ended("--rung", "cache", "--require", "cache")
    assert running.process.returncode == 30
    assert [path.name for path in scene.saved.kernels.rglob("*")] == ["mine"]


def test_a_cache_that_nothing_has_room_for(scene: Scene) -> None:
    with small_disk(scene.directory / "disk", "16k"):
        running = scene.restore("--rung", "cache", "--cache-dir", str(scene.directory / "disk" / "c"))
        running.until_ready("cold")
        assert running.reasons == [("cache", "space")]
        assert list((scene.directory / "disk").iterdir()) == []
        assert running.end() == LOWER
    scene.nothing_is_left()


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("oci.cache.extract:extract=breaks", "bug"),
        ("oci.cache.extract:extract=fails UsageError", "capability"),
        ("oci.cache.publish:publish=refused /somewhere", "capability"),
        ("oci.cache.image:load=fails RegistryError", "registry"),
        ("oci.cache.extract:extract=hangs", "deadline"),
    ],
)
def test_a_cache_that_fails_is_followed_by_a_cold_start(scene: Scene, fault: str, code: str) -> None:
    scene.faults("rekindle.criu:restore=fails RestoreError", fault)
    running = scene.restore("--cache-deadline", "2")
    running.until_ready("cold")
    assert running.reasons == [("process", "restore-failed"), ("cache", code)]
    assert running.end() == LOWER
    scene.nothing_is_left()


def test_nothing_of_a_server_that_died_is_left(scene: Scene) -> None:
    scene.puts("sh", "-c", "setsid sleep 1000 & sleep 1000 & exit 4")
    running = scene.ended("--rung", "cache")
    assert running.process.returncode == 4, running.said
    assert running.reasons == [("cache", "workload")]
    scene.nothing_is_left()


# The cold start fails.


@pytest.mark.parametrize(("dies", "status"), [(9, 9), (0, LOWER), (143, 143)])
def test_the_status_of_a_cold_server_is_ours(scene: Scene, dies: int, status: int) -> None:
    scene.puts(*MULE, f"dies={dies}")
    scene.faults("rekindle.criu:restore=fails RestoreError")
    running = scene.ended()
    assert running.process.returncode == status, running.said
    assert running.report["outcome"] == "failed"
    assert running.report["error"]["code"] == "workload"
    assert running.reasons == [("process", "restore-failed"), ("cache", "workload")]
    scene.nothing_is_left()


def test_a_command_that_is_not_there(scene: Scene) -> None:
    running = scene.ended("--rung", "cold", command=["/no/such/server"])
    assert running.process.returncode == 2
    assert "cannot start /no/such/server" in running.said
    scene.nothing_is_left()


# Without the image.


def goes_cold(scene: Scene, code: str, *flags: str, **options: Any) -> None:
    """A command is started without its image: told, reported, and with status 3 at its end."""
    command = [*MULE, str(scene.saved.port)]
    running = scene.restore(
        "--ready-url", f"http://127.0.0.1:{scene.saved.port}/health", *flags, command=command, **options
    )
    running.until_ready("cold")
    assert "WARNING: cold start: " in running.said
    assert running.reasons == [("process", code), ("cache", code)]
    assert {reason["field"] for reason in running.report["reasons"]} == {"image"}
    assert running.end() == LOWER
    scene.nothing_is_left()


def is_an_error(scene: Scene, status: int, *flags: str, **options: Any) -> None:
    """Nothing is started."""
    running = scene.ended(*flags, **options)
    assert running.process.returncode == status, running.said
    assert "mule: starts" not in running.said
    assert running.report["outcome"] == "failed"
    assert running.report["error"]["code"]
    scene.nothing_is_left()


def test_a_registry_that_is_down(scene: Scene) -> None:
    image = f"127.0.0.1:{free_port()}/models/horse:1"
    goes_cold(scene, "registry", image=image)
    is_an_error(scene, 40, image=image)
    for rung in ("process", "cache"):
        is_an_error(scene, 40, "--require", rung, image=image, command=[*MULE, "1"])


def test_a_registry_that_says_nothing(scene: Scene) -> None:
    with Registry(misbehave=[wrong.stalls(wrong.manifest(method=None), after_bytes=-1)]) as registry:
        began = time.monotonic()
        goes_cold(scene, "deadline", "--process-deadline", "2", image=f"{registry.host}/models/horse:1")
        assert time.monotonic() - began < 7


def test_an_image_that_is_not_there(scene: Scene, registry: Registry) -> None:
    image = f"{registry.host}/models/horse:2"
    goes_cold(scene, "not-found", image=image)
    is_an_error(scene, 12, image=image)
    goes_cold(scene, "not-found", image="horse")
    is_an_error(scene, 12, image="horse")


def test_credentials_that_are_wrong(scene: Scene) -> None:
    with Registry(auth=Auth.BASIC) as registry:
        goes_cold(scene, "credentials", image=f"{registry.host}/models/horse:1")
        is_an_error(scene, 41, image=f"{registry.host}/models/horse:1")


def test_a_home_in_which_nothing_can_be_written(scene: Scene) -> None:
    scene.rekindle.home = Path("/proc/nothing")
    goes_cold(scene, "capability")
    is_an_error(scene, 10)


def test_a_bug_while_it_decides(scene: Scene) -> None:
    scene.faults("restore.decide.facts:gather=breaks")
    goes_cold(scene, "bug")
    running = scene.ended()
    assert running.process.returncode == 1
    assert running.report["error"]["code"] == "bug"


# What is required.


def test_a_process_that_is_required(scene: Scene) -> None:
    for fault, status in (
        ("restore.dumps:_unpack=fails SpaceError", 14),
        ("rekindle.cell:Cell.enter=fails CapabilityError", 10),
        ("rekindle.criu:restore=fails RestoreError", 34),
        ("rekindle.engine.http:HttpEngine.answer=fails OracleError", 35),
        ("rekindle.cell:Cell.run=breaks", 1),
    ):
        scene.faults(fault)
        is_an_error(scene, status, "--require", "process")
    scene.faults("rekindle.cell:Cell.run=hangs")
    is_an_error(scene, 34, "--require", "process", "--process-deadline", "2")


def test_a_cache_that_is_required(scene: Scene) -> None:
    scene.faults("rekindle.criu:restore=fails RestoreError")
    serves_on_the_cache(scene, "--require", "cache")
    scene.puts(*MULE, "dies-on-a-cache")
    running = scene.ended("--require", "cache")
    assert running.process.returncode == 30
    assert running.reasons == [("process", "restore-failed")]


# What is not to be trusted.


def test_an_image_that_somebody_changed_is_never_replaced_by_its_command(scene: Scene) -> None:
    image = rewrite_record(scene.saved, scene.directory / "bad", oracle__answer={"status": 200})
    command = [*MULE, str(scene.saved.port)]
    for flags in ([], ["--rung", "cache"], ["--rung", "cold"], ["--require", "process"]):
        is_an_error(scene, TRUST, *flags, image=image)
        is_an_error(scene, TRUST, *flags, image=image, command=command)


@pytest.mark.parametrize("part", ["process", "cache"])
def test_a_layer_with_other_bytes_ends_everything(scene: Scene, registry: Registry, part: str) -> None:
    for digest in scene.saved.layers[part]:
        registry.misbehave(wrong.wrong_bytes(digest))
    flags = [] if part == "process" else ["--rung", "cache"]
    is_an_error(scene, INTEGRITY, *flags, image=image_in(registry))
    is_an_error(scene, INTEGRITY, *flags, image=image_in(registry), command=scene.saved.command)


def test_a_cache_with_other_bytes_ends_everything_after_a_process_that_failed(
    scene: Scene, registry: Registry
) -> None:
    scene.faults("rekindle.criu:restore=fails RestoreError")
    for digest in scene.saved.layers["cache"]:
        registry.misbehave(wrong.wrong_bytes(digest))
    is_an_error(scene, INTEGRITY, image=image_in(registry))


@pytest.mark.parametrize(
    "change", [{"schema": "rekindle.record/99"}, {"process": None}, {"process__root_pid": -1}]
)
def test_a_record_that_is_malformed_ends_everything(scene: Scene, change: dict[str, Any]) -> None:
    image = rewrite_record(scene.saved, scene.directory / "bad", **change)
    flags = ["--dangerously-skip-verification"]
    is_an_error(scene, FORMAT, *flags, image=image)
    is_an_error(scene, FORMAT, *flags, "--rung", "cold", image=image, command=[*MULE, "1"])


# Another node.

GPUS = [structs.asdict(gpu) for gpu in nodes.H100.gpus]
OTHERS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "a GPU": (
        {"process__gpus": [GPUS[0]["uuid"]], "node__gpus": GPUS},
        {"gpu-count", "gpu-probe"},
    ),
    "a feature of the processor": (
        {"node__cpu_features": lambda old: [*old, "amx_flux"]},
        {"cpu-feature", "cache-cpu-feature"},
    ),
    "a file": (
        {"mapped_files": lambda old: [*old, {"path": "/no/such/library.so", "size": 1}]},
        {"rootfs-file"},
    ),
    "a newer kernel": ({"node__kernel": "99.1"}, {"kernel-older"}),
    "a newer CRIU": ({"criu__version": "99.0"}, {"criu-version"}),
}


TENANTS = {"set": ("blue", []), "not set": (None, ["oracle-variable"]), "odd": ("a\nb", ["oracle-variable"])}


@pytest.mark.parametrize("name", TENANTS)
def test_an_oracle_that_needs_a_variable_is_asked_if_that_is_set(scene: Scene, name: str) -> None:
    image = scene.doctored(oracle__request__headers={"X-Tenant": "$TENANT_OF_TODAY"})
    value, codes = TENANTS[name]
    scene.rekindle.env |= {"TENANT_OF_TODAY": value} if value else {}
    running = scene.restore(image=image)
    running.until_ready("cache" if codes else "restored")
    assert [each["code"] for each in running.report["reasons"] if each["hard"]] == codes
    assert running.report["oracle"]["match"] is not bool(codes)
    assert not codes or "unpack" not in running.said
    running.process.terminate()
    running.process.wait(30)


def test_an_image_of_another_hypervisor_is_restored(scene: Scene) -> None:
    features = ["hypervisor", "vmx", "ht", "tsc_known_freq", "md_clear", "arch_capabilities", "new_bug_fix"]
    image = scene.doctored(node__cpu_features=lambda old: [*old, *features])
    running = scene.restore(image=image)
    running.until_ready("restored")
    assert running.reasons == []
    running.process.terminate()
    assert running.process.wait(30) == 7


@pytest.mark.parametrize("name", OTHERS)
def test_an_image_of_another_node_is_served_on_its_cache(scene: Scene, name: str) -> None:
    change, codes = OTHERS[name]
    report = serves_on_the_cache(scene, image=scene.doctored(**change))
    hard = [reason for reason in report["reasons"] if reason["hard"]]
    assert {reason["rung"] for reason in hard} == {"process"}
    assert {reason["code"] for reason in hard} <= codes
    assert hard
    assert not [phase for phase in report["phases"] if phase["name"] in {"cell", "unpack", "restore"}]


def test_the_plan_is_what_happens(scene: Scene) -> None:
    image = scene.doctored(node__kernel="99.1")
    words = ["restore", image, *scene.saved.key.verify, "--plan"]
    done = scene.rekindle(*words)
    assert done.status == LOWER
    assert "process     no\n" in done.stdout
    assert "cache       →" in done.stdout
    done = scene.rekindle(*words, "--require", "process")
    assert done.status == 11
    assert "process     no\n" in done.stdout
    assert "kernel-older" in done.stderr
    assert scene.rekindle("restore", scene.saved.image, *scene.saved.key.verify, "--plan").status == 0
    words = ["restore", f"127.0.0.1:{free_port()}/horse", "--plan"]
    assert scene.rekindle(*words).status == 40
    done = scene.rekindle(*words, "--", *MULE, "1")
    assert done.status == LOWER
    assert "cold        →" in done.stdout
    scene.nothing_is_left()
