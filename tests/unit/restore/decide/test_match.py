# SPDX-License-Identifier: Apache-2.0
"""Which differences forbid the process rung, and which are only told."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from rekindle.criu import Criu
from rekindle.errors import CapabilityError, MismatchError, UsageError
from rekindle.node.fingerprint import Fingerprint
from rekindle.node.mapped import MappedFile
from rekindle.record import Record
from rekindle.report import Reason, Rung
from restore.decide import match_loaded, match_process
from restore.decide.abilities import Abilities
from restore.decide.match_gpus import GpuChoice, choice_problem, device_map
from restore.decide.match_process import starts_recorded
from restore.decide.plan import require_possible as require
from restore.decide.rules import RULES, Strictness, reason_for
from tests.fakes.nodes import A100_MIG, H100, H200, L4, MI300X
from tests.samples.record import NODE, RECORD

ABLE = Abilities(criu=Criu(path=Path("/criu"), version="4.2.1"))


def process(*facts: Any) -> list[Reason]:
    """What the rules make of the differences."""
    return [reason_for(each) for each in match_process.compare(*facts)]


def differences(**changes: Any) -> list[Reason]:
    """The reasons on a node that is the recorded one but for some facts; every file is as recorded."""
    return process(RECORD, structs.replace(NODE, **changes), ABLE, {})


@pytest.mark.parametrize(
    ("own", "stored", "available", "fits"),
    [
        (5 << 20, 9 << 20, 5 << 20, True),
        (5 << 20, 9 << 20, (5 << 20) - 1, False),
        (0, 9 << 20, 9 << 20, True),  # an image that was not proved
        (0, 9 << 20, (9 << 20) - 1, False),
        (1 << 60, 1 << 60, None, True),  # the OS kernel does not tell
    ],
)
def test_a_server_must_have_the_memory_that_it_had(
    own: int, stored: int, available: int | None, fits: bool
) -> None:
    dump = structs.replace(RECORD.dump, own_bytes=own, stored_bytes=stored)
    able = structs.replace(ABLE, memory_bytes=available)
    reasons = process(structs.replace(RECORD, dump=dump), NODE, able, {})
    assert [(each.code, each.hard) for each in reasons] == ([] if fits else [("memory", True)])


INSTRUCTIONS = "avx512_fp16 amx_tile sse4_2 ssse3 popcnt rdrand clwb gfni ospke waitpkg amx_of_tomorrow"
NO_INSTRUCTIONS = """
    hypervisor vmx svm ht tsc_known_freq constant_tsc md_clear arch_capabilities ibrs stibp smap nx erms fsrm
    hle x2apic pdpe1gb la57 umip arat xsaves invpcid monitor wbnoinvd flush_l1d kernel_cpu_flag_of_tomorrow
"""


@pytest.mark.parametrize("feature", NO_INSTRUCTIONS.split())
def test_a_feature_that_is_no_instruction_may_be_missing(feature: str) -> None:
    recorded = structs.replace(NODE, cpu_features=NODE.cpu_features | {feature})
    assert process(structs.replace(RECORD, node=recorded), NODE, ABLE, {}) == []


@pytest.mark.parametrize("feature", INSTRUCTIONS.split())
def test_an_instruction_may_not_be_missing(feature: str) -> None:
    recorded = structs.replace(NODE, cpu_features=NODE.cpu_features | {feature})
    (reason,) = process(structs.replace(RECORD, node=recorded), NODE, ABLE, {})
    assert (reason.code, reason.recorded, reason.hard) == ("cpu-feature", feature, True)


def test_other_architectures_name_hardly_anything_but_instructions() -> None:
    arm = structs.replace(NODE, architecture="aarch64", cpu_features=frozenset({"asimd"}))
    recorded = structs.replace(arm, cpu_features=frozenset({"asimd", "evtstrm", "sve2"}))
    (reason,) = process(structs.replace(RECORD, node=recorded), arm, ABLE, {})
    assert reason.recorded == "sve2"


CASES: dict[str, tuple[dict[str, object], list[tuple[str, str, str, bool]]]] = {
    "the same node": ({}, []),
    "another name of the processor": ({"cpu_model": "Other CPU"}, []),
    "another vendor": (
        {"cpu_vendor": "Other"},
        [("cpu-vendor", "ExampleVendor", "Other", False)],
    ),
    "more features": ({"cpu_features": NODE.cpu_features | {"amx_tile", "new"}}, []),
    "one feature less": (
        {"cpu_features": NODE.cpu_features - {"avx512f"}},
        [("cpu-feature", "avx512f", "missing on Example CPU", True)],
    ),
    "no feature": (
        {"cpu_features": frozenset()},
        [("cpu-feature", "avx2 avx512f fpu", "missing on Example CPU", True)],
    ),
    "one more and one less": (
        {"cpu_features": frozenset({"avx2", "fpu", "new"}), "cpu_model": "Other CPU"},
        [("cpu-feature", "avx512f", "missing on Other CPU", True)],
    ),
    "an instruction that no list knows yet": (
        {"cpu_features": NODE.cpu_features - {"avx2"} | {"avx10_9"}},
        [("cpu-feature", "avx2", "missing on Example CPU", True)],
    ),
    "another architecture": (
        {"architecture": "aarch64"},
        [("architecture", "x86_64", "aarch64", True)],
    ),
    "larger pages": ({"page_bytes": 65536}, [("page-size", "4096", "65536", True)]),
    "one extended state more": ({"xsave": 0x600E7}, []),
    "one extended state less": ({"xsave": 0x7}, [("xsave", "0xe7", "0x7", True)]),
    "without CAP_SYS_ADMIN": (
        {"capabilities": 0x1FFFFDFFFFF},
        [("capabilities", "0x1ffffffffff", "0x1ffffdfffff", True)],
    ),
    "one capability more": ({"capabilities": 0x3FFFFFFFFFF}, []),
    "capabilities unknown": ({"capabilities": 0}, []),
    "extended states unknown": ({"xsave": 0}, []),
    "a newer kernel": ({"kernel": "6.9.0"}, [("kernel", "6.8.0", "6.9.0", False)]),
    "a newer kernel, by numbers": ({"kernel": "6.10.0-1"}, [("kernel", "6.8.0", "6.10.0-1", False)]),
    "another patch of the kernel": ({"kernel": "6.8.0-45"}, [("kernel", "6.8.0", "6.8.0-45", False)]),
    "an older kernel": ({"kernel": "6.1.90"}, [("kernel-older", "6.8.0", "6.1.90", True)]),
    "another libc": ({"libc": "glibc 2.39"}, [("libc", "glibc 2.36", "glibc 2.39", False)]),
    "no libc that says so": ({"libc": ""}, []),
    "a container of another kind": ({"container": "podman"}, []),
    "other GPUs, which the process does not hold": ({"devices": H100}, []),
    "everything": (
        {"architecture": "aarch64", "page_bytes": 65536, "kernel": "6.9.0", "cpu_features": frozenset()},
        [
            ("architecture", "x86_64", "aarch64", True),
            ("page-size", "4096", "65536", True),
            ("cpu-feature", "avx2 avx512f fpu", "missing on Example CPU", True),
            ("kernel", "6.8.0", "6.9.0", False),
        ],
    ),
}


@pytest.mark.parametrize(("changes", "wanted"), CASES.values(), ids=CASES)
def test_a_node_differs_in(changes: dict[str, object], wanted: list[tuple[str, str, str, bool]]) -> None:
    reasons = differences(**changes)
    assert [(r.code, r.recorded, r.here, r.hard) for r in reasons] == wanted
    assert all(reason.rung is Rung.PROCESS for reason in reasons)
    assert all(reason.advice for reason in reasons)


def on_gpus(recorded: Any, here: Any, held: int = 1) -> list[tuple[str, bool]]:
    gpus = tuple(gpu.uuid for gpu in recorded.gpus[:held])
    record = structs.replace(
        RECORD,
        node=structs.replace(NODE, devices=recorded),
        process=structs.replace(RECORD.process, gpus=gpus),
    )
    node = structs.replace(NODE, devices=here)
    return [(reason.code, reason.hard) for reason in process(record, node, ABLE, {})]


def other(devices: Any, **changes: Any) -> Any:
    """The same GPUs, but for their UUIDs and what is said."""
    gpus = tuple(structs.replace(gpu, uuid=f"{gpu.uuid}-other", **changes) for gpu in devices.gpus)
    return structs.replace(devices, gpus=gpus)


GPU_CASES: dict[str, tuple[Any, Any, int, list[tuple[str, bool]]]] = {
    "the same": (H100, H100, 1, []),
    "of the same model": (H100, other(H100), 1, [("gpu-uuid", False)]),
    "of another model": (
        H100,
        structs.replace(L4, driver=H100.driver),
        1,
        [("gpu-model", True), ("gpu-memory", True), ("gpu-uuid", False)],
    ),
    "less memory": (
        H100,
        other(H100, memory_bytes=1 << 30),
        1,
        [("gpu-memory", True), ("gpu-uuid", False)],
    ),
    "no ECC": (H100, other(H100, ecc=False), 1, [("gpu-ecc", False), ("gpu-uuid", False)]),
    "none": (H100, structs.replace(H100, gpus=()), 1, [("gpu-count", True)]),
    "all of a node": (H200, H200, 8, []),
    "one of a node": (H200, H200, 1, []),
    "fewer": (H200, structs.replace(H200, gpus=H200.gpus[:4]), 8, [("gpu-count", True)]),
    "other links": (
        H200,
        structs.replace(H200, links=("0-1 sys",)),
        8,
        [("gpu-topology", True)],
    ),
    "other links, to one that is held": (H200, structs.replace(H200, links=("0-1 sys",)), 1, []),
    "another branch of the driver": (
        H100,
        structs.replace(H100, driver="550.90.07"),
        1,
        [("driver", True)],
    ),
    "the same branch": (
        H100,
        structs.replace(H100, driver="580.99.01"),
        1,
        [("driver-version", False)],
    ),
    "MIG here": (
        A100_MIG,
        A100_MIG,
        1,
        [("mig", True)],
    ),
    "MPS": (H100, structs.replace(H100, mps=True), 1, [("mps", True)]),
    "NVML does not start": (
        H100,
        structs.replace(H100, gpus=(), problem="NVML does not start"),
        1,
        [("gpu-probe", True)],
    ),
    "of AMD": (MI300X, MI300X, 8, [("gpu-unsupported", True)]),
}


@pytest.mark.parametrize(("recorded", "here", "held", "wanted"), GPU_CASES.values(), ids=GPU_CASES)
def test_gpus_differ(recorded: Any, here: Any, held: int, wanted: list[tuple[str, bool]]) -> None:
    assert on_gpus(recorded, here, held) == wanted


def test_a_device_map_keeps_what_is_there() -> None:
    recorded = [gpu.uuid for gpu in H200.gpus[:3]]
    process = structs.replace(RECORD.process, gpus=tuple(recorded))
    alone = structs.replace(NODE, devices=structs.replace(H200, gpus=()))
    record = structs.replace(RECORD, process=process, node=alone)

    def places(*uuids: str) -> dict[str, str]:
        gpus = tuple(structs.replace(H200.gpus[0], uuid=uuid) for uuid in uuids)
        node = structs.replace(NODE, devices=structs.replace(H200, gpus=gpus))
        return device_map(record, node)

    a, b, c = recorded
    assert places(a, b, c) == places(c, b, a) == {}
    assert places("x", "y", "z") == {a: "x", b: "y", c: "z"}
    assert places("x", b, "z") == {a: "x", b: b, c: "z"}
    assert places(c, "x", "y") == {a: "x", b: "y", c: c}
    assert places("x") == {a: "x"}
    everything = [f"x{number}" for number in range(8)]
    assert list(places(*everything).values()) == everything[:3], "the record has no more"
    node = structs.replace(NODE, devices=H200)
    record = structs.replace(record, node=node)
    assert places(*everything) == dict(zip((gpu.uuid for gpu in H200.gpus), everything, strict=True))


def with_free(*gib: int, driver: str = "580.65.06") -> tuple[Record, Fingerprint, dict[str, int]]:
    """The record of a server on one GPU, and a node with so much free memory on each of its GPUs."""
    devices = structs.replace(H200, gpus=H200.gpus[: len(gib)], driver=driver)
    alone = structs.replace(H200, gpus=H200.gpus[:1], driver=driver)
    recorded = structs.replace(
        RECORD,
        process=structs.replace(RECORD.process, gpus=(H200.gpus[0].uuid,), cuda_pids=(2,)),
        node=structs.replace(NODE, devices=alone),
    )
    free = {gpu.uuid: each << 30 for gpu, each in zip(devices.gpus, gib, strict=True)}
    return recorded, structs.replace(NODE, devices=devices), free


@pytest.mark.parametrize(
    ("free", "place"),
    [
        ((130, 130, 130), 0),
        ((129, 130, 130), 0),  # a desktop's worth is no reason to move
        ((20, 130, 131), 2),
        ((20, 130, 90), 1),
        ((0, 0, 140), 2),
    ],
)
def test_a_gpu_is_chosen_by_its_free_memory(free: tuple[int, ...], place: int) -> None:
    record, node, free_bytes = with_free(*free)
    choice = GpuChoice(free_bytes=free_bytes)
    first, there = H200.gpus[0].uuid, H200.gpus[place].uuid
    assert device_map(record, node, choice) == ({} if place == 0 else {first: there})
    codes = {each.code for each in match_process.compare(record, node, ABLE, {}, choice=choice)}
    assert "gpu-count" not in codes
    assert device_map(record, node) == {}, "nothing is known of the memory"


def test_replicas_that_start_together_go_to_different_gpus() -> None:
    record, node, free_bytes = with_free(130, 130, 20, 131)
    record = structs.replace(
        record, process=structs.replace(record.process, device_bytes=40 << 30), node=node
    )
    first = H200.gpus[0].uuid
    found = [
        device_map(record, node, GpuChoice(free_bytes=free_bytes, replica=number)).get(first, first)
        for number in range(4)
    ]
    a, b, _, d = (gpu.uuid for gpu in H200.gpus[:4])
    assert found == [a, d, b, a], "the third GPU has no room"


def test_the_user_chooses_a_gpu_and_the_others_make_room() -> None:
    record, node, free_bytes = with_free(130, 20, 130)
    record = structs.replace(record, node=node)
    a, b, c = (gpu.uuid for gpu in H200.gpus[:3])
    choice = GpuChoice(wanted=[b], free_bytes=free_bytes)
    assert device_map(record, node, choice) == {a: b, b: a, c: c}, "every GPU must be named"
    assert choice_problem(record, node, [b]) == ""
    assert choice_problem(record, node, [a, b]) == "2 GPUs are named, and the server was on 1"
    assert choice_problem(record, node, ["GPU-none"]) == "this node has no GPU GPU-none"
    assert choice_problem(structs.replace(record, process=RECORD.process), node, ["GPU-none"]) == ""


def test_a_driver_without_maps_keeps_the_recorded_gpu() -> None:
    record, node, free_bytes = with_free(1, 130, 130, driver="570.158.01")
    choice = GpuChoice(free_bytes=free_bytes)
    assert device_map(record, node, choice) == {}
    assert "needs 580" in choice_problem(record, node, [H200.gpus[1].uuid])
    codes = {each.code for each in match_process.compare(record, node, ABLE, {}, choice=choice)}
    assert "gpu-count" in codes


LACKS: dict[str, tuple[Abilities, list[str], type[Exception] | None]] = {
    "nothing": (ABLE, [], None),
    "root": (Abilities(problems={"privileges": "no root"}), ["privileges"], CapabilityError),
    "CRIU": (Abilities(problems={"criu": "there is none"}), ["criu"], CapabilityError),
    "CUDA, of which nothing is held": (structs.replace(ABLE, problems={"cuda": "none"}), [], None),
    "a newer CRIU": (Abilities(criu=Criu(path=Path("/criu"), version="5.0")), [], None),
    "an older CRIU": (
        Abilities(criu=Criu(path=Path("/criu"), version="3.19")),
        ["criu-version"],
        CapabilityError,
    ),
}


@pytest.mark.parametrize(("abilities", "codes", "error"), LACKS.values(), ids=LACKS)
def test_a_node_lacks(abilities: Abilities, codes: list[str], error: type[Exception] | None) -> None:
    reasons = process(RECORD, NODE, abilities, {})
    assert [reason.code for reason in reasons] == codes
    assert not any(reason.recorded == "" and "was ," in str(reason) for reason in reasons)
    if error is not None:
        with pytest.raises(error):
            require(reasons)


FILE_CASES: dict[str, tuple[Mapping[str, str], list[tuple[str, str]]]] = {
    "the same": ({}, []),
    "another size": ({"/lib/a": "11 bytes"}, [("/lib/a", "11 bytes")]),
    "missing": ({"/lib/a": "missing", "/lib/b": "missing"}, [("/lib/a", "missing"), ("/lib/b", "missing")]),
    "of nobody's interest": ({"/lib/c": "missing"}, []),
}


@pytest.mark.parametrize(("different", "wanted"), FILE_CASES.values(), ids=FILE_CASES)
def test_a_file_differs_in(different: Mapping[str, str], wanted: list[tuple[str, str]]) -> None:
    files = [MappedFile(path="/lib/a", size=10), MappedFile(path="/lib/b", size=10)]
    reasons = process(structs.replace(RECORD, mapped_files=files), NODE, ABLE, different)
    assert [(r.field, r.here) for r in reasons] == wanted
    assert all(r.code == "rootfs-file" and r.hard and r.recorded == "10 bytes" for r in reasons)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("libcuda.so.580.65.06", "driver-file"),
        ("libnvidia-ml.so.1", "driver-file"),
        ("libnvidia-ptxjitcompiler.so.580.65.06", "driver-file"),
        ("libcudart.so.13", "rootfs-file"),
        ("libcuda.so.1.py", "rootfs-file"),
    ],
)
def test_a_library_of_the_driver_is_told_as_that(name: str, code: str) -> None:
    """It comes from the node, and not from the container's image."""
    path = f"/usr/lib/{name}"
    record = structs.replace(RECORD, mapped_files=[MappedFile(path=path, size=10)])
    (reason,) = process(record, NODE, ABLE, {path: "11 bytes"})
    assert (reason.code, reason.field, reason.hard) == (code, path, True)


def test_a_model_is_looked_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"12345")
    files = [{"name": "config.json", "size": 5}, {"name": "model.safetensors", "size": 9}]
    weights = {"model": str(tmp_path), "revision": "", "files": files}
    record = structs.replace(RECORD, weights=weights, mapped_files=[])
    (found,) = match_loaded.compare(record, (), {})
    assert (found.field, found.here) == (str(tmp_path / "model.safetensors"), "missing")
    reason = reason_for(found)
    assert (reason.code, reason.hard) == ("model-file", False)
    odd = structs.replace(record, weights={"model": "org/name", "files": [7, {"name": 3}]})
    assert match_loaded.compare(odd, (), {}) == []


COMMANDS: dict[str, tuple[list[str], bool]] = {
    "the same": (["server", "--port", "8000"], True),
    "another port": (["server", "--port", "9000"], True),
    "another port, in one word": (["server", "--port=9000", "--host=0.0.0.0"], True),
    "by its path": (["/usr/bin/server"], True),
    "another option": (["server", "--port", "8000", "--fast"], False),
    "another program": (["serve", "--port", "8000"], False),
    "nothing": ([], False),
}


@pytest.mark.parametrize(("given", "same"), COMMANDS.values(), ids=COMMANDS)
def test_a_command_is_the_recorded_one(given: list[str], same: bool) -> None:
    assert starts_recorded(RECORD, given, {}) is same
    reasons = process(RECORD, NODE, ABLE, {}, given)
    assert [reason.code for reason in reasons] == ([] if same else ["command"])


def test_a_secret_in_the_command_is_not_told() -> None:
    (reason,) = process(RECORD, NODE, ABLE, {}, ["server", "--api-key", "hunter2hunter2"])
    assert "hunter2" not in reason.here


def test_soft_reasons_forbid_nothing() -> None:
    require([])
    require(differences(kernel="6.9.0"))


def test_a_hard_reason_forbids_the_process() -> None:
    with pytest.raises(MismatchError) as caught:
        require(differences(kernel="6.9.0", architecture="aarch64"))
    assert caught.value.cause == "architecture: architecture was x86_64, is aarch64"
    assert caught.value.hint == "make a snapshot on this architecture"
    assert caught.value.descends


def test_a_long_list_of_reasons_is_cut() -> None:
    files = [MappedFile(path=f"/lib/{number}", size=1) for number in range(30)]
    missing = {file.path: "missing" for file in files}
    reasons = process(structs.replace(RECORD, mapped_files=files), NODE, ABLE, missing)
    assert len(reasons) == 30
    with pytest.raises(MismatchError) as caught:
        require(reasons)
    lines = caught.value.cause.splitlines()
    assert len(lines) == 13
    assert lines[-1] == "and 18 more"


def test_a_policy_softens_and_hardens() -> None:
    strict = Strictness(soft=frozenset({"cpu-feature"}), hard=frozenset({"kernel"}))
    changed = [strict.apply(reason) for reason in differences(kernel="6.9.0", cpu_features=frozenset())]
    assert [(r.code, r.hard, r.by_policy) for r in changed] == [
        ("cpu-feature", False, True),
        ("kernel", True, True),
    ]
    (unchanged,) = [strict.apply(reason) for reason in differences(libc="glibc 2.40")]
    assert not unchanged.by_policy


@pytest.mark.parametrize(
    ("soft", "hard"), [({"colour"}, set()), ({"architecture"}, set()), ({"kernel"}, {"kernel"})]
)
def test_a_policy_that_makes_no_sense(soft: set[str], hard: set[str]) -> None:
    with pytest.raises(UsageError):
        Strictness(soft=frozenset(soft), hard=frozenset(hard))


def test_every_rule_says_why_and_what_to_do() -> None:
    for code, rule in RULES.items():
        assert rule.why.endswith("."), code
        assert rule.source, code
        assert not rule.advice.endswith("."), code
