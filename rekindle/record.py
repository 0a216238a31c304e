# SPDX-License-Identifier: Apache-2.0
"""The record: our JSON about a snapshot, stored as the config of its image. See docs/format.md."""

import itertools
import json
import os
import posixpath
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Annotated

from msgspec import Meta, Struct

from rekindle import documents
from rekindle.cell import Clocks, Network
from rekindle.cell.settings import ProcessSettings
from rekindle.digest import Digest
from rekindle.documents import AbsolutePath, Count, Nanoseconds
from rekindle.engine import Endpoint, Request
from rekindle.environment import RecordedVariables
from rekindle.errors import FormatError
from rekindle.fields import JSON, Fields
from rekindle.node import start_reads
from rekindle.node.fingerprint import Fingerprint
from rekindle.node.huge_pages import HugePages
from rekindle.node.loaded import Loaded
from rekindle.node.mapped import MappedFile

SCHEMA = "rekindle.record/2"
SCHEMA_WITHOUT_MEMORY = "rekindle.record/1"
"""The format of images without memory files, whose memory CRIU restores."""
SCHEMA_DELTA = "rekindle.record/3"
"""The format of images that share layers with another image."""
RECORD_LIMIT_BYTES = 16 << 20
_FILES_LIMIT = 100_000
_LAYERS_LIMIT = 10_000
_FILE_LIMIT_BYTES = 1 << 43  # half of what ext4 can hold
_GPUS_LIMIT = 1024
LISTENERS_LIMIT = 1024
_NAME_LIMIT_BYTES, _PATH_LIMIT_BYTES = 255, 4095
_SIZES_LIMIT = 16
_RANGES_LIMIT = 1 << 17  # twice the mappings that Linux lets a process have by default
_PRIVATE_LIMIT = 10_000
_NOT_PRIVATE = ("/dev/", "/proc/", "/sys/")
_TOPS = ("criu", "memory", "shm")
_Pid = Annotated[int, Meta(ge=2, le=(1 << 22) - 1)]
_Owner = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]


class FileKind(StrEnum):
    """The type of a file of the dump."""

    FILE = "file"
    DIRECTORY = "directory"
    SYMLINK = "symlink"
    FIFO = "fifo"
    HARDLINK = "hardlink"


class StoredFile(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A file of the dump, below `criu/` (CRIU's images), `memory/` (of processes) or `shm/` (of the cell).

    `target` is the text of a symbolic link, or the path of the file that a hard link names, too. `number` is
    what layers call the file; None means its position in the list.
    """

    path: PurePosixPath
    kind: FileKind
    size: Annotated[int, Meta(ge=0, le=_FILE_LIMIT_BYTES)]
    mode: Annotated[int, Meta(ge=0, le=0o7777)]
    uid: _Owner
    gid: _Owner
    mtime_ns: Nanoseconds
    target: str = ""
    number: Annotated[int, Meta(ge=0, le=(1 << 32) - 1)] | None = None

    def __post_init__(self) -> None:
        _require_inside(self.path)
        if self.kind is FileKind.HARDLINK:
            _require_inside(documents.canonical_path(self.target))
        elif self.kind is FileKind.SYMLINK and not 0 < len(_encoded(self.target)) <= _PATH_LIMIT_BYTES:
            raise FormatError(
                f"invalid symbolic link {self.path} in the record", cause=f"{self.target!r:.120}"
            )


Range = tuple[Annotated[int, Meta(ge=0, le=1 << 62)], Annotated[int, Meta(ge=0, le=1 << 62)]]


class StoredMemory(Struct, frozen=True, kw_only=True):
    """A memory file of the dump: the addresses that map it, and the working set until the oracle's answer.

    `path` is one of the dump's files; `data_bytes` of it are not holes. `ranges` are addresses, [start, end),
    in order. `working_set` are ranges of the file, [offset, length] in bytes; empty if it was not measured.
    """

    path: PurePosixPath
    data_bytes: Annotated[int, Meta(ge=0, le=_FILE_LIMIT_BYTES)]
    ranges: Annotated[Sequence[Range], Meta(max_length=_RANGES_LIMIT)]
    working_set: Annotated[Sequence[Range], Meta(max_length=_RANGES_LIMIT)] = ()

    def __post_init__(self) -> None:
        _require_inside(self.path)
        ordered = all(start < end for start, end in self.ranges)
        if not ordered or any(end > start for (_, end), (start, _) in itertools.pairwise(self.ranges)):
            raise FormatError(f"the mappings of {self.path} in the record are out of order")


class StoredBlocks(Struct, frozen=True, kw_only=True):
    """The blocks of a memory layer, each of which can be fetched by itself: `oci/blocks.py`."""

    layer: Digest
    digests: str
    table: str


class Dump(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The files of the dump, with their total size as CRIU wrote them and as they are stored.

    `memory` describes those that processes map; images of the first format have none. `own_bytes` is the
    memory that belonged to the server alone at its first answer after a restore, 0 if not measured. `base` is
    the digest of the image whose memory layers a delta shares, None for any other image. `blocks` are those
    of its memory layers; older images have none.
    """

    dump_bytes: Count
    stored_bytes: Count
    own_bytes: Count = 0
    base: Digest | None = None
    files: Annotated[Sequence[StoredFile], Meta(max_length=_FILES_LIMIT)]
    memory: Annotated[Sequence[StoredMemory], Meta(max_length=_FILES_LIMIT)] = ()
    blocks: Annotated[Sequence[StoredBlocks], Meta(max_length=_LAYERS_LIMIT)] = ()

    def __post_init__(self) -> None:
        """Require each file once, after its directory and before hard links to it, and none below a link."""
        kinds = dict.fromkeys(_TOPS, FileKind.DIRECTORY)
        for file in self.files:
            path = str(file.path)  # canonical, and faster to compare than a path
            if path in kinds:
                raise FormatError(f"the record names {path} twice")
            if kinds.get(path.rpartition("/")[0]) is not FileKind.DIRECTORY:
                raise FormatError(f"the record names {path} before its directory")
            if file.kind is FileKind.HARDLINK and kinds.get(file.target) is not FileKind.FILE:
                raise FormatError(f"the record links {path} to {file.target}, which is not an earlier file")
            kinds[path] = file.kind
        if len(numbered(self.files)) != len(self.files):
            raise FormatError("the record gives two files one number")
        if self.base is None and any(file.number is not None for file in self.files):
            raise FormatError("the record numbers its files, but names no base")
        self._require_memory()

    def _require_memory(self) -> None:
        """Require that memory files are files of the dump, each once, and large enough."""
        sizes = {file.path: file.size for file in self.files if file.kind is FileKind.FILE}
        for each in self.memory:
            size = sizes.pop(each.path, None)
            if size is None or each.path.parts[0] != "memory":
                raise FormatError(f"the record maps {each.path}, which is not a memory file of the dump")
            if each.data_bytes > size:
                raise FormatError(f"the record gives {each.path} more bytes of data than it has")
            if any(offset + length > size for offset, length in each.working_set):
                raise FormatError(f"the record's working set of {each.path} exceeds the file")


def numbered(files: Sequence[StoredFile]) -> dict[int, StoredFile]:
    """Return files of a dump by the numbers that layers call them by."""
    return {position if file.number is None else file.number: file for position, file in enumerate(files)}


class NeededDirectory(Struct, frozen=True, kw_only=True):
    """A directory outside the cell that a restore needs.

    If the server `made` it, a restore makes it where it is missing. It must be writable if it is `written`:
    CRIU makes deleted files there, for a moment.
    """

    path: AbsolutePath
    made: bool = False
    written: bool = False


class Process(Struct, frozen=True, kw_only=True):
    """The processes in their cell.

    PIDs are those inside the cell. `gpus` are the UUIDs of the GPUs that they held, and `cuda_pids` the
    processes with CUDA state, which held `device_bytes` there by NVML, 0 if unknown. `settings` are those of
    every process but the root; None if it is not known what they set, and everything stays as it was at the
    dump. `hooked` are the processes to reseed after a
    restore (rekindle/cell/hook.py). `private` are paths outside the cell of which each replica gets a copy
    (rekindle/cell/private.py), `made` are files that a restore makes from copies where they
    are missing, `directories` those that it needs. `huge_pages` are those
    that they have mapped. `closed` names the connections to the outside that were closed in the dump.
    """

    root_pid: Annotated[int, Meta(ge=2, le=1 << 62)]
    server_pid: Annotated[int, Meta(ge=2, le=1 << 62)]
    tasks: Annotated[int, Meta(ge=1, le=1 << 62)]
    network: Network
    monotonic_ns: Count
    boottime_ns: Count
    stdout: AbsolutePath
    stderr: AbsolutePath
    stdin: AbsolutePath | None = None
    gpus: Annotated[tuple[str, ...], Meta(max_length=_GPUS_LIMIT)] = ()
    cuda_pids: Annotated[tuple[_Pid, ...], Meta(max_length=_FILES_LIMIT)] = ()
    device_bytes: Count = 0
    settings: Annotated[tuple[ProcessSettings, ...], Meta(max_length=_FILES_LIMIT)] | None = None
    hooked: Annotated[tuple[_Pid, ...], Meta(max_length=_FILES_LIMIT)] = ()
    private: Annotated[tuple[AbsolutePath, ...], Meta(max_length=_PRIVATE_LIMIT)] = ()
    made: Annotated[tuple[AbsolutePath, ...], Meta(max_length=_PRIVATE_LIMIT)] = ()
    directories: Annotated[tuple[NeededDirectory, ...], Meta(max_length=_PRIVATE_LIMIT)] = ()
    huge_pages: Annotated[tuple[HugePages, ...], Meta(max_length=_SIZES_LIMIT)] = ()
    closed: Annotated[tuple[str, ...], Meta(max_length=_FILES_LIMIT)] = ()

    def __post_init__(self) -> None:
        """Require that what is private lies where the cell shows the node's own files."""
        for path in (*self.private, *self.made, *(each.path for each in self.directories)):
            plain = posixpath.normpath(path) == path and not path.startswith("//")
            if (
                not plain
                or f"{path}/".startswith(_NOT_PRIVATE)
                or len(_encoded(path)) > _PATH_LIMIT_BYTES // 2
            ):
                raise FormatError("the record names an invalid private path", cause=f"{path!r:.120}")

    @property
    def clocks(self) -> Clocks:
        """The cell's clocks at the time of the dump."""
        return Clocks(monotonic_ns=self.monotonic_ns, boottime_ns=self.boottime_ns)


class Oracle(Struct, frozen=True, kw_only=True):
    """The request that proves the server, and its answer before the dump."""

    request: Request
    answer: JSON


class RecordedEngine(Struct, frozen=True, kw_only=True):
    """The name of the server's engine, and the options to create it again."""

    name: str
    options: Mapping[str, JSON]


class RecordedCriu(Struct, frozen=True, kw_only=True):
    """The CRIU that made the dump."""

    version: str


class Neutral(Struct, frozen=True, kw_only=True):
    """A process that has imported what a server imports, and waits for its command.

    It becomes `script`. `variables` are the names of those that were read while it imported.
    """

    script: AbsolutePath
    variables: Annotated[tuple[str, ...], Meta(max_length=_FILES_LIMIT)]


class Record(Struct, frozen=True, kw_only=True, tag_field="schema", tag=SCHEMA):
    """Everything that `restore` must know before it fetches the dump.

    `start_seconds` is the time that the server took to become ready before the snapshot, 0 if unknown.
    `weights` describes the model's files, and `loaded` what else the server has read. `proved` tells whether
    the image was restored, and answered, before it was published. `environment` holds the variables that
    choose kernels, `variables` all others without their values. `listeners` are all TCP addresses that the
    server listened on, `endpoint` first. `reads` is what a start reads (rekindle/node/start_reads.py). Older
    records have none of these but `environment`, which holds more in them.
    """

    created: str
    made_by: str
    engine: RecordedEngine
    command: Annotated[Sequence[str], Meta(max_length=100_000)]
    directory: str
    environment: Mapping[str, str]
    endpoint: Endpoint
    listeners: Annotated[tuple[Endpoint, ...], Meta(max_length=LISTENERS_LIMIT)] = ()
    oracle: Oracle
    node: Fingerprint
    criu: RecordedCriu
    process: Process
    mapped_files: Annotated[Sequence[MappedFile], Meta(max_length=_FILES_LIMIT)]
    dump: Dump
    weights: Mapping[str, JSON] = {}
    loaded: Loaded = Loaded()
    reads: Annotated[str, Meta(max_length=start_reads.TEXT_LIMIT)] = ""
    start_seconds: Annotated[float, Meta(ge=0, le=1e12)] = 0.0
    proved: bool = True
    variables: RecordedVariables | None = None
    neutral: Neutral | None = None

    @property
    def reloads(self) -> bool:
        """Whether the restored server reads its model's files again."""
        return self.engine.options.get("asleep") in (2, "boundary")

    def to_bytes(self) -> bytes:
        """Return the document. Equal records give equal bytes."""
        document = {**documents.to_json(self), "node": self.node.to_json()}
        if self.dump.base:
            document["schema"] = SCHEMA_DELTA
        else:
            document["schema"] = SCHEMA if self.dump.memory else SCHEMA_WITHOUT_MEMORY
        return json.dumps(document, indent=1, sort_keys=True).encode()

    @classmethod
    def parse(cls, content: bytes, *, limit_bytes: int = RECORD_LIMIT_BYTES) -> "Record":
        """Parse a document. Raises FormatError unless it is a well-formed record of a known version."""
        fields = Fields.parse(content, "record", limit_bytes=limit_bytes)
        schema = fields.text("schema")
        if schema not in {SCHEMA_DELTA, SCHEMA, SCHEMA_WITHOUT_MEMORY}:
            raise FormatError(
                f"unknown format {schema!r:.60} of the record; this rekindle reads {SCHEMA_DELTA!r}",
                hint="use a newer rekindle" if schema.startswith("rekindle.record/") else "",
            )
        node = Fingerprint.from_json(fields.json("node"), "record.node")
        return documents.read({**fields.as_json(), "schema": SCHEMA, "node": node}, cls, "record")


def _require_inside(path: PurePosixPath) -> None:
    """Require a valid path below `criu/`, `memory/` or `shm/`."""
    parts = str(path).split("/")  # of a canonical path; the first one of an absolute path is empty
    if (
        len(parts) < 2
        or parts[0] not in _TOPS
        or ".." in parts
        or len(_encoded(str(path))) > _PATH_LIMIT_BYTES // 2  # the other half is for the dump's directory
        or any(len(os.fsencode(part)) > _NAME_LIMIT_BYTES for part in parts)
    ):
        raise FormatError("the record names a path outside the dump", cause=f"{str(path)!r:.120}")


def _encoded(text: str) -> bytes:
    """Encode a name for the file system. Raises FormatError if no file can have it."""
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError:
        encoded = b"\0"
    if b"\0" in encoded:
        raise FormatError("the record names a file that cannot exist", cause=f"{text!r:.120}")
    return encoded
