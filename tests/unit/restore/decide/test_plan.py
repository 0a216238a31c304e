# SPDX-License-Identifier: Apache-2.0
"""A plan is a value of the facts: there is one for all of them, and it never asks for what it cannot have."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from oci import media_types
from oci.cache.image import CacheImage
from oci.cache.inventory import Entry, Inventory, StoredRoot, Target
from oci.descriptor import Descriptor
from oci.image import Image
from rekindle.config import Limits
from rekindle.criu import Criu
from rekindle.digest import Digest
from rekindle.engine.caches import CacheKind
from rekindle.node.gpu import Gpus
from rekindle.node.mapped import MappedFile
from rekindle.record import Record, RecordedCriu
from rekindle.report import Reason, Rung
from rekindle.secrets import HIDDEN
from restore.decide.abilities import Abilities
from restore.decide.plan import Facts, Plan, Step, make
from restore.decide.rules import RULES, Strictness
from tests.fakes import nodes
from tests.samples.record import NODE, RECORD, holding

ABLE = Abilities(criu=Criu(path=Path("/criu"), version="4.2.1"))
NO_BLOBS: Any = None  # a plan looks at no blob
UNREACHED = Reason(
    rung=Rung.PROCESS, code="registry", field="image", recorded="", here="no such host", hard=True
)
ON_CPUS = structs.replace(NODE, devices=Gpus())


def descriptor(size: int, media_type: str = media_types.DUMP_LAYER) -> Descriptor:
    return Descriptor(media_type=media_type, digest=Digest.of_bytes(b"%d" % size), size=size)


def image(record: Record, *layers: int, cache: bool = False) -> Image:
    """An image whose layers have so many bytes."""
    return Image(
        blobs=NO_BLOBS,
        limits=Limits(),
        index=descriptor(1, media_types.INDEX),
        process=descriptor(2, media_types.MANIFEST),
        config=descriptor(3, media_types.RECORD),
        layers=[descriptor(size) for size in layers],
        cache=descriptor(4, media_types.MANIFEST) if cache else None,
        record=record,
    )


def entry(key: str = "KEY", *targets: Target, **versions: str) -> Entry:
    return Entry(
        key=key, targets=targets, versions=versions, files=1, bytes=1, digest=Digest.of_bytes(key.encode())
    )


def root(recorded: str, *entries: Entry, kind: CacheKind = CacheKind.TRITON) -> StoredRoot:
    """Of a layer and a prefix that `cache` sets."""
    return StoredRoot(
        kind=kind, recorded=recorded, prefix="", layer=0, files=len(entries), bytes=1000, entries=entries
    )


def cache(*roots: StoredRoot, sizes: Sequence[int] = ()) -> CacheImage:
    """An image of these caches, `sizes` the bytes of their layers."""
    placed = [
        structs.replace(each, layer=number, prefix=f"io.rekindle.cache/{each.kind}-{number}")
        for number, each in enumerate(roots)
    ]
    layers = [descriptor(size, media_types.TAR_GZIP_LAYER) for size in sizes or [100] * len(roots)]
    return CacheImage(
        blobs=NO_BLOBS,
        manifest=descriptor(5, media_types.MANIFEST),
        config=descriptor(6, media_types.IMAGE_CONFIG),
        layers=layers,
        diff_ids=[layer.digest for layer in layers],
        labels={},
        inventory=Inventory(made_by="a test", roots=placed),
        created="",
        architecture="amd64",
    )


def facts(record: Record = RECORD, *layers: int, **more: Any) -> Facts:
    """Those of a node like the recorded one."""
    found = image(record, *(layers or (1000,)), cache=bool(more.get("cache") or more.get("cache_unread")))
    return Facts(**{"node": record.node, "abilities": ABLE, "image": found, **more})


def step(plan: Plan, rung: Rung) -> Step:
    (found,) = [step for step in plan.steps if step.rung is rung]
    return found


def codes(step: Step) -> list[tuple[str, bool]]:
    return [(reason.code, reason.hard) for reason in step.reasons]


# Any facts.

WORDS = st.sampled_from(["", "a", "6.8.0", "6.1", "²", "x" * 100, "GenuineIntel", "4.1", "3.19", "٣.٤"])
FEATURES = st.frozensets(st.sampled_from(["fpu", "avx2", "avx512f", "amx_tile"]))
VERSIONS = st.dictionaries(
    st.sampled_from(["python", "torch", "triton", "vllm", "cuda", "flashinfer"]),
    st.sampled_from(["3.5.0", "3.5.0+cu129", "3.5.0+rocm6.4", "", "+", "12.9"]),
)
NODES = st.sampled_from(
    [nodes.H100, nodes.H200, nodes.A100, nodes.A100_MIG, nodes.L4, nodes.B200, nodes.MI300X, Gpus()]
)
DEVICES = st.builds(
    lambda gpus, count, other, changes: structs.replace(
        gpus,
        gpus=tuple(
            structs.replace(gpu, uuid=gpu.uuid + "-other") if number in other else gpu
            for number, gpu in enumerate(gpus.gpus[:count])
        ),
        **changes,
    ),
    NODES,
    st.integers(0, 8),
    st.frozensets(st.integers(0, 7)),
    st.fixed_dictionaries(
        {},
        optional={
            "driver": st.sampled_from(["", "550.1", "580.65.06", "595", "x"]),
            "mps": st.booleans(),
            "links": st.sampled_from([(), ("0-1 sys",)]),
            "problem": st.sampled_from(["", "NVML does not start"]),
        },
    ),
)
FINGERPRINTS = st.builds(
    lambda **changes: structs.replace(NODE, **changes),
    architecture=st.sampled_from(["x86_64", "aarch64"]),
    cpu_vendor=WORDS,
    cpu_features=FEATURES,
    kernel=WORDS | st.text(max_size=20),
    page_bytes=st.sampled_from([4096, 65536]),
    xsave=st.sampled_from([0, 0x7, 0xE7, 0x602E7]),
    libc=WORDS,
    packages=VERSIONS,
    devices=DEVICES,
)
ABILITIES = st.builds(
    Abilities,
    criu=st.none() | st.builds(Criu, path=st.just(Path("/criu")), version=WORDS | st.text(max_size=9)),
    problems=st.dictionaries(st.sampled_from(["privileges", "criu", "cuda"]), WORDS),
)
PATHS = ["/lib/a", "/lib/b", "/caches/0/k.so", "/caches/1/deep/k.so", "/caches/10/k.so"]
COMMANDS = st.sampled_from(
    [["server"], ["server", "--port", "1"], ["serve"], [], ["server", HIDDEN], ["server", f"--key={HIDDEN}"]]
)
TARGETS = st.builds(
    Target,
    backend=st.sampled_from(["cuda", "hip", "cpu", "xpu"]),
    arch=st.sampled_from(["80", "90", "90a", "gfx942", "x86_64", ""]),
    warp_size=st.sampled_from([0, 32, 64]),
)
ENTRIES = st.builds(
    lambda key, targets, versions: entry(key, *targets, **versions),
    st.sampled_from(["KEY", "*", ".", "modelinfos", "torch_compile_cache/0", "fxgraph/0/1"]),
    st.lists(TARGETS, max_size=2),
    VERSIONS,
)


@st.composite
def caches(draw: st.DrawFn) -> CacheImage:
    found = [
        root(f"/caches/{number}", *entries, kind=draw(st.sampled_from(CacheKind)))
        for number, entries in enumerate(draw(st.lists(st.lists(ENTRIES, max_size=3), max_size=3)))
    ]
    sizes = [draw(st.integers(0, 1 << 40)) for _ in found]
    return cache(*found, sizes=sizes)


@st.composite
def records(draw: st.DrawFn) -> Record:
    node = draw(FINGERPRINTS)
    uuids = [*(gpu.uuid for gpu in node.devices.gpus), "GPU-of-nobody"]
    gpus = tuple(draw(st.lists(st.sampled_from(uuids), max_size=8)))
    return structs.replace(
        RECORD,
        node=node,
        process=structs.replace(RECORD.process, gpus=gpus),
        criu=RecordedCriu(version=draw(WORDS)),
        command=draw(COMMANDS),
        mapped_files=[MappedFile(path=path, size=1) for path in draw(st.lists(st.sampled_from(PATHS)))],
        weights=draw(st.sampled_from([{}, {"model": "/m", "files": [{"name": "w", "size": 1}]}])),
        start_seconds=draw(st.sampled_from([0.0, 0.1, 60.0]) | st.floats(0, 1e9)),
        dump=structs.replace(RECORD.dump, stored_bytes=draw(st.integers(0, 1 << 50))),
    )


@st.composite
def any_facts(draw: st.DrawFn) -> Facts:
    there = draw(st.booleans())
    kernels = draw(st.none() | caches()) if there else None
    unread = there and kernels is None and draw(st.booleans())
    layers = draw(st.lists(st.integers(0, 1 << 50), max_size=3))
    return Facts(
        node=draw(FINGERPRINTS),
        abilities=draw(ABILITIES),
        image=image(draw(records()), *layers, cache=unread or kernels is not None) if there else None,
        unreached=None if there else UNREACHED,
        cache=kernels,
        cache_unread=unread,
        different=draw(
            st.dictionaries(st.sampled_from([*PATHS, "/m/w", "/x"]), st.sampled_from(["missing", "7 bytes"]))
        ),
        local=draw(st.booleans()),
        unpacked=draw(st.booleans()),
        given=draw(st.none() | COMMANDS),
    )


@st.composite
def policies(draw: st.DrawFn) -> Strictness:
    free = st.sampled_from([code for code, rule in RULES.items() if not rule.fixed])
    soft = draw(st.frozensets(free, max_size=4))
    return Strictness(soft=soft, hard=draw(st.frozensets(free, max_size=4)) - soft)


@settings(max_examples=400)
@given(found=any_facts(), asked=st.sampled_from(Rung), strictness=st.none() | policies())
def test_there_is_a_plan_for_all_facts(found: Facts, asked: Rung, strictness: Strictness | None) -> None:
    plan = make(found, asked, strictness)
    rungs = list(Rung)[list(Rung).index(asked) :]
    if asked is not Rung.NEUTRAL and not (found.image and found.image.neutral):
        rungs = [rung for rung in rungs if rung is not Rung.NEUTRAL]
    assert [each.rung for each in plan.steps] == rungs
    assert plan == make(structs.replace(found), asked, strictness)
    for each in plan.steps:
        assert all(reason.rung is each.rung for reason in each.reasons)
        assert each.deadline_seconds is None or each.deadline_seconds > 0
        assert each.seconds is None or each.seconds >= 0
        assert each.fetch_bytes >= 0
        assert not (found.local and each.fetch_bytes)
        assert not (found.image is None and each.rung is not Rung.COLD and each.possible)
    _, kernels, cold = make(found, strictness=strictness).steps
    assert (cold.fetch_bytes, cold.deadline_seconds) == (0, None)
    assert set(kernels.roots) <= {each.name for each in found.cache.inventory.roots} if found.cache else True
    if kernels.possible and found.cache is not None and found.cache.inventory.roots:
        assert kernels.roots, "what brings nothing is no rung of its own"
    if plan.first is not None:
        assert not any(reason.hard for reason in plan.first.reasons)
        assert plan.first is next(each for each in plan.steps if each.possible)
    else:
        assert not any(each.possible for each in plan.steps)
    if found.command:
        assert cold.possible, "a command can always be started"
    document = plan.to_json()
    assert [each["rung"] for each in document["steps"]] == [each.rung for each in plan.steps]
    assert document["rung"] == (plan.first.rung if plan.first else None)


@given(found=any_facts())
def test_each_gpu_of_a_device_map_has_one_place(found: Facts) -> None:
    places = make(found).device_map
    assert len(set(places.values())) == len(places)
    assert set(places.values()) <= {gpu.uuid for gpu in found.node.devices.gpus}
    if places:
        assert found.image
        assert set(places) <= set(found.image.record.process.gpus)


@given(found=any_facts(), strictness=policies())
def test_a_policy_changes_what_is_hard_and_nothing_else_of_the_process(
    found: Facts, strictness: Strictness
) -> None:
    before, after = make(found).steps[0], make(found, strictness=strictness).steps[0]
    assert [structs.replace(reason, hard=False, by_policy=False) for reason in before.reasons] == [
        structs.replace(reason, hard=False, by_policy=False) for reason in after.reasons
    ]
    for was, now in zip(before.reasons, after.reasons, strict=True):
        assert now.by_policy is (was.hard != now.hard)
        wanted = (was.hard or was.code in strictness.hard) and was.code not in strictness.soft
        assert now.hard is wanted
    assert structs.replace(before, reasons=[]) == structs.replace(after, reasons=[])


# What a rung fetches, and how long it may take.


def test_a_node_like_the_recorded_one_fetches_the_layers_and_nothing_else() -> None:
    found = facts(RECORD, 10, 200, cache_unread=True)
    first = make(found).first
    assert first is not None
    assert (first.rung, first.fetch_bytes, list(first.roots)) == (Rung.PROCESS, 210, [])


@pytest.mark.parametrize(("changes", "wanted"), [({"unpacked": True}, 0), ({"local": True}, 0), ({}, 1000)])
def test_what_is_here_is_not_fetched(changes: Mapping[str, Any], wanted: int) -> None:
    assert step(make(facts(RECORD, **changes)), Rung.PROCESS).fetch_bytes == wanted


@pytest.mark.parametrize("rung", [Rung.PROCESS, Rung.CACHE])
@pytest.mark.parametrize(
    ("size", "start_seconds", "wanted"),
    [
        (1 << 20, 0.0, 15.0),
        (1 << 20, 60.0, 15.0),
        (100 << 30, 60.0, 60.0),
        (100 << 30, 3.0, 15.0),
        (100 << 30, 300.0, 300.0),
        (100 << 30, 0.0, None),
    ],
)
def test_a_deadline_is_no_longer_than_the_cold_start_that_is_spared(
    rung: Rung, size: int, start_seconds: float, wanted: float | None
) -> None:
    record = holding(structs.replace(RECORD, start_seconds=start_seconds), (), stored_bytes=size)
    kernels = cache(root("/c", entry()), sizes=[size])
    found = step(make(facts(record, size, cache=kernels)), rung)
    assert found.deadline_seconds is not None
    if wanted is not None:
        assert found.deadline_seconds == wanted
    else:  # nobody knows how long a cold start takes: it may take some times what is expected
        assert found.deadline_seconds > 60 * 60


THIRTY_GB = holding(structs.replace(RECORD, start_seconds=90.0), (), stored_bytes=30 << 30)
SLOW: dict[str, tuple[dict[str, Any], dict[str, Any], list[tuple[str, bool]]]] = {
    "a network that is slow": ({"fetch_bytes_per_second": 20e6}, {}, [("slow", True)]),
    "a network that is fast": ({"fetch_bytes_per_second": 1e9}, {}, []),
    "one that is slow, but all is here": ({"fetch_bytes_per_second": 20e6, "local": True}, {}, []),
    "a disk that is slow": ({"unpack_bytes_per_second": 100e6, "local": True}, {}, [("slow", True)]),
    "a disk that is fast": ({"local": True}, {}, []),
    "a disk that is slow, but it is unpacked": (
        {"unpack_bytes_per_second": 100e6, "local": True, "unpacked": True},
        {},
        [],
    ),
    "a network that is fast to a disk that is slow": (
        {"fetch_bytes_per_second": 1e9, "unpack_bytes_per_second": 100e6},
        {},
        [("slow", True)],
    ),
    "one that is slow, but it is unpacked": ({"fetch_bytes_per_second": 20e6, "unpacked": True}, {}, []),
    "one that is slow, but one layer is missing": (
        {"fetch_bytes_per_second": 20e6, "kept_layers": frozenset({str(descriptor(8 * 10**9).digest)})},
        {},
        [],
    ),
    "a deadline that is enough": (
        {"fetch_bytes_per_second": 20e6},
        {"deadlines": {Rung.PROCESS: 900.0}},
        [],
    ),
    "a deadline that is too short": ({}, {"deadlines": {Rung.PROCESS: 60.0}}, [("slow", True)]),
    "nothing below it": ({"fetch_bytes_per_second": 20e6}, {"require": Rung.PROCESS}, []),
    "a policy": (
        {"fetch_bytes_per_second": 20e6},
        {"strictness": Strictness(soft=frozenset({"slow"}))},
        [("slow", False)],
    ),
}


@pytest.mark.parametrize("name", SLOW)
def test_a_process_that_cannot_be_fetched_in_time_is_not_begun(name: str) -> None:
    changes, options, wanted = SLOW[name]
    found = make(facts(THIRTY_GB, 8 * 10**9, 10**8, **changes), **options)
    assert codes(step(found, Rung.PROCESS)) == wanted


def test_a_process_that_cannot_be_fetched_in_time_is_begun_if_nothing_takes_its_place() -> None:
    record = structs.replace(THIRTY_GB, command=["serve", HIDDEN])
    found = step(make(facts(record, 8 * 10**9, fetch_bytes_per_second=20e6)), Rung.PROCESS)
    assert codes(found) == []


def test_a_kernel_cache_that_cannot_be_fetched_in_time_is_not_begun() -> None:
    kernels = cache(root("/c", entry()), sizes=[8 * 10**9])
    found = make(facts(THIRTY_GB, 1000, cache=kernels, fetch_bytes_per_second=20e6), Rung.CACHE)
    assert ("cache-slow", True) in codes(step(found, Rung.CACHE))


def test_what_is_fetched_makes_a_rung_slower() -> None:
    unpacked, fetched = (step(make(facts(RECORD, 10**9, unpacked=u)), Rung.PROCESS) for u in (True, False))
    assert unpacked.seconds is not None
    assert fetched.seconds is not None
    assert fetched.seconds > unpacked.seconds + 5


def test_the_lower_rungs_take_as_long_as_the_recorded_start() -> None:
    plan = make(facts(cache=cache(root("/c", entry()))))
    assert step(plan, Rung.COLD).seconds == RECORD.start_seconds
    kernels = step(plan, Rung.CACHE)
    assert kernels.seconds is not None
    assert kernels.seconds >= RECORD.start_seconds
    unknown = structs.replace(RECORD, start_seconds=0.0)
    plan = make(facts(unknown, cache=cache(root("/c", entry()))))
    assert [each.seconds is None for each in plan.steps] == [False, True, True]


# Files that the kernel cache brings.

KERNEL = MappedFile(path="/caches/0/key/launcher.so", size=10)
LIBRARY = MappedFile(path="/lib/x.so", size=10)
WITH_KERNEL = structs.replace(RECORD, mapped_files=[KERNEL, LIBRARY])
TWO_CACHES = cache(root("/caches/0", entry()), root("/caches/1", entry()), sizes=[30, 400])


def test_a_file_that_the_kernel_cache_brings_is_no_lack() -> None:
    found = facts(WITH_KERNEL, 1000, cache=TWO_CACHES, different={KERNEL.path: "missing"})
    process = step(make(found), Rung.PROCESS)
    assert (codes(process), list(process.roots), process.fetch_bytes) == ([], ["triton-0"], 1030)


def test_it_is_fetched_also_for_a_dump_that_is_here() -> None:
    found = facts(WITH_KERNEL, 1000, cache=TWO_CACHES, different={KERNEL.path: "missing"}, unpacked=True)
    assert step(make(found), Rung.PROCESS).fetch_bytes == 30


@pytest.mark.parametrize(
    ("different", "roots"),
    [
        ({KERNEL.path: "12 bytes"}, []),  # what is there stays there
        ({LIBRARY.path: "missing"}, []),
        ({KERNEL.path: "missing", LIBRARY.path: "missing"}, ["triton-0"]),
    ],
)
def test_a_file_that_it_does_not_bring_is_one(different: Mapping[str, str], roots: list[str]) -> None:
    process = step(make(facts(WITH_KERNEL, cache=TWO_CACHES, different=different)), Rung.PROCESS)
    assert codes(process) == [("rootfs-file", True)]
    assert list(process.roots) == roots


def test_without_the_kernel_cache_a_missing_kernel_is_missing() -> None:
    for more in ({}, {"cache_unread": True}):
        process = step(make(facts(WITH_KERNEL, different={KERNEL.path: "missing"}, **more)), Rung.PROCESS)
        assert codes(process) == [("rootfs-file", True)]


# Commands, and an image that cannot be had.


@pytest.mark.parametrize(
    ("recorded", "given", "wanted"),
    [
        (["server"], None, True),
        (["server", f"--api-key={HIDDEN}"], None, False),
        (["server", "--api-key", HIDDEN], None, False),
        (["server", "--api-key", HIDDEN], ["server"], True),
        ([], None, False),
        ([], ["server"], True),
        (["server"], [], True),
    ],
)
def test_a_lower_rung_needs_a_command(recorded: list[str], given: list[str] | None, wanted: bool) -> None:
    record = structs.replace(RECORD, command=recorded)
    for more in ({}, {"cache": cache(root("/c", entry()))}, {"cache_unread": True}):
        plan = make(facts(record, given=given, **more))
        for rung in (Rung.CACHE, Rung.COLD):
            assert (("no-command", True) not in codes(step(plan, rung))) is wanted
        assert step(plan, Rung.COLD).possible is wanted


@pytest.mark.parametrize("asked", Rung)
def test_without_an_image_the_given_command_starts_cold(asked: Rung) -> None:
    found = Facts(node=NODE, abilities=ABLE, unreached=UNREACHED, given=["server"])
    plan = make(found, asked)
    assert plan.first is not None
    assert (plan.first.rung, plan.first.reasons, plan.device_map) == (Rung.COLD, [], {})
    above = plan.steps[:-1]
    assert [(each.rung, codes(each)) for each in above] == [
        (each.rung, [("registry", True)]) for each in above
    ]


def test_without_an_image_and_a_command_there_is_nothing() -> None:
    plan = make(Facts(node=NODE, abilities=Abilities(), unreached=UNREACHED))
    assert plan.first is None
    assert plan.to_json()["rung"] is None
    (reason,) = step(plan, Rung.COLD).reasons
    assert (reason.code, reason.rung, reason.here) == ("no-command", Rung.COLD, "no command is given")


# The kernel cache, entry by entry.

CUDA = Target(backend="cuda", arch="90", warp_size=32)
HIP = Target(backend="hip", arch="gfx942", warp_size=64)
CPU = Target(backend="cpu", arch="x86_64", warp_size=0)
SLOWER = structs.replace(ON_CPUS, cpu_features=NODE.cpu_features - {"avx512f"})


def on(devices: Gpus, **changes: Any) -> Any:
    return structs.replace(NODE, devices=devices, **changes)


def held_by(devices: Gpus) -> Record:
    process = structs.replace(RECORD.process, gpus=tuple(gpu.uuid for gpu in devices.gpus))
    return structs.replace(RECORD, node=on(devices), process=process)


GRAPH = entry("torch_compile_cache/0")
MODELS = entry("modelinfos")
NEWER = on(nodes.H100, packages={"triton": "3.6.0", "torch": "2.14.0"})

ENTRY_CASES: dict[str, tuple[Record, Any, list[StoredRoot], list[tuple[str, bool]], list[str]]] = {
    "no root": (RECORD, NODE, [], [], []),
    "a root without entries": (RECORD, NODE, [root("/a")], [], ["triton-0"]),
    "for this GPU": (RECORD, on(nodes.H100), [root("/a", entry("K", CUDA))], [], ["triton-0"]),
    "for this GPU among others": (
        RECORD,
        on(nodes.MI300X),
        [root("/a", entry("K", CUDA, HIP))],
        [],
        ["triton-0"],
    ),
    "for another": (RECORD, on(nodes.L4), [root("/a", entry("K", CUDA))], [("cache-target", True)], []),
    "of another backend": (
        RECORD,
        on(nodes.H100),
        [root("/a", entry("K", structs.replace(CUDA, backend="hip")))],
        [("cache-target", True)],
        [],
    ),
    "of another warp size": (
        RECORD,
        on(nodes.H100),
        [root("/a", entry("K", structs.replace(CUDA, warp_size=64)))],
        [("cache-target", True)],
        [],
    ),
    "of any warp size": (
        RECORD,
        on(nodes.H100),
        [root("/a", entry("K", structs.replace(CUDA, warp_size=0)))],
        [],
        ["triton-0"],
    ),
    "for one chip alone": (
        RECORD,
        on(nodes.H100),
        [root("/a", entry("K", structs.replace(CUDA, arch="90a")), kind=CacheKind.FLASHINFER)],
        [],
        ["flashinfer-0"],
    ),
    "for another chip alone": (
        RECORD,
        on(nodes.H100),
        [root("/a", entry("K", structs.replace(CUDA, arch="100a")), kind=CacheKind.FLASHINFER)],
        [("cache-target", True)],
        [],
    ),
    "of AMD's with a letter": (
        RECORD,
        on(nodes.MI300X),
        [root("/a", entry("K", structs.replace(HIP, arch="gfx942a")))],
        [("cache-target", True)],
        [],
    ),
    "some for this GPU": (
        RECORD,
        on(nodes.H100),
        [root("/a", entry("K", CUDA), entry("L", HIP)), root("/b", entry("M", HIP))],
        [("cache-target", False)],
        ["triton-0"],
    ),
    "graphs, for the GPU that was held": (
        held_by(nodes.H100),
        on(nodes.H200),
        [root("/a", GRAPH, MODELS, kind=CacheKind.VLLM)],
        [],
        ["vllm-0"],
    ),
    "graphs, for another GPU": (
        held_by(nodes.H100),
        on(nodes.L4),
        [root("/a", GRAPH, MODELS, kind=CacheKind.VLLM)],
        [("cache-target", True)],
        [],
    ),
    "graphs of a process without a GPU": (
        RECORD,
        on(nodes.H100),
        [root("/a", GRAPH, kind=CacheKind.VLLM)],
        [],
        ["vllm-0"],
    ),
    "notes about models alone": (
        held_by(nodes.H100),
        on(nodes.L4),
        [root("/a", MODELS, kind=CacheKind.VLLM)],
        [],
        ["vllm-0"],
    ),
    "C++ for this processor": (RECORD, NODE, [root("/a", entry("K", CPU))], [], ["triton-0"]),
    "C++ for another processor": (
        RECORD,
        SLOWER,
        [root("/a", entry("K", CPU))],
        [("cache-cpu-feature", True)],
        [],
    ),
    "C++ for another processor, among others": (
        RECORD,
        SLOWER,
        [root("/a", entry("K", CPU), entry("L")), root("/b", entry("M"))],
        [("cache-cpu-feature", False)],
        ["triton-1"],
    ),
    "another version": (
        RECORD,
        NEWER,
        [root("/a", entry("K", CUDA, triton="3.5.0"))],
        [("cache-version", True)],
        [],
    ),
    "the same version, built otherwise": (
        RECORD,
        on(nodes.H100, packages={"torch": "2.9.0"}),
        [root("/a", entry("K", torch="2.9.0+cu129"))],
        [],
        ["triton-0"],
    ),
    "the same version, built for something else": (
        RECORD,
        on(nodes.H100, packages={"torch": "2.9.0+rocm6.4"}),
        [root("/a", entry("K", torch="2.9.0+cu129"))],
        [("cache-version", True)],
        [],
    ),
    "a version of what is not installed": (
        RECORD,
        on(nodes.H100, packages={}),
        [root("/a", entry("K", torch="2.9.0"))],
        [],
        ["triton-0"],
    ),
    "the gravest reason is told": (
        RECORD,
        structs.replace(NEWER, devices=nodes.L4),
        [root("/a", entry("K", CUDA, triton="3.5.0", torch="2.9.0"))],
        [("cache-target", True)],
        [],
    ),
    "two reasons": (
        RECORD,
        NEWER,
        [root("/a", entry("K", triton="3.5.0"), entry("L", HIP), entry("M", triton="3.5.0"))],
        [("cache-version", True), ("cache-target", True)],
        [],
    ),
}


@pytest.mark.parametrize(
    ("record", "node", "roots", "reasons", "wanted"), ENTRY_CASES.values(), ids=ENTRY_CASES
)
def test_a_kernel_cache_is(
    record: Record,
    node: Any,
    roots: list[StoredRoot],
    reasons: list[tuple[str, bool]],
    wanted: list[str],
) -> None:
    found = step(make(facts(record, cache=cache(*roots), node=node)), Rung.CACHE)
    assert (codes(found), list(found.roots)) == (reasons, wanted)
    assert found.fetch_bytes == 100 * len(wanted)


def test_a_reason_says_how_many_entries_it_is_about() -> None:
    entries = [entry(f"K{number}", CUDA, triton="3.5.0") for number in range(3)]
    (reason,) = step(
        make(facts(cache=cache(root("/a", *entries, entry("L"))), node=NEWER)), Rung.CACHE
    ).reasons
    assert (reason.field, reason.recorded, reason.here) == ("triton", "3.5.0 (3 of 4 entries)", "3.6.0")


SOFTENED: dict[str, tuple[set[str], list[tuple[str, bool, bool]], list[str]]] = {
    "nothing": (set(), [("cache-version", True, False), ("cache-target", True, False)], []),
    "what one entry lacks": (
        {"cache-version"},
        [("cache-version", False, True), ("cache-target", False, False)],
        ["triton-0"],
    ),
    "all": (
        {"cache-version", "cache-target"},
        [("cache-version", False, True), ("cache-target", False, True)],
        ["triton-0", "triton-1"],
    ),
}


@pytest.mark.parametrize(("soft", "reasons", "roots"), SOFTENED.values(), ids=SOFTENED)
def test_what_a_policy_softens_is_fetched(
    soft: set[str], reasons: list[tuple[str, bool, bool]], roots: list[str]
) -> None:
    kernels = cache(root("/a", entry("K", CUDA, triton="3.5.0")), root("/b", entry("L", HIP, triton="3.5.0")))
    plan = make(facts(cache=kernels, node=NEWER), strictness=Strictness(soft=frozenset(soft)))
    found = step(plan, Rung.CACHE)
    assert [(reason.code, reason.hard, reason.by_policy) for reason in found.reasons] == reasons
    assert list(found.roots) == roots
    assert found.possible is bool(roots)


def test_what_a_policy_hardens_forbids_a_cache_of_which_some_would_fit() -> None:
    kernels = cache(root("/a", entry("K", CUDA), entry("L", HIP)))
    strict = Strictness(hard=frozenset({"cache-target"}))
    found = step(make(facts(cache=kernels, node=on(nodes.H100)), strictness=strict), Rung.CACHE)
    assert not found.possible


def test_the_architecture_of_a_cache_is_that_of_its_image() -> None:
    arm = structs.replace(NODE, architecture="aarch64")
    found = step(make(facts(cache=cache(root("/a", entry())), node=arm)), Rung.CACHE)
    assert (codes(found), found.fetch_bytes) == ([("cache-architecture", True)], 0)
