# SPDX-License-Identifier: Apache-2.0
"""A record is read whole or refused, and no path of its files leads out."""

import contextlib
import copy
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from rekindle import dump_tree
from rekindle.cell import Network
from rekindle.errors import FormatError
from rekindle.node.fingerprint import Fingerprint
from rekindle.record import RECORD_LIMIT_BYTES, FileKind, Record, numbered
from tests.samples.gauges import memory_peak
from tests.samples.record import FULL_RECORD, NODE, RECORD, document

Steps = Sequence[str | int]


def parse(value: object) -> Record:
    return Record.parse(json.dumps(value).encode())


def at(value: Any, path: Steps) -> Any:
    for step in path:
        value = value[step]
    return value


def changed(path: Steps, new: object) -> dict[str, Any]:
    value = document()
    at(value, path[:-1])[path[-1]] = new
    return value


def with_files(*files: object) -> dict[str, Any]:
    return changed(("dump", "files"), list(files))


def file(path: str, kind: str = "file", **changes: object) -> dict[str, object]:
    plain = {"path": path, "kind": kind, "size": 0, "mode": 0o600, "uid": 0, "gid": 0, "mtime_ns": 0}
    return {**plain, **changes}


def leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every place in a document, the inner ones too."""
    if path:
        yield path
    if isinstance(value, dict):
        for name in value:
            yield from leaves(value[name], (*path, name))
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))


def test_a_record_comes_back_as_it_was() -> None:
    assert Record.parse(FULL_RECORD.to_bytes()) == FULL_RECORD


@pytest.mark.parametrize("network", Network)
def test_either_network_comes_back(network: Network) -> None:
    process = structs.replace(RECORD.process, network=network)
    record = structs.replace(RECORD, process=process)
    assert Record.parse(record.to_bytes()).process.network is network


def test_equal_records_give_equal_bytes() -> None:
    node = structs.replace(
        RECORD.node, cpu_features=frozenset(sorted(RECORD.node.cpu_features, reverse=True))
    )
    options = dict(reversed(list(RECORD.engine.options.items())))
    other = structs.replace(RECORD, node=node, engine=structs.replace(RECORD.engine, options=options))
    assert other.to_bytes() == RECORD.to_bytes()


def test_a_record_is_ascii() -> None:
    record = structs.replace(RECORD, command=["sérve", "\udcff"])
    assert record.to_bytes().isascii()
    assert Record.parse(record.to_bytes()).command == ["sérve", "\udcff"]


def test_a_record_of_before_can_be_read() -> None:
    value = document()
    for name in ADDED:
        *outer, last = steps(name)
        del at(value, outer)[last]
    for name in ADDED_TO_NODE:
        del value["node"][name]
    old = parse(value)
    assert old.node == Fingerprint(
        architecture=NODE.architecture,
        cpu_model=NODE.cpu_model,
        cpu_features=NODE.cpu_features,
        kernel=NODE.kernel,
        page_bytes=NODE.page_bytes,
    )
    assert (old.process.gpus, old.start_seconds, old.mapped_files[0].identity) == ((), 0.0, "")


def test_unknown_fields_are_passed_over() -> None:
    value = document()
    for place in (value, value["process"], value["dump"]["files"][0]):
        place["from the future"] = {"deep": [1]}
    assert parse(value) == FULL_RECORD


# fmt: off
FIELDS = [
    "schema", "created", "made_by", "engine", "engine.name", "engine.options", "command", "directory",
    "environment", "endpoint", "endpoint.host", "endpoint.port", "oracle", "oracle.request",
    "oracle.answer", "node", "node.architecture", "node.cpu_model", "node.cpu_features", "node.kernel",
    "node.page_bytes", "criu", "criu.version", "process", "process.root_pid", "process.server_pid",
    "process.tasks", "process.network", "process.monotonic_ns", "process.boottime_ns", "process.stdout",
    "process.stderr", "mapped_files", "mapped_files.0.path", "mapped_files.0.size", "dump",
    "dump.dump_bytes", "dump.stored_bytes", "dump.files", "dump.files.4.path", "dump.files.4.kind",
    "dump.files.4.size", "dump.files.4.mode", "dump.files.4.uid", "dump.files.4.gid",
    "dump.files.4.mtime_ns",
]
# fmt: on
ANY_FORM = {"engine.options", "oracle.request", "oracle.answer"}
# Records that were made before have none of these.
ADDED = (
    "listeners",
    "weights",
    "loaded",
    "reads",
    "neutral",
    "process.stdin",
    "proved",
    "start_seconds",
    "variables",
    "process.gpus",
    "process.cuda_pids",
    "mapped_files.0.mtime_ns",
    "mapped_files.0.identity",
)
ADDED_TO_NODE = (
    *("cpu_vendor", "cpu_level", "xsave", "capabilities", "libc", "container", "packages"),
    *("gpus", "gpu_driver", "cuda", "mps", "links"),
)


def steps(name: str) -> Steps:
    return tuple(int(step) if step.isdecimal() else step for step in name.split("."))


def test_every_field_is_on_the_list() -> None:
    for path in leaves(document()):
        name = re.sub(r"\.files\.\d+", ".files.4", ".".join(map(str, path)))
        if name.startswith(tuple(f"{free}." for free in ANY_FORM)) or name.endswith(".target"):
            continue
        if name.startswith((*ADDED, *(f"node.{added}" for added in ADDED_TO_NODE))):
            continue
        # Items of lists, and names in the environment, are not fields.
        assert name in FIELDS or name.rpartition(".")[0] in FIELDS, name


@pytest.mark.parametrize("name", FIELDS)
def test_a_missing_field_is_named(name: str) -> None:
    value = document()
    *outer, last = steps(name)
    del at(value, outer)[last]
    with pytest.raises(FormatError) as caught:
        parse(value)
    place = re.sub(r"\.(\d+)", r"[\1]", name)
    assert caught.value.message.startswith(f"record.{place} is ")


WRONG: dict[str, object] = {
    "null": None,
    "true": True,
    "half": 0.5,
    "text": "",
    "number": -1 << 63,
    "list": [[]],
    "object": {"": 0},
}
# Every field with every value that is not of its type.
WRONGLY = [
    pytest.param(name, wrong, id=f"{name}-{kind}")
    for name in FIELDS
    for kind, wrong in WRONG.items()
    if name not in ANY_FORM and not (kind == "text" and isinstance(at(document(), steps(name)), str))
]


@pytest.mark.parametrize(("name", "wrong"), WRONGLY)
def test_a_field_of_another_type_is_named(name: str, wrong: object) -> None:
    with pytest.raises(FormatError) as caught:
        parse(changed(steps(name), wrong))
    # Of an object it may be the first field in it that is missing; of a list, its first item.
    words = caught.value.message.split()[0].removeprefix("record.").replace("[", ".").replace("]", "")
    assert words.startswith(name)


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        (("salt",), "0123"),
        (("salt",), "g" * 32),
        (("marks", "HF_HOME"), "not a digest"),
        (("marks", "HF_HOME"), "a" * 33),
        (("marks", "HF_HOME"), "ab\n"),
        (("marks", "HF_HOME"), None),
        (("marks",), []),
        (("withheld",), "KEY"),
    ],
)
def test_variables_that_could_not_be_compared_are_refused(place: Steps, wrong: object) -> None:
    with pytest.raises(FormatError):
        parse(changed(("variables", *place), wrong))


@pytest.mark.parametrize("wrong", [5, "text", [], None])
def test_engine_options_that_are_no_object_are_refused(wrong: object) -> None:
    with pytest.raises(FormatError):
        parse(changed(("engine", "options"), wrong))


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_an_oracle_request_that_is_none_is_named(wrong: object) -> None:
    with pytest.raises(FormatError, match=r"^record\.oracle\.request"):
        parse(changed(("oracle", "request"), wrong))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("endpoint.port", 0),
        ("endpoint.port", 65536),
        ("process.root_pid", 1),
        ("process.server_pid", 0),
        ("process.tasks", 0),
        ("process.network", "bridge"),
        ("process.stdout", "relative"),
        ("process.stdout", ""),
        ("process.stderr", "/with\0nul"),
        ("process.monotonic_ns", -1),
        ("process.private", ["relative"]),
        ("process.private", ["/dev/shm/../../etc"]),
        ("process.private", ["/proc/1/environ"]),
        ("process.private", ["/a//b"]),
        ("process.private", ["//a"]),
        ("process.private", ["/" + "x" * 4096]),
        ("process.directories", [{"path": "/a/"}]),
        ("node.page_bytes", 0),
        ("mapped_files.0.path", "relative"),
        ("mapped_files.0.path", "/a\0b"),
        ("mapped_files.0.size", -1),
        ("dump.dump_bytes", -1),
        ("dump.stored_bytes", 1 << 63),
        ("dump.files.4.mode", 0o10000),
        ("dump.files.4.uid", 1 << 32),
        ("dump.files.4.gid", -1),
        ("dump.files.4.size", -1),
        ("dump.files.4.size", 1.0),
        ("dump.files.4.kind", "device"),
        ("dump.files.4.mtime_ns", -(1 << 63)),
        ("command", ["a", 5]),
        ("node.cpu_features", ["avx", None]),
        ("environment", {"A": 5}),
        ("environment", ["A=5"]),
    ],
)
def test_a_value_out_of_range_is_refused(name: str, value: object) -> None:
    with pytest.raises(FormatError):
        parse(changed(steps(name), value))


def numbered_document(*numbers: int) -> dict[str, Any]:
    """A delta's record, whose files have these numbers and then higher ones."""
    value = document()
    for file, number in zip(
        value["dump"]["files"], itertools.chain(numbers, itertools.count(50)), strict=False
    ):
        file["number"] = number
    return {**value, "schema": "rekindle.record/3", "dump": {**value["dump"], "base": f"sha256:{'b' * 64}"}}


def test_a_delta_has_a_format_of_its_own() -> None:
    record = parse(numbered_document(7, 4))
    assert json.loads(record.to_bytes())["schema"] == "rekindle.record/3"
    assert [file.number for file in record.dump.files][:3] == [7, 4, 50]
    assert Record.parse(record.to_bytes()) == record
    assert set(numbered(record.dump.files)) == {7, 4, *range(50, 48 + len(record.dump.files))}


def test_numbers_of_files_must_be_clear() -> None:
    with pytest.raises(FormatError, match="one number"):
        parse(numbered_document(7, 7))
    without = numbered_document(7, 4)
    del without["dump"]["base"]
    with pytest.raises(FormatError, match="names no base"):
        parse(without)


@pytest.mark.parametrize(
    ("schema", "hint"),
    [("rekindle.record/4", "newer"), ("rekindle.record/10", "newer"), ("rekindle.report/1", ""), ("", "")],
)
def test_another_schema_is_refused(schema: str, hint: str) -> None:
    with pytest.raises(FormatError, match="unknown format") as caught:
        parse(changed(("schema",), schema))
    assert hint in caught.value.hint
    assert bool(caught.value.hint) is bool(hint)


def test_a_newer_record_need_not_look_like_ours() -> None:
    with pytest.raises(FormatError, match="record/4"):
        parse({"schema": "rekindle.record/4"})


HOSTILE = {
    "parent": [file("criu/../../etc/passwd")],
    "parent at the end": [file("criu/..")],
    "absolute": [file("/etc/passwd")],
    "two slashes": [file("//etc/passwd")],
    "absolute below criu": [file("criu//etc/passwd")],
    "criu itself": [file("criu")],
    "memory itself": [file("memory", "directory")],
    "shm itself": [file("shm", "directory")],
    "nothing": [file("")],
    "a dot": [file(".")],
    "a dot before": [file("./criu/x")],
    "a dot within": [file("criu/./x")],
    "parent within": [file("shm/../x")],
    "a trailing slash": [file("criu/x/")],
    "another directory": [file("etc/passwd")],
    "another case": [file("CRIU/x")],
    "nul": [file("criu/x\0y")],
    "twice": [file("criu/x"), file("criu/x")],
    "twice of two kinds": [file("criu/x", "symlink", target="/etc"), file("criu/x")],
    "below a file": [file("criu/x"), file("criu/x/y")],
    "below a fifo": [file("criu/x", "fifo"), file("criu/x/y")],
    "below a link": [file("criu/x", "symlink", target="/etc"), file("criu/x/passwd")],
    "below a hard link": [file("criu/y"), file("criu/x", "hardlink", target="criu/y"), file("criu/x/z")],
    "below nothing": [file("criu/x/y")],
    "before its directory": [file("criu/x/y"), file("criu/x", "directory")],
    "hard link to a host's file": [file("criu/x", "hardlink", target="/etc/shadow")],
    "hard link out": [file("criu/x", "hardlink", target="criu/../../etc/shadow")],
    "hard link to nothing": [file("criu/x", "hardlink")],
    "hard link to what is not there": [file("criu/x", "hardlink", target="criu/y")],
    "hard link to what comes later": [file("criu/x", "hardlink", target="criu/y"), file("criu/y")],
    "hard link to itself": [file("criu/x", "hardlink", target="criu/x")],
    "hard link to a directory": [
        file("shm/d", "directory"),
        file("shm/x", "hardlink", target="shm/d"),
    ],
    "hard link to a top": [file("shm/x", "hardlink", target="criu")],
    "hard link to a symbolic link": [
        file("shm/l", "symlink", target="/etc/shadow"),
        file("shm/x", "hardlink", target="shm/l"),
    ],
    "hard link through a link": [
        file("shm/l", "symlink", target="/etc"),
        file("shm/x", "hardlink", target="shm/l/shadow"),
    ],
    "no object": ["criu/x"],
    "a list": [["criu/x", "file"]],
}


@pytest.mark.parametrize("files", HOSTILE.values(), ids=HOSTILE)
def test_a_path_that_leads_out_is_refused(files: list[object]) -> None:
    with pytest.raises(FormatError):
        parse(with_files(*files))


# A record that cannot be made is malformed, and must not end in a traceback while it is unpacked.
CANNOT_BE_MADE = {
    "symlink to nothing": [file("shm/x", "symlink")],
    "symlink with nul": [file("shm/x", "symlink", target="a\0b")],
    "symlink of half a character": [file("shm/x", "symlink", target="\ud800")],
    "symlink longer than a path": [file("shm/x", "symlink", target="x" * 4096)],
    "half a character": [file("shm/\ud800")],
    "name too long": [file("shm/" + "x" * 256)],
    "larger than any file": [file("shm/x", size=1 << 62)],
}


@pytest.mark.parametrize("files", CANNOT_BE_MADE.values(), ids=CANNOT_BE_MADE)
def test_a_file_that_cannot_be_made_is_refused(files: list[object]) -> None:
    with pytest.raises(FormatError):
        parse(with_files(*files))


def test_a_path_of_half_a_character_is_refused() -> None:
    with pytest.raises(FormatError):
        parse(changed(("process", "stdout"), "/\ud800"))


@pytest.mark.parametrize(
    "path",
    ["criu/x", "shm/..x", "shm/...", "shm/a b\n", "shm/\udcff", "shm/ü", "shm/-rf", "shm/criu", "criu/\\"],
)
def test_a_strange_name_is_no_hostile_one(path: str, tmp_path: Path) -> None:
    record = parse(with_files(file(path)))
    assert record.dump.files[0].path == PurePosixPath(path)
    dump_tree.make(record.dump.files, tmp_path)
    assert (tmp_path / path).is_file()


def test_a_link_may_point_anywhere() -> None:
    record = parse(with_files(file("shm/x", "symlink", target="/etc/../nowhere")))
    assert record.dump.files[0].kind is FileKind.SYMLINK


def test_a_hundred_thousand_files_are_enough() -> None:
    files = [file(f"criu/{number}") for number in range(100_001)]
    with pytest.raises(FormatError, match=r"^record\.dump\.files is not valid") as caught:
        parse(with_files(*files))
    assert "length <= 100000" in caught.value.cause
    assert len(parse(with_files(*files[:2000])).dump.files) == 2000


def test_a_record_over_the_limit_is_refused() -> None:
    content = FULL_RECORD.to_bytes() + b" " * RECORD_LIMIT_BYTES
    with pytest.raises(FormatError, match="longer"):
        Record.parse(content)


BAD_JSON = {
    "nothing": b"",
    "nul": b"\0",
    "a number": b"5",
    "null": b"null",
    "a list": b"[]",
    "text": b'"rekindle.record/1"',
    "an object": b"{}",
    "half": FULL_RECORD.to_bytes()[: len(FULL_RECORD.to_bytes()) // 2],
    "two": FULL_RECORD.to_bytes() * 2,
    "bad utf-8": b'{"schema": "\xff"}',
    "a mark of utf-16": b"\xff\xfe{",
    "10 MB of brackets": b"[" * 10_000_000,
    "10 MB of objects": b'{"a":' * 2_000_000,
    "a number of a million digits": b'{"schema": ' + b"9" * 1_000_000 + b"}",
    "infinity": b'{"schema": Infinity}',
    "single quotes": b"{'schema': 'rekindle.record/1'}",
}


@pytest.mark.parametrize("content", BAD_JSON.values(), ids=BAD_JSON)
def test_what_is_no_record_is_refused(content: bytes) -> None:
    with memory_peak() as peak, pytest.raises(FormatError):
        Record.parse(content)
    assert peak[0] < 64 << 20


def test_deep_nesting_is_read_or_refused() -> None:
    for name in (
        "command",
        "directory",
        "oracle.request",
        "oracle.answer",
        "dump.files",
        "node.cpu_features",
    ):
        template = json.dumps(changed(steps(name), "HERE"))
        for depth in [*range(100, 900, 100), *range(900, 1000), 100_000]:
            nest = "[" * depth + "]" * depth
            with contextlib.suppress(FormatError):
                Record.parse(template.replace('"HERE"', nest).encode())
                assert name == "oracle.answer"


def test_every_prefix_of_a_record_is_refused() -> None:
    content = FULL_RECORD.to_bytes()
    for length in range(0, len(content), 7):
        with pytest.raises(FormatError):
            Record.parse(content[:length])


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["criu/x", "/", "..", "file", "hardlink", "private", "rekindle.record/1"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(json_values)
def test_random_json_is_refused(value: object) -> None:
    with pytest.raises(FormatError):
        parse(value)


@given(st.binary(max_size=400))
def test_random_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(FormatError):
        Record.parse(content)


PLACES = list(leaves(document()))


@given(st.data())
def test_a_spoiled_record_is_read_or_refused(data: st.DataObject) -> None:
    value = document()
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(PLACES))
        try:
            parent = at(value, path[:-1])
            match data.draw(st.sampled_from(["set", "delete", "copy"])):
                case "set":
                    parent[path[-1]] = data.draw(json_values)
                case "delete":
                    del parent[path[-1]]
                case _:
                    parent[path[-1]] = copy.deepcopy(at(value, data.draw(st.sampled_from(PLACES))))
        except (LookupError, TypeError):  # an earlier change took the place away
            continue
    try:
        record = parse(value)
    except FormatError:
        return
    again = Record.parse(record.to_bytes())
    assert again.to_bytes() == record.to_bytes()


names = st.sampled_from(["criu", "shm", "..", ".", "", "x", "y", "z", "etc"])
paths = st.builds("/".join, st.lists(names, min_size=1, max_size=4))
hostile_files = st.lists(
    st.builds(file, paths, st.sampled_from([*FileKind]), target=paths | st.just("/etc")), max_size=8
)


@given(hostile_files)
def test_what_is_read_stays_inside(tmp_path: Path, files: list[dict[str, object]]) -> None:
    try:
        record = parse(with_files(*files))
    except FormatError:
        return
    seen = {PurePosixPath("criu"), PurePosixPath("shm")}
    links: set[PurePosixPath] = set()
    for each in record.dump.files:
        assert each.path.parts[0] in {"criu", "shm"}
        assert ".." not in each.path.parts
        assert each.path.parent in seen
        assert not links & set(each.path.parents)
        assert each.path not in seen
        seen.add(each.path)
        if each.kind is not FileKind.DIRECTORY:
            links.add(each.path)
