# SPDX-License-Identifier: Apache-2.0
"""The record: our JSON about a snapshot, stored as the process image's config. See docs/format.md."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import PurePosixPath

from rekindle.cell import Clocks, Network
from rekindle.engine import Endpoint, Request
from rekindle.errors import FormatError
from rekindle.fields import JSON, Fields
from rekindle.node.fingerprint import Fingerprint
from rekindle.node.mapped import MappedFile

SCHEMA = "rekindle.record/1"
RECORD_LIMIT_BYTES = 16 << 20
_FILES_LIMIT = 100_000
_FILE_LIMIT_BYTES = 1 << 43  # half of what ext4 can hold
_GPUS_LIMIT = 1024
_NAME_LIMIT_BYTES, _PATH_LIMIT_BYTES = 255, 4095


class FileKind(StrEnum):
    FILE = "file"
    DIRECTORY = "directory"
    SYMLINK = "symlink"
    FIFO = "fifo"
    HARDLINK = "hardlink"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """A file of the dump: below `criu/` what CRIU wrote, below `shm/` what lay in the cell's /dev/shm.

    `target` is a symbolic link's text, or the path of the file that a hard link is another name of.
    """

    path: PurePosixPath
    kind: FileKind
    size: int
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """How the processes lived in their cell. PIDs are those inside; `gpus` the UUIDs of those they held,
    `cuda_pids` those with CUDA state."""

    root_pid: int
    server_pid: int
    tasks: int
    network: Network
    clocks: Clocks
    stdout: str
    stderr: str
    gpus: Sequence[str] = ()
    cuda_pids: Sequence[int] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Oracle:
    """The question that proves the server, and its answer before the dump."""

    request: Request
    answer: JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """All that `restore` must know before it fetches a byte of the dump.

    `start_seconds` is how long the server took to get ready when it was started for the snapshot, 0 if that
    is not known.
    """

    created: str
    made_by: str
    engine: str
    engine_options: Mapping[str, JSON]
    command: Sequence[str]
    directory: str
    environment: Mapping[str, str]
    endpoint: Endpoint
    oracle: Oracle
    node: Fingerprint
    criu_version: str
    process: Process
    mapped_files: Sequence[MappedFile]
    dump_bytes: int
    stored_bytes: int
    files: Sequence[StoredFile]
    weights: Mapping[str, JSON] = field(default_factory=dict)
    start_seconds: float = 0.0

    @property
    def reloads(self) -> bool:
        """Whether the restored server reads its model's files again."""
        return self.engine_options.get("asleep") in (2, "boundary")

    def to_bytes(self) -> bytes:
        """The document. Equal records give equal bytes."""
        return json.dumps(self._to_json(), indent=1, sort_keys=True).encode()

    def _to_json(self) -> dict[str, JSON]:
        return {
            "schema": SCHEMA,
            "created": self.created,
            "made_by": self.made_by,
            "engine": {"name": self.engine, "options": dict(self.engine_options)},
            "command": list(self.command),
            "directory": self.directory,
            "environment": dict(self.environment),
            "endpoint": {"host": self.endpoint.host, "port": self.endpoint.port},
            "oracle": {"request": self.oracle.request.to_json(), "answer": self.oracle.answer},
            "node": self.node.to_json(),
            "criu": {"version": self.criu_version},
            "process": {
                "root_pid": self.process.root_pid,
                "server_pid": self.process.server_pid,
                "tasks": self.process.tasks,
                "network": self.process.network,
                "monotonic_ns": self.process.clocks.monotonic_ns,
                "boottime_ns": self.process.clocks.boottime_ns,
                "stdout": self.process.stdout,
                "stderr": self.process.stderr,
                "gpus": list(self.process.gpus),
                "cuda_pids": list(self.process.cuda_pids),
            },
            "start_seconds": self.start_seconds,
            "weights": dict(self.weights),
            "mapped_files": [
                {"path": file.path, "size": file.size, "mtime_ns": file.mtime_ns, "identity": file.identity}
                for file in self.mapped_files
            ],
            "dump": {
                "dump_bytes": self.dump_bytes,
                "stored_bytes": self.stored_bytes,
                "files": [_file_to_json(file) for file in self.files],
            },
        }

    @classmethod
    def parse(cls, content: bytes, *, limit_bytes: int = RECORD_LIMIT_BYTES) -> "Record":
        """Raises FormatError for anything but a well-formed record of a version known here."""
        document = Fields.parse(content, "record", limit_bytes=limit_bytes)
        schema = document.text("schema")
        if schema != SCHEMA:
            raise FormatError(
                f"the record's format is {schema!r:.60}, and this rekindle reads {SCHEMA!r}",
                hint="use a newer rekindle" if schema.startswith("rekindle.record/") else "",
            )
        engine, endpoint = document.inner("engine"), document.inner("endpoint")
        oracle, node = document.inner("oracle"), document.inner("node")
        process, dump = document.inner("process"), document.inner("dump")
        options = engine.json("options")
        if not isinstance(options, dict):
            raise FormatError("record.engine.options is not a JSON object", cause=f"{options!r:.80}")
        return cls(
            created=document.text("created"),
            made_by=document.text("made_by"),
            engine=engine.text("name"),
            engine_options=options,
            command=document.texts("command"),
            directory=document.text("directory"),
            environment=document.text_map("environment"),
            endpoint=Endpoint(
                host=endpoint.text("host"), port=endpoint.integer("port", at_least=1, at_most=65535)
            ),
            oracle=Oracle(
                request=_request(oracle.json("request")),
                answer=oracle.json("answer"),
            ),
            node=Fingerprint.from_json(node),
            criu_version=document.inner("criu").text("version"),
            process=Process(
                root_pid=process.integer("root_pid", at_least=2),
                server_pid=process.integer("server_pid", at_least=2),
                tasks=process.integer("tasks", at_least=1),
                network=_network(process.text("network")),
                clocks=Clocks(
                    monotonic_ns=process.integer("monotonic_ns"),
                    boottime_ns=process.integer("boottime_ns"),
                ),
                stdout=_absolute(process.text("stdout")),
                stderr=_absolute(process.text("stderr")),
                gpus=tuple(process.texts("gpus", at_most=_GPUS_LIMIT)) if process.has("gpus") else (),
                cuda_pids=tuple(process.list_of("cuda_pids", _pid, at_most=_FILES_LIMIT))
                if process.has("cuda_pids")
                else (),
            ),
            mapped_files=document.list_of("mapped_files", _mapped_file, at_most=_FILES_LIMIT),
            dump_bytes=dump.integer("dump_bytes"),
            stored_bytes=dump.integer("stored_bytes"),
            weights=_weights(document.json("weights") if document.has("weights") else {}),
            start_seconds=document.number("start_seconds") if document.has("start_seconds") else 0.0,
            files=_consistent(dump.list_of("files", _stored_file, at_most=_FILES_LIMIT)),
        )


def _weights(value: JSON) -> Mapping[str, JSON]:
    """Nothing of ours depends on it yet: an object, for people and policies. Records of before have none."""
    return Fields(value, "record.weights").as_json()


def _file_to_json(file: StoredFile) -> dict[str, JSON]:
    out: dict[str, JSON] = {
        "path": str(file.path),
        "kind": file.kind,
        "size": file.size,
        "mode": file.mode,
        "uid": file.uid,
        "gid": file.gid,
        "mtime_ns": file.mtime_ns,
    }
    if file.target:
        out["target"] = file.target
    return out


def _stored_file(value: object, where: str) -> StoredFile:
    fields = Fields(value, where)
    try:
        kind = FileKind(fields.text("kind"))
    except ValueError:
        raise FormatError(f"{where}.kind is not known here") from None
    target = fields.text("target", "")
    if kind is FileKind.HARDLINK:
        _inside(target, where)
    elif kind is FileKind.SYMLINK and not 0 < len(_encodable(target, where)) <= _PATH_LIMIT_BYTES:
        raise FormatError(f"{where}.target cannot be the text of a symbolic link")
    return StoredFile(
        path=_inside(fields.text("path"), where),
        kind=kind,
        size=fields.integer("size", at_most=_FILE_LIMIT_BYTES),
        mode=fields.integer("mode", at_most=0o7777),
        uid=fields.integer("uid", at_most=(1 << 32) - 1),
        gid=fields.integer("gid", at_most=(1 << 32) - 1),
        mtime_ns=fields.integer("mtime_ns", at_least=-(1 << 62)),
        target=target,
    )


def _consistent(files: list[StoredFile]) -> list[StoredFile]:
    """Every file once, its directory before it, a hard link after what it names; nothing below a link."""
    kinds: dict[PurePosixPath, FileKind] = {
        PurePosixPath("criu"): FileKind.DIRECTORY,
        PurePosixPath("shm"): FileKind.DIRECTORY,
    }
    for file in files:
        if file.path in kinds:
            raise FormatError(f"the record names {file.path} twice")
        if kinds.get(file.path.parent) is not FileKind.DIRECTORY:
            raise FormatError(f"the record names {file.path} before its directory")
        if file.kind is FileKind.HARDLINK and kinds.get(PurePosixPath(file.target)) is not FileKind.FILE:
            raise FormatError(f"the record links {file.path} to {file.target}, which is no file before it")
        kinds[file.path] = file.kind
    return files


def _inside(text: str, where: str) -> PurePosixPath:
    """A path below `criu/` or `shm/`, in canonical form."""
    path = PurePosixPath(text)
    if (
        str(path) != text
        or path.is_absolute()
        or len(path.parts) < 2
        or path.parts[0] not in {"criu", "shm"}
        or ".." in path.parts
        or len(_encodable(text, where)) > _PATH_LIMIT_BYTES // 2  # below the directory that it goes to
        or any(len(os.fsencode(part)) > _NAME_LIMIT_BYTES for part in path.parts)
    ):
        raise FormatError(f"{where} names a path outside the dump", cause=f"{text!r:.120}")
    return path


def _encodable(text: str, where: str) -> bytes:
    """The text as the file system takes it."""
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError:
        encoded = b"\0"
    if b"\0" in encoded:
        raise FormatError(f"{where} names a file that cannot be", cause=f"{text!r:.120}")
    return encoded


def _absolute(text: str) -> str:
    if not text.startswith("/") or b"\0" in _encodable(text, "the record"):
        raise FormatError("the record's log is not an absolute path", cause=f"{text!r:.120}")
    return text


def _pid(value: object, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 < value < 1 << 22:
        raise FormatError(f"{where} is no PID", cause=f"{value!r:.80}")
    return value


def _network(text: str) -> Network:
    try:
        return Network(text)
    except ValueError:
        raise FormatError(f"the record's network {text!r:.60} is not known here") from None


def _request(value: JSON) -> Request:
    try:
        return Request.from_json(value)
    except FormatError as error:
        raise FormatError("record.oracle.request is no request", cause=error.cause) from None


def _mapped_file(value: object, where: str) -> MappedFile:
    fields = Fields(value, where)
    return MappedFile(
        path=_absolute(fields.text("path")),
        size=fields.integer("size"),
        mtime_ns=fields.integer("mtime_ns", at_least=-(1 << 62)) if fields.has("mtime_ns") else 0,
        identity=fields.text("identity", ""),
    )
