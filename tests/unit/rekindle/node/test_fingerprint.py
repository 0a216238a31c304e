# SPDX-License-Identifier: Apache-2.0
"""What a node is: read fast, told whole, and taken from others only in the form that it must have."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from rekindle.errors import FormatError
from rekindle.node import fingerprint
from rekindle.node.fingerprint import Fingerprint
from rekindle.node.gpu import Gpu, Gpus
from rekindle.proc import boot_id
from tests.fakes import nodes
from tests.samples.record import NODE

DEVICES = {
    "H100": nodes.H100,
    "H200": nodes.H200,
    "A100 with MIG": nodes.A100_MIG,
    "L4": nodes.L4,
    "B200": nodes.B200,
    "MI300X": nodes.MI300X,
    "none": Gpus(),
    "with MPS": structs.replace(nodes.H100, mps=True),
}


def parse(document: object) -> Fingerprint:
    return Fingerprint.from_json(document, "node")


def round_trip(node: Fingerprint) -> Fingerprint:
    return parse(json.loads(json.dumps(node.to_json())))


# This node.


def test_a_node_is_what_the_kernel_says() -> None:
    node = Fingerprint.probe()
    assert node.architecture == platform.machine()
    assert node.kernel == os.uname().release
    assert node.page_bytes == os.sysconf("SC_PAGE_SIZE")
    assert node.cpu_model in Path("/proc/cpuinfo").read_text() or node.cpu_model == "unknown"
    assert node.cpu_features
    assert node.packages == {}, "nobody has asked for those of a command"
    assert node == Fingerprint.probe()
    assert round_trip(node) == structs.replace(node, devices=structs.replace(node.devices, problem=""))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have no XSAVE")
def test_the_extended_states_are_those_of_the_features() -> None:
    node = Fingerprint.probe()
    assert {"fpu", "sse2"} <= node.cpu_features
    if node.xsave:  # since Linux 5.16
        assert node.xsave & 3 == 3
        for feature, bit in {"avx": 2, "avx512f": 5, "amx_tile": 18}.items():
            assert bool(node.xsave >> bit & 1) is (feature in node.cpu_features), feature


def test_the_packages_are_those_of_the_command() -> None:
    packages = Fingerprint.probe([sys.executable, "server.py"], os.environ).packages
    assert packages["python"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert Fingerprint.probe(["/bin/true"], {}).packages == {}


def test_a_boot_has_a_name() -> None:
    assert len(boot_id()) == 36
    assert boot_id() == boot_id()


PROBE = """
import json, sys, time
from rekindle.node.fingerprint import Fingerprint
times = []
for _ in range(5):
    began = time.perf_counter()
    Fingerprint.probe([sys.executable, "-m", "vllm"])
    times.append(time.perf_counter() - began)
print(json.dumps([min(times), sorted(sys.modules)]))
"""


def test_a_probe_costs_little() -> None:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, timeout=60, check=True)
    seconds, modules = json.loads(done.stdout)
    assert not {"torch", "vllm", "triton", "subprocess", "importlib.metadata", "psutil"} & set(modules)
    assert seconds < 0.1


@pytest.mark.parametrize(
    ("groups", "environment", "wanted"),
    [
        ("0::/\n", {}, ""),
        ("0::/system.slice/docker-0123.scope\n", {}, "docker"),
        ("12:pids:/kubepods/besteffort/pod1/0123\n", {}, "kubepods"),
        ("0::/../libpod-0123\n", {}, "libpod"),
        ("0::/\n", {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "kubernetes"),
        (None, {}, ""),
    ],
)
def test_a_container_shows(
    groups: str | None,
    environment: dict[str, str],
    wanted: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The files that engines leave are looked for below another root, and so are not there."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if groups is not None:
        (tmp_path / "proc/1").mkdir(parents=True)
        (tmp_path / "proc/1/cgroup").write_text(groups)
    monkeypatch.setattr(fingerprint, "Path", lambda path: tmp_path / path.lstrip("/"))
    assert fingerprint._container() == wanted
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.containerenv").touch()
    assert fingerprint._container() == "podman"
    (tmp_path / ".dockerenv").touch()
    assert fingerprint._container() == "docker"


# Levels.

V2 = {"cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"}
V3 = V2 | {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"}
V4 = V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
LEVELS: dict[str, tuple[set[str], str]] = {
    "nothing": (set(), "x86-64-v1"),
    "v2": (V2, "x86-64-v2"),
    "v2 but for one": (V2 - {"ssse3"}, "x86-64-v1"),
    "v3": (V3, "x86-64-v3"),
    "v3 but for one": (V3 - {"movbe"}, "x86-64-v2"),
    "v4": (V4, "x86-64-v4"),
    "v4 but for one": (V4 - {"avx512vl"}, "x86-64-v3"),
    "v4 without one of v2": (V4 - {"popcnt"}, "x86-64-v1"),
    "more than v4": (V4 | {"amx_tile"}, "x86-64-v4"),
}


@pytest.mark.parametrize(("features", "wanted"), LEVELS.values(), ids=LEVELS)
def test_a_processor_has_a_level(features: set[str], wanted: str) -> None:
    assert structs.replace(NODE, cpu_features=frozenset(features)).cpu_level == wanted


def test_levels_are_those_of_one_architecture() -> None:
    arm = structs.replace(NODE, architecture="aarch64", cpu_features=frozenset(V4))
    assert arm.cpu_level == ""


# As JSON.


@pytest.mark.parametrize("devices", DEVICES.values(), ids=DEVICES)
def test_a_node_comes_back_from_json(devices: Gpus) -> None:
    node = structs.replace(NODE, devices=devices)
    assert round_trip(node) == node


GPUS = st.builds(
    Gpu,
    vendor=st.text(max_size=5),
    name=st.text(max_size=5),
    arch=st.text(max_size=5),
    warp_size=st.integers(0, 1024),
    uuid=st.text(max_size=5),
    memory_bytes=st.integers(0, 1 << 62),
    mig=st.booleans(),
    ecc=st.booleans(),
)


@given(
    node=st.builds(
        Fingerprint,
        architecture=st.text(),
        cpu_model=st.text(),
        cpu_features=st.frozensets(st.text()),
        kernel=st.text(),
        page_bytes=st.integers(1, 1 << 62),
        cpu_vendor=st.text(),
        xsave=st.integers(0, 1 << 62),
        capabilities=st.integers(0, 1 << 62),
        libc=st.text(),
        container=st.text(),
        packages=st.dictionaries(st.text(), st.text()),
        devices=st.builds(
            Gpus,
            driver=st.text(),
            cuda=st.text(),
            mps=st.booleans(),
            gpus=st.lists(GPUS, max_size=3).map(tuple),
            links=st.lists(st.text(), max_size=3).map(tuple),
        ),
    )
)
def test_any_node_comes_back_from_json(node: Fingerprint) -> None:
    assert round_trip(node) == node


def test_a_record_of_before_says_less() -> None:
    names = {"architecture", "cpu_model", "cpu_features", "kernel", "page_bytes"}
    old = {name: value for name, value in NODE.to_json().items() if name in names}
    node = parse(old)
    assert (node.xsave, node.libc, dict(node.packages), node.devices) == (0, "", {}, Gpus())
    assert node.cpu_features == NODE.cpu_features


def with_gpu(**changes: Any) -> dict[str, Any]:
    """A node's JSON whose GPU is spoiled. A change to None takes the field away."""
    document: dict[str, Any] = NODE.to_json()
    gpu = {**document["gpus"][0], **changes}
    return {**document, "gpus": [{name: value for name, value in gpu.items() if value is not None}]}


MALFORMED: dict[str, object] = {
    "nothing": {},
    "no object": [],
    "no architecture": {**NODE.to_json(), "architecture": None},
    "a number for a kernel": {**NODE.to_json(), "kernel": 6.8},
    "features in one text": {**NODE.to_json(), "cpu_features": "avx2"},
    "a feature that is a number": {**NODE.to_json(), "cpu_features": [2]},
    "pages of no bytes": {**NODE.to_json(), "page_bytes": 0},
    "pages of many": {**NODE.to_json(), "page_bytes": 1 << 63},
    "pages by a truth": {**NODE.to_json(), "page_bytes": True},
    "negative states": {**NODE.to_json(), "xsave": -1},
    "states as text": {**NODE.to_json(), "xsave": "0xe7"},
    "states that are null": {**NODE.to_json(), "xsave": None},
    "packages in a list": {**NODE.to_json(), "packages": ["torch"]},
    "a version that is a number": {**NODE.to_json(), "packages": {"torch": 2}},
    "a driver that is a number": {**NODE.to_json(), "gpu_driver": 580},
    "MPS as text": {**NODE.to_json(), "mps": "off"},
    "links in one text": {**NODE.to_json(), "links": "0-1 nvlink"},
    "GPUs in an object": {**NODE.to_json(), "gpus": {}},
    "a GPU that is text": {**NODE.to_json(), "gpus": ["H100"]},
    "too many GPUs": {**NODE.to_json(), "gpus": with_gpu()["gpus"] * 1025},
    "a GPU without a UUID": with_gpu(uuid=None),
    "a GPU of negative memory": with_gpu(memory_bytes=-1),
    "a GPU of infinite memory": with_gpu(memory_bytes=float("inf")),
    "a GPU with wide warps": with_gpu(warp_size=2048),
    "a GPU whose MIG is a number": with_gpu(mig=1),
}


@pytest.mark.parametrize("document", MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_node_is_refused(document: object) -> None:
    with pytest.raises(FormatError, match="node"):
        parse(document)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


@given(name=st.sampled_from(sorted(NODE.to_json())), value=JSON)
def test_no_value_breaks_the_reader(name: str, value: Any) -> None:
    try:
        node = parse({**NODE.to_json(), name: value})
    except FormatError:
        return
    assert round_trip(node) == node
