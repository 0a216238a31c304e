# SPDX-License-Identifier: Apache-2.0
"""A node, a record of a snapshot, and the files of a dump."""

import json
import os
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from msgspec import structs

from rekindle.cell import Network
from rekindle.engine import Endpoint, Request
from rekindle.environment import RecordedVariables
from rekindle.node.fingerprint import Fingerprint
from rekindle.node.mapped import MappedFile
from rekindle.record import (
    Dump,
    FileKind,
    Oracle,
    Process,
    Record,
    RecordedCriu,
    RecordedEngine,
    StoredFile,
)
from tests.fakes.nodes import L4

NODE = Fingerprint(
    architecture="x86_64",
    cpu_model="Example CPU",
    cpu_features=frozenset({"avx2", "avx512f", "fpu"}),
    kernel="6.8.0",
    page_bytes=4096,
    cpu_vendor="ExampleVendor",
    xsave=0xE7,
    capabilities=0x1FFFFFFFFFF,
    libc="glibc 2.36",
    container="docker",
    packages={"python": "3.11", "torch": "2.13.0"},
    devices=L4,
)

RECORD = Record(
    created="2026-01-02T03:04:05Z",
    made_by="rekindle 0.1.0",
    engine=RecordedEngine(name="http", options={"ready_path": "/health", "oracle": None, "select": []}),
    command=["server", "--port", "8000"],
    directory="/srv",
    environment={"LANG": "C.UTF-8"},
    endpoint=Endpoint(host="127.0.0.1", port=8000),
    oracle=Oracle(
        request=Request(method="POST", path="/ask", headers={"X-Kind": "oracle"}, body={"text": "hi"}),
        answer={"status": 200, "values": [1, "zwei"]},
    ),
    node=NODE,
    criu=RecordedCriu(version="4.1"),
    process=Process(
        root_pid=7,
        server_pid=8,
        tasks=3,
        network=Network.PRIVATE,
        monotonic_ns=123,
        boottime_ns=456,
        stdout="/run/stdout",
        stderr="/run/stderr",
    ),
    mapped_files=[
        MappedFile(path="/usr/lib/libc.so.6", size=2_000_000, mtime_ns=5, identity="build-id:0123abcd")
    ],
    start_seconds=60.5,
    dump=Dump(dump_bytes=1 << 30, stored_bytes=1 << 20, files=()),
)


def stored(path: str, kind: FileKind = FileKind.FILE, **changes: Any) -> StoredFile:
    """A file of a dump, as a record lists it."""
    fields: dict[str, Any] = {"size": 0, "mode": 0o600, "mtime_ns": 0, "target": ""}
    fields |= {"uid": os.getuid(), "gid": os.getgid()}
    return StoredFile(path=PurePosixPath(path), kind=kind, **{**fields, **changes})


def holding(record: Record, files: Sequence[StoredFile], **changes: Any) -> Record:
    """A record of other files of a dump."""
    return structs.replace(record, dump=structs.replace(record.dump, files=files, **changes))


FILES = [
    stored("criu/core-7.img", size=5),
    stored("criu/pages-1.img", size=1 << 20, mtime_ns=-1),
    stored("shm/deep", FileKind.DIRECTORY, mode=0o755),
    stored("shm/deep/fifo", FileKind.FIFO),
    stored("shm/deep/segment", size=4096, uid=1000, gid=100, mode=0o640),
    stored("shm/link", FileKind.SYMLINK, target="../anywhere"),
    stored("shm/again", FileKind.HARDLINK, target="shm/deep/segment"),
]
VARIABLES = RecordedVariables(
    salt="0123456789abcdef" * 2,
    marks={"LANG": "0123", "HF_HOME": "ab" * 16, "HF_TOKEN": ""},
    withheld=("KEY",),
)
FULL_RECORD = structs.replace(holding(RECORD, FILES), variables=VARIABLES)


def document(record: Record = FULL_RECORD) -> dict[str, Any]:
    """A record's JSON, to be spoiled."""
    value = json.loads(record.to_bytes())
    assert isinstance(value, dict)
    return value
